"""Time the evaluation: PGD-20 as research code runs it against the product's, and AutoAttack by batch size.

    python -m benchmarks.evaluation --out runs/bench/evaluation.json

The network is the real architecture with random weights, images are random. AutoAttack runs at so small a budget that
(nearly) every image withstands every attack, which then spends all of its iterations: the seconds are those of a robust
image, the dear ones of a real run.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import measure, published
from experiment import cli, evaluation
from experiment.engine import Engine

AUTOATTACK_EPSILON = 1e-4
EPSILON = 8 / 255


def pgd_rows(student: nn.Module, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """PGD-20 of the same images, in turns: published (both ways of taking a gradient) and product."""
    ((x, y),) = measure.make_batches(args.examples, device, 1)

    def build_published(weight_gradients: bool) -> Callable[[], object]:
        measure.RESEARCH_CODE.apply()
        model = copy.deepcopy(student)
        parts = list(zip(x.split(args.batch), y.split(args.batch), strict=True))
        return lambda: [published.pgd_correct(model, *part, weight_gradients=weight_gradients) for part in parts]

    def build_product(precision: str) -> Callable[[], object]:
        settings = {"batch": args.product_batch, "compile": 0, "deterministic": 0, "seed": 0}
        engine = Engine(argparse.Namespace(device=str(device), precision=precision, **settings))
        fast = engine.accelerate(copy.deepcopy(student))
        return lambda: evaluation.pgd_accuracy(fast, x, y, EPSILON, batch=args.product_batch)

    settings = []
    for label, full in (("published order, loss.backward()", True), ("published order, autograd.grad", False)):
        fields = {"step": label, "precision": "fp32", "batch": args.batch}
        settings.append(measure.Setting(fields, device, lambda full=full: build_published(full)))
    for precision in args.precisions:
        fields = {"step": "product", "precision": precision, "batch": args.product_batch}
        settings.append(measure.Setting(fields, device, lambda precision=precision: build_product(precision)))
    measure.take_turns(settings, args.rounds)
    rows = []
    for setting in settings:
        row = {**setting.fields, **measure.speed(args.examples, setting.seconds)}
        row |= measure.ratio(settings[0].seconds, setting.seconds)
        row["peak_memory_gib"] = setting.peak_bytes / 2**30 if device.type == "cuda" else None
        rows.append(row)
    return rows


def autoattack_rows(student: nn.Module, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of each attack of AutoAttack, by batch size, on images that the network classifies as labelled."""
    settings = {"precision": "fp32", "batch": 1, "compile": 0, "deterministic": 0, "seed": 0}
    Engine(argparse.Namespace(device=str(device), **settings))
    model = copy.deepcopy(student).to(memory_format=torch.channels_last)
    ((x, _),) = measure.make_batches(args.aa_examples, device, 1)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    rows = []
    for batch in args.aa_batches:
        found = evaluation.autoattack(model, x, y, AUTOATTACK_EPSILON, batch=batch, show_progress=False)
        rows.append({"batch": batch, **{name: found[name] for name in ("examples", "seconds", "attack_seconds")}})
        rows[-1]["robust"] = found["accuracy"]
    return rows


def pgd_table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of PGD-20."""
    header = ["PGD-20", "batch", "images/s (quartiles)", "ratio (quartiles)", "peak memory, GiB"]
    body = [
        [
            row["step"] if row["step"] != "product" else f"product, {row['precision']}",
            row["batch"],
            measure.spread(row["images_per_second"], row["images_per_second_quartiles"]),
            measure.spread(row["ratio"], row["ratio_quartiles"]),
            "-" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.2f}",
        ]
        for row in rows
    ]
    return measure.table(header, body)


def autoattack_table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of AutoAttack: seconds per image."""
    names = [f"{name}, s/image" for name in evaluation.AUTOATTACK]
    body = []
    for row in rows:
        each = [f"{row['attack_seconds'][name] / row['examples']:.3f}" for name in evaluation.AUTOATTACK]
        share = f"{100 * row['robust']:.0f} % of {row['examples']}"
        body.append([f"batch {row['batch']}", *each, f"{row['seconds'] / row['examples']:.3f}", share])
    return measure.table(["AutoAttack, standard", *names, "all, s/image", "robust"], body)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = cli.Parser(prog="python -m benchmarks.evaluation", description=__doc__.partition("\n")[0])
    measure.add_report_flags(parser)
    parser.add_argument("--student", default="RES-18", help="network under PGD-20")
    parser.add_argument("--examples", type=cli.positive_int, default=2048, help="images under PGD-20")
    parser.add_argument("--batch", type=cli.positive_int, default=128, help="the published order's batch")
    parser.add_argument("--product_batch", type=cli.positive_int, default=512, help="the product's batch")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "tf32"), help="default fp32; with tf32 on CUDA")
    parser.add_argument("--aa_student", default="RES-18", help="network under AutoAttack")
    parser.add_argument("--aa_examples", type=cli.whole(0), default=64, help="images under AutoAttack; 0 for none")
    parser.add_argument("--aa_batches", nargs="+", type=cli.positive_int, default=[32, 64], help="its batches")
    args = parser.parse_args(argv)
    args.device = cli.resolve_device(parser, args.device)
    return args


def main() -> None:
    """Measure, write, print."""
    args = parse_args()
    device = torch.device(args.device)
    args.precisions = args.precisions or ["fp32", *(["tf32"] if device.type == "cuda" else [])]
    found: dict[str, Any] = {"pgd20": pgd_rows(measure.make_network(args.student, device, 0), device, args)}
    tables = [f"{args.student}, {args.examples} images, {args.rounds} rounds:", pgd_table(found["pgd20"])]
    print(tables[-1], flush=True)
    if args.aa_examples:
        found["autoattack"] = autoattack_rows(measure.make_network(args.aa_student, device, 0), device, args)
        tables += [f"{args.aa_student}, {args.aa_examples} images:", autoattack_table(found["autoattack"])]
    names = ("student", "examples", "rounds", "aa_student", "aa_examples")
    measure.report("evaluation", args, device, {**{name: getattr(args, name) for name in names}, **found}, *tables)


if __name__ == "__main__":
    cli.guard(main)
