"""What each trick of the fast step is worth: the product's step with one of them taken away, or one more put in.

    python -m benchmarks.tricks --out runs/bench/tricks.json

All variants take turns in one process; the ratio is the variant's median time over the product's: above 1, the product
as it is is the faster. The teacher's branches in one batch are timed by themselves: they would change the scripts.
Precision and compilation are compared by benchmarks.training_step.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import measure
from benchmarks.training_step import METHODS, ProductStep
from experiment import cli
from experiment.engine.accelerated import Accelerated
from experiment.engine.folding import FoldedConv


def without_folding(fast: Accelerated) -> None:
    """Run the network itself, frozen, where the folded view would run."""
    fast._view = (None,)


def without_channels_last(fast: Accelerated) -> None:
    """Weights, and with them activations, in contiguous NCHW layout."""
    fast.model.to(memory_format=torch.contiguous_format)
    for module in fast.view.modules() if fast.view else ():
        if isinstance(module, FoldedConv):
            module.weight = module.weight.contiguous()


def without_reuse(fast: Accelerated) -> None:
    """Run every pass that the script writes, also one of a tensor that this step has seen."""
    fast.begin_step = lambda: None


def with_inplace_relu(fast: Accelerated) -> None:
    """Let the folded view's activations overwrite their inputs."""
    if fast.view:
        for node in fast.view.graph.nodes:
            if node.op == "call_function" and node.target is F.relu:
                node.kwargs = {**node.kwargs, "inplace": True}
        fast.view.recompile()


def without_any(fast: Accelerated) -> None:
    """The script's step as plain PyTorch: frozen networks and a clean pass without gradient are all that is left."""
    for take_away in (without_channels_last, without_folding, without_reuse):
        take_away(fast)


VARIANTS: dict[str, Callable[[Accelerated], None]] = {
    "product": lambda fast: None,
    "without folding BatchNorm": without_folding,
    "without channels_last": without_channels_last,
    "without reuse of passes": without_reuse,
    "without all three": without_any,
    "with in-place ReLU in folded views": with_inplace_relu,
}


def measure_method(method: str, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All variants of one method's step in turns."""
    networks = tuple(measure.make_network(name, device, i) for i, name in enumerate((args.student, args.teacher)))
    batches = measure.make_batches(args.batch, device)

    def build(change: Callable[[Accelerated], None]) -> ProductStep:
        student, teacher = copy.deepcopy(networks)
        step = ProductStep(method, student, teacher, batches, args.precision, 0)
        for fast in (step.fast_student, step.fast_teacher):
            change(fast)
        return step

    settings = [
        measure.Setting({"method": method, "variant": name}, device, lambda change=change: build(change))
        for name, change in VARIANTS.items()
    ]
    return _measured(settings, args.batch, args)


def measure_branches(device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """IGDM's teacher branches, x_adv and x - delta, in a pass each as in the scripts, and in one pass of both."""
    student, teacher = (measure.make_network(name, device, i) for i, name in enumerate((args.student, args.teacher)))
    batches = measure.make_batches(args.batch, device, 2)
    x_adv, x_minus = (x for x, _ in batches)

    def build(passes: list[tuple[torch.Tensor, ...]]) -> Callable[[], list[torch.Tensor]]:
        step = ProductStep("adaad_IGDM", student, teacher, batches, args.precision, 0)

        def run() -> list[torch.Tensor]:
            with torch.no_grad(), step.engine.step():
                return [step.fast_teacher(torch.cat(inputs)) for inputs in passes]

        return run

    variants = {"in a pass each": [(x_adv,), (x_minus,)], "in one pass": [(x_adv, x_minus)]}
    settings = [
        measure.Setting({"method": "teacher's two branches", "variant": name}, device, lambda p=passes: build(p))
        for name, passes in variants.items()
    ]
    return _measured(settings, 2 * args.batch, args)


def _measured(settings: list[measure.Setting], images: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All settings in turns; their speeds, and their times over the first one's."""
    measure.take_turns(settings, args.rounds, args.repeats)
    return [
        {
            **setting.fields,
            **measure.speed(images, setting.seconds),
            # Turned round: how much longer than the product it takes.
            **measure.ratio(setting.seconds, settings[0].seconds),
        }
        for setting in settings
    ]


def tricks_table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table."""
    body = [
        [
            f"{row['method']}, {row['variant']}",
            measure.spread(row["images_per_second"], row["images_per_second_quartiles"]),
            measure.spread(row["ratio"], row["ratio_quartiles"], 3),
        ]
        for row in rows
    ]
    return measure.table(["step", "images/s (quartiles)", "time / product's time (quartiles)"], body)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = cli.Parser(prog="python -m benchmarks.tricks", description=__doc__.partition("\n")[0])
    measure.add_report_flags(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["adaad_IGDM"], help="scripts to time")
    parser.add_argument("--teacher", default="WRN-28-10", help="WRN-d-w or another name of cifar100_models")
    parser.add_argument("--student", default="RES-18", help="name of cifar100_models")
    parser.add_argument("--batch", type=cli.whole(2), default=128, help="images per step")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="default fp32 on the CPU, tf32 on CUDA")
    parser.add_argument("--repeats", type=cli.positive_int, help="steps per turn; default 1 on the CPU, 4 on CUDA")
    args = parser.parse_args(argv)
    args.device = cli.resolve_device(parser, args.device)
    cuda = args.device.startswith("cuda")
    args.precision = args.precision or ("tf32" if cuda else "fp32")
    args.repeats = args.repeats or (4 if cuda else 1)
    return args


def main() -> None:
    """Measure, write, print."""
    args = parse_args()
    device = torch.device(args.device)
    rows = [row for method in args.methods for row in measure_method(method, device, args)]
    rows += measure_branches(device, args)
    names = ("teacher", "student", "batch", "precision", "rounds", "repeats")
    line = f"{args.teacher} → {args.student}, batch {args.batch}, {args.precision}, eager, {args.rounds} rounds:"
    settings = {name: getattr(args, name) for name in names}
    measure.report("tricks", args, device, {**settings, "rows": rows}, line, tricks_table(rows))


if __name__ == "__main__":
    cli.guard(main)
