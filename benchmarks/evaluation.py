"""Time the evaluation: PGD-20 as research code runs it against the product's, and AutoAttack by batch size.

    python -m benchmarks.evaluation --out runs/bench/evaluation.json

Weights and images are random. AutoAttack's epsilon is so small that nearly every image stays correctly classified and
every attack runs all iterations: the seconds are those of a robust image, the most expensive kind. torchattacks' PGD
and robustbench's loop are timed on the same work if these packages are installed.
"""

import argparse
import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import measure, published, report
from experiment import cli, evaluation
from experiment.compat import import_autoattack, import_robustbench
from experiment.engine import Engine

AUTOATTACK_EPSILON = 1e-4
EPSILON, STEP_SIZE = 8 / 255, 2 / 255


def pgd_rows(student: nn.Module, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """PGD-20 of the same images, in turns: published (both ways of taking a gradient), torchattacks', and product."""
    ((x, y),) = measure.make_batches(args.examples, device, 1)

    def parts(batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(x.split(batch), y.split(batch), strict=True))

    def build_published(weight_gradients: bool) -> Callable[[], object]:
        measure.RESEARCH_CODE.apply()
        model = copy.deepcopy(student)
        given = parts(args.batch)
        return lambda: sum(published.pgd_correct(model, *part, weight_gradients=weight_gradients) for part in given)

    def build_torchattacks() -> Callable[[], object]:
        import torchattacks

        measure.RESEARCH_CODE.apply()
        model, given = copy.deepcopy(student), parts(args.product_batch)
        attack = torchattacks.PGD(model, eps=EPSILON, alpha=STEP_SIZE, steps=20, random_start=True)

        def run() -> int:
            correct = 0
            for images, labels in given:
                x_adv = attack(images, labels)
                with torch.no_grad():
                    correct += (model(x_adv).argmax(dim=1) == labels).sum().item()
            return correct

        return run

    def build_product(precision: str) -> Callable[[], object]:
        settings = {"batch": args.product_batch, "compile": 0, "deterministic": 0, "seed": 0}
        engine = Engine(argparse.Namespace(device=str(device), precision=precision, **settings))
        fast = engine.accelerate(copy.deepcopy(student))
        return lambda: evaluation.pgd_accuracy(fast, x, y, EPSILON, batch=args.product_batch)

    kinds = [
        ("published order, loss.backward()", args.batch, lambda: build_published(True)),
        ("published order, autograd.grad", args.batch, lambda: build_published(False)),
        *[("torchattacks' PGD", args.product_batch, build_torchattacks)] * _installed("torchattacks"),
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


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def robustbench_loop(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float, batch: int) -> float:
    """AutoAttack as robustbench.eval.benchmark runs it, after it has loaded its data.

    Clean accuracy, the package's standard run over all images, accuracy of what it returns. Written out, because
    `benchmark` itself loads CIFAR and calls AutoAttack with arguments that the published package does not have. The
    network is not frozen, as robustbench hands it over: the attacks that call backward() pay for weight gradients too.
    """
    import_robustbench()
    from robustbench.utils import clean_accuracy

    clean_accuracy(model, x, y, batch_size=batch, device=x.device)
    attack = import_autoattack()(model, norm="Linf", eps=epsilon, seed=0, version="standard", device=x.device)
    x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=batch)
    return clean_accuracy(model, x_adv, y, batch_size=batch, device=x.device)


def autoattack_rows(student: nn.Module, device: torch.device, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """AutoAttack on images that the network classifies as labelled: ours by batch size, beside robustbench's loop."""
    settings = {"precision": "fp32", "batch": 1, "compile": 0, "deterministic": 0, "seed": 0}
    Engine(argparse.Namespace(device=str(device), **settings))
    model = copy.deepcopy(student).to(memory_format=torch.channels_last)
    ((x, _),) = measure.make_batches(args.aa_examples, device, 1)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    for batch in args.aa_batches:
        theirs, ours, attacked = [], [], []

        def product(batch: int = batch, attacked: list = attacked) -> None:
            attacked.append(evaluation.autoattack(model, x, y, AUTOATTACK_EPSILON, batch=batch, show_progress=False))

        def loop(batch: int = batch) -> None:
            robustbench_loop(model, x, y, AUTOATTACK_EPSILON, batch)

        turns = [(product, ours)] + [(loop, theirs)] * _installed("robustbench")
        for i in range(args.aa_rounds):
            for run, seconds in turns if i % 2 == 0 else reversed(turns):
                seconds.append(measure.seconds_of(run, device))
        found = attacked[-1]
        fields = {"batch": batch, "examples": found["examples"]}
        attacks = {name: found["attack_seconds"][name] for name in evaluation.AUTOATTACK}
        row = {**fields, "step": "product", "attack_seconds": attacks, "robust": found["accuracy"]}
        row["seconds"] = measure.median_and_quartiles(ours)[0]
        yield row | measure.ratio(theirs, ours) if theirs else row
        if theirs:
            yield {**fields, "step": "robustbench's loop", "seconds": measure.median_and_quartiles(theirs)[0]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = cli.Parser(prog="python -m benchmarks.evaluation", description=__doc__.partition("\n")[0])
    report.add_flags(parser)
    parser.add_argument("--student", default="RES-18", help="network under PGD-20")
    parser.add_argument("--examples", type=cli.positive_int, default=2048, help="images under PGD-20")
    parser.add_argument("--batch", type=cli.positive_int, default=128, help="the published order's batch")
    parser.add_argument("--product_batch", type=cli.positive_int, default=512, help="the product's batch")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "tf32"), help="default fp32; with tf32 on CUDA")
    parser.add_argument("--aa_student", default="RES-18", help="network under AutoAttack")
    parser.add_argument("--aa_examples", type=cli.whole(0), default=64, help="images under AutoAttack; 0 for none")
    parser.add_argument(
        "--aa_rounds", type=cli.positive_int, default=1, help="turns of AutoAttack, in which it is long"
    )
    parser.add_argument("--aa_batches", nargs="+", type=cli.positive_int, default=[32, 64], help="its batches")
    args = parser.parse_args(argv)
    args.device = cli.resolve_device(parser, args.device)
    return args


def main() -> None:
    """Measure, write, print."""
    args = parse_args()
    device = torch.device(args.device)
    args.precisions = args.precisions or ["fp32", *(["tf32"] if device.type == "cuda" else [])]
    line = f"PGD-20: {args.student}, {args.examples} images, {args.rounds} rounds"
    if args.aa_examples:
        line += f"; AutoAttack: {args.aa_student}, {args.aa_examples} images, {args.aa_rounds} rounds"
    found = report.Report("evaluation", args, device, f"{line}:")
    found.add("pgd20", pgd_rows(measure.make_network(args.student, device, 0), device, args))
    if args.aa_examples:
        found.add("autoattack", autoattack_rows(measure.make_network(args.aa_student, device, 0), device, args))
    found.show()


if __name__ == "__main__":
    cli.guard(main)
