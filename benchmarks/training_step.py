"""Time one training step of this project against the published order of passes, at each setting.

    python -m benchmarks.training_step --out runs/bench/training_step.json
    python -m benchmarks.training_step --methods adaad_IGDM --tricks all --profile 1

Networks are the real architectures with random weights, images are random. Each setting takes turns with the published
order in one process. Speeds are medians with quartiles over the rounds, a ratio is that of the medians. With --tricks
the ratio is the median time without the trick over the product's: above 1, the trick pays.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import measure, report, workload
from benchmarks.product import TRICKS, Networks, setting_of
from experiment import cli

METHODS = tuple(workload.PASSES)
Row = dict[str, Any]


def row_of(setting: measure.Setting, baseline: Sequence[float], networks: Networks, batch: int, tops: list[Row]) -> Row:
    """The row of a timed setting; the ratio is the baseline's seconds divided by the setting's."""
    setting.check_finite()
    row = {**setting.fields, **measure.speed(batch, setting.seconds), **measure.ratio(baseline, setting.seconds)}
    counted = workload.gflop_of_step(row["method"], networks, row.get("teacher_every", 1))
    row["gflop_per_image"] = counted[row["step"]]
    row["tflops"] = row["gflop_per_image"] * row["images_per_second"] / 1e3
    # Convolutions of the published step run in TF32 on CUDA: the framework's default.
    rate = "tf32" if row["step"] == "published" and setting.device.type == "cuda" else row["precision"]
    (top,) = (top for top in tops if top["precision"] == rate)
    # On CPUs two libraries compute products and convolutions; on a GPU the product is faster.
    row["share_of_peak"] = row["tflops"] / max(top["matmul_tflops"], top["convolution_tflops"])
    return {**row, "peak_memory_gib": setting.peak_gib}


def method_rows(method: str, networks: Networks, tops: list[Row], args: argparse.Namespace) -> Iterator[Row]:
    """A row per setting of one method. Settings alternate with the published step, whose row is first."""
    torch.compiler.reset()  # a limited number of compiled variants is kept per forward: make room for these
    batches = workload.make_batches(args.batch, args.device)
    published = setting_of(method, networks, batches, "published")
    kinds = [(precision, compiled, 1) for precision in args.precisions for compiled in args.compile]
    if method.startswith("adaad"):
        kinds += [(*kinds[-1][:2], every) for every in args.teacher_every]
    for precision, compiled, every in kinds:
        setting = setting_of(method, networks, batches, "product", precision, compiled, teacher_every=every)
        published.seconds.clear()
        measure.take_turns([published, setting], args.rounds, args.repeats)
        for timed in (published, setting):
            yield row_of(timed, published.seconds, networks, args.batch, tops)


def trick_rows(method: str, networks: Networks, tops: list[Row], args: argparse.Namespace) -> Iterator[Row]:
    """Return a row per trick, alternating with the unchanged step; the row of a failing trick has its error."""
    batches = workload.make_batches(args.batch, args.device)
    fastest = (args.precisions[-1], args.compile[-1])
    torch.compiler.reset()
    # Each setting compiles variants of the same functions; above the limit they run eagerly without a warning.
    torch._dynamo.config.recompile_limit = 8 * (len(TRICKS) + 1)
    product = setting_of(method, networks, batches, "product", *fastest)
    for name in args.tricks:
        try:
            product.seconds.clear()
            setting = product
            if name != "product":
                setting = setting_of(method, networks, batches, "product", *fastest, trick=name)
            turns = [product] if setting is product else [product, setting]
            measure.take_turns(turns, args.rounds, args.repeats)
            row = row_of(setting, product.seconds, networks, args.batch, tops)
            # Turned round: how much longer than the product it takes.
            yield {**row, "trick": name, **measure.ratio(setting.seconds, product.seconds)}
        except Exception as error:  # the other tricks are still measured
            yield {"setting": name, "error": " ".join(str(error).split())[:300]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, with the defaults that depend on the device."""
    parser = cli.Parser(prog="python -m benchmarks.training_step", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="scripts to time")
    add("--teacher", default="DM-WRN-28-10", help="DM-WRN-d-w, WRN-d-w or another name of cifar100_models")
    add("--student", default="RES-18", help="name of cifar100_models")
    add("--batch", type=cli.whole(2), default=128, help="images per step")
    add("--precisions", nargs="+", choices=("fp32", "tf32", "bf16"), help="default fp32 on the CPU, all on CUDA")
    add("--compile", nargs="+", type=int, choices=(0, 1), help="0, 1 or both; default 0 on the CPU, both on CUDA")
    add("--teacher_every", nargs="*", type=cli.whole(2), default=[], help="also time AdaAD's step at these values")
    add("--repeats", type=cli.positive_int, help="steps per turn; default 1 on the CPU, 4 on CUDA")
    add("--profile", type=int, choices=(0, 1), default=0, help="profile the last method at the last setting")
    add("--tricks", nargs="*", choices=("all", *TRICKS), default=[], help="time these at the last setting")
    args = report.parse_args(parser, argv)
    cuda = args.device.startswith("cuda")
    args.precisions = args.precisions or (["fp32", "tf32", "bf16"] if cuda else ["fp32"])
    args.compile = args.compile or ([0, 1] if cuda else [0])
    args.repeats = args.repeats or (4 if cuda else 1)
    args.tricks = list(TRICKS) if "all" in args.tricks else args.tricks
    return args


def main() -> None:
    """Measure, write, print."""
    args = parse_args()
    device = torch.device(args.device)
    networks = workload.make_network(args.student, device, 0), workload.make_network(args.teacher, device, 1)
    method = args.methods[-1] if args.methods else METHODS[-1]
    rates = list(dict.fromkeys(["fp32", *(["tf32"] if device.type == "cuda" else []), *args.precisions]))
    tops = measure.ceilings(device, rates)
    line = f"{args.teacher} → {args.student}, batch {args.batch}, {args.rounds} rounds of {args.repeats} steps:"
    found = report.Report("training_step", args, device, line)
    found.add("ceilings", tops)
    for name in args.methods:
        found.add("rows", method_rows(name, networks, tops, args))
        print(f"{name}: measured", file=sys.stderr, flush=True)
    fastest = (args.precisions[-1], args.compile[-1])
    if args.profile:
        batches = workload.make_batches(args.batch, args.device)
        found.add("profile", measure.profile_rows(setting_of(method, networks, batches, "product", *fastest)))
    if args.tricks:
        found.add("tricks", trick_rows(method, networks, tops, args))
    found.show()


if __name__ == "__main__":
    cli.guard(main)
