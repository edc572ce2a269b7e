"""Compare AdaAD's attack in lower precision with float32: signs that flip in the first step, the objective after ten.

python -m benchmarks.fidelity --out runs/bench/fidelity.json
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import attacks
import rslad_loss
from benchmarks import measure, report
from cifar100_models import build_model
from experiment import cli, data

EPSILON, STEP_SIZE = 0.1, 0.025


def trained_network(name: str, seed: int, images: data.Data, device: torch.device, epochs: int) -> nn.Module:
    """A network trained for some epochs against FGSM on digits, in eval mode."""
    torch.manual_seed(seed)
    network = build_model(name, images.num_classes).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(1, epochs + 1):
        for x, y, _, _ in images.batches(128, 0, epoch):
            x_adv = attacks.fgsm(network, x, y, EPSILON)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network.train()(x_adv), y).backward()
            optimizer.step()
    return network.eval()


def rows(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per precision."""
    images = data.load_data("digits", device=device)
    student, teacher = (
        trained_network(name, seed, images, device, args.epochs)
        for seed, name in enumerate((args.student, args.teacher))
    )
    x = data.as_float(images.x_test[:128])

    def attacked(precision: str, steps: int) -> torch.Tensor:
        measure.Numerics(precision == "tf32", precision == "tf32", False).apply()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        torch.manual_seed(0)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            return attacks.adaad(student, teacher, x, EPSILON, STEP_SIZE, steps)

    def objective(x_adv: torch.Tensor) -> float:
        measure.Numerics(False, False, False).apply()
        with torch.no_grad(), attacks.frozen(student, teacher):
            return rslad_loss.kl_divergence(student(x_adv), teacher(x_adv)).item()

    torch.manual_seed(0)
    start = attacks.gaussian_start(x)
    first, reached = (attacked("fp32", 1) - start).sign(), objective(attacked("fp32", 10))
    for precision in args.precisions:
        flipped = ((attacked(precision, 1) - start).sign() != first).float().mean().item()
        ratio = objective(attacked(precision, 10)) / reached
        yield {"precision": precision, "flipped": flipped, "objective_ratio": ratio}


def main() -> None:
    """Measure, write, print."""
    parser = cli.Parser(prog="python -m benchmarks.fidelity", description=__doc__.partition("\n")[0])
    parser.add_argument("--student", default="RES-18", help="name of cifar100_models")
    parser.add_argument("--teacher", default="WRN-16-4", help="name of cifar100_models")
    parser.add_argument("--epochs", type=cli.positive_int, default=20, help="of training, on digits")
    choices = ("tf32", "bf16", "fp16")
    parser.add_argument("--precisions", nargs="+", choices=choices, default=list(choices), help="compared with float32")
    args = report.parse_args(parser, None)
    device = torch.device(args.device)
    found = report.Report("fidelity", args, device, f"{args.teacher} → {args.student}, digits:")
    found.add("fidelity", rows(args, device))
    found.show()


if __name__ == "__main__":
    cli.guard(main)
