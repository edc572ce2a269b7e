"""Time the evaluation: PGD-20 as research code runs it against the product's, and AutoAttack by batch size.

    python -m benchmarks.evaluation --out runs/bench/evaluation.json

Weights and images are random. AutoAttack's epsilon is so small that nearly every image stays correctly classified and
every attack runs all iterations: the seconds are those of a robust image, the most expensive kind.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import measure, published, report, workload
from experiment import cli, evaluation

AUTOATTACK_EPSILON = 1e-4


def pgd_rows(student: nn.Module, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """PGD-20 of the same images, in turns: published (both ways of taking a gradient) and product."""
    ((x, y),) = workload.make_batches(args.examples, device, 1)

    def build_published(weight_gradients: bool) -> Callable[[], object]:
        measure.RESEARCH_CODE.apply()
        model = copy.deepcopy(student)
        given = list(zip(x.split(args.batch), y.split(args.batch), strict=True))
        return lambda: sum(published.pgd_correct(model, *part, weight_gradients=weight_gradients) for part in given)

    def build_product(precision: str) -> Callable[[], object]:
        fast = workload.engine(device, precision, args.product_batch).accelerate(copy.deepcopy(student))
        return lambda: evaluation.pgd_accuracy(fast, x, y, published.EPSILON, batch=args.product_batch)

    kinds = [
        ("published order, loss.backward()", args.batch, lambda: build_published(True)),
        ("published order, autograd.grad", args.batch, lambda: build_published(False)),
        *((f"product, {p}", args.product_batch, lambda p=p: build_product(p)) for p in args.precisions),
    ]
    settings = [measure.Setting({"step": name, "batch": batch}, device, build) for name, batch, build in kinds]
    measure.take_turns(settings, args.rounds)
    return [
        {
            **setting.fields,
            **measure.speed(args.examples, setting.seconds),
            **measure.ratio(settings[0].seconds, setting.seconds),
            "peak_memory_gib": setting.peak_gib,
        }
        for setting in settings
    ]


def autoattack_rows(student: nn.Module, device: torch.device, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """AutoAttack on images that the network classifies as labelled: seconds by batch size."""
    workload.engine(device)  # sets the precision of this process
    model = copy.deepcopy(student).to(memory_format=torch.channels_last)
    ((x, _),) = workload.make_batches(args.aa_examples, device, 1)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    for batch in args.aa_batches:
        found = evaluation.autoattack(model, x, y, AUTOATTACK_EPSILON, batch=batch)
        yield {"batch": batch, **{name: found[name] for name in ("examples", "attack_seconds", "accuracy")}}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = cli.Parser(prog="python -m benchmarks.evaluation", description=__doc__.partition("\n")[0])
    parser.add_argument("--student", default="RES-18", help="network under PGD-20")
    parser.add_argument("--examples", type=cli.positive_int, default=2048, help="images under PGD-20")
    parser.add_argument("--batch", type=cli.positive_int, default=128, help="the published order's batch")
    parser.add_argument("--product_batch", type=cli.positive_int, default=512, help="the product's batch")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "tf32"), help="default fp32; with tf32 on CUDA")
    parser.add_argument("--aa_student", default="RES-18", help="network under AutoAttack")
    parser.add_argument("--aa_examples", type=cli.whole(0), default=64, help="images under AutoAttack; 0 for none")
    parser.add_argument("--aa_batches", nargs="+", type=cli.positive_int, default=[32, 64], help="its batches")
    return report.parse_args(parser, argv)


def main() -> None:
    """Measure, write, print."""
    args = parse_args()
    device = torch.device(args.device)
    args.precisions = args.precisions or ["fp32", *(["tf32"] if device.type == "cuda" else [])]
    line = f"PGD-20: {args.student}, {args.examples} images, {args.rounds} rounds"
    if args.aa_examples:
        line += f"; AutoAttack: {args.aa_student}, {args.aa_examples} images"
    found = report.Report("evaluation", args, device, f"{line}:")
    found.add("pgd20", pgd_rows(workload.make_network(args.student, device, 0), device, args))
    if args.aa_examples:
        found.add("autoattack", autoattack_rows(workload.make_network(args.aa_student, device, 0), device, args))
    found.show()


if __name__ == "__main__":
    cli.guard(main)
