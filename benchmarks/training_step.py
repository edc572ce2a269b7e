"""Time one training step of this project against the published order of passes, at each setting.

    python -m benchmarks.training_step --out runs/bench/training_step.json
    python -m benchmarks.training_step --methods adaad_IGDM --tricks all --profile 1

Networks are the real architectures with random weights, images are random. Each setting takes turns with the published
order in one process. Speeds are medians with quartiles over the rounds, a ratio is that of the medians. With --tricks
the ratio is the median time without the trick over the product's: above 1, the trick pays.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import measure, operations, report
from benchmarks.product import TRICKS, Networks, ProductStep, setting_of
from experiment import cli
from experiment.data import Data
from experiment.run import Run

METHODS = tuple(operations.PASSES)
EPOCH_IMAGES = 50_000
"""Size of CIFAR-100's training set, for timing the data pipeline."""
Row = dict[str, Any]


def row_of(setting: measure.Setting, baseline: Sequence[float], networks: Networks, batch: int, tops: list[Row]) -> Row:
    """The row of a timed setting; the ratio is the baseline's seconds divided by the setting's."""
    setting.check_finite()
    row = {**setting.fields, **measure.speed(batch, setting.seconds), **measure.ratio(baseline, setting.seconds)}
    counted = operations.gflop_of_step(row["method"], networks, row.get("teacher_every", 1))
    row["gflop_per_image"] = counted[row["step"]]
    row["tflops"] = row["gflop_per_image"] * row["images_per_second"] / 1e3
    # Convolutions of the published step run in TF32 on CUDA: the framework's default.
    rate = "tf32" if row["step"] == "published" and setting.device.type == "cuda" else row["precision"]
    row["share_of_peak"] = row["tflops"] / measure.peak(tops, rate)
    return {**row, "peak_memory_gib": setting.peak_gib}


def method_rows(
    method: str, networks: Networks, tops: list[Row], device: torch.device, args: argparse.Namespace
) -> Iterator[Row]:
    """A row per setting of one method. Settings alternate with the published step, whose row is first."""
    torch.compiler.reset()  # a limited number of compiled variants is kept per forward: make room for these
    batches = measure.make_batches(args.batch, device)
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


def trick_rows(
    method: str, networks: Networks, tops: list[Row], device: torch.device, args: argparse.Namespace
) -> Iterator[Row]:
    """Return a row per trick, alternating with the unchanged step; the row of a failing trick has its error."""
    batches = measure.make_batches(args.batch, device)
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


def operation_rows(args: argparse.Namespace) -> list[Row]:
    """Operations per image by teacher and method, published order and product, counted from passes and layers."""
    student, rows = measure.make_network(args.student, torch.device("cpu"), 0), []
    for name in args.count:
        teacher = measure.make_network(name, torch.device("cpu"), 1)
        gmac = operations.gflop_of_passes(teacher)[0] / 2
        for method in METHODS:
            fields = {"teacher": name, "student": args.student, "method": method, "teacher_gmac": gmac}
            rows.append(fields | operations.gflop_of_step(method, (student, teacher)))
    return rows


def batch_rows(method: str, networks: Networks, device: torch.device, args: argparse.Namespace) -> Iterator[Row]:
    """Images per second by batch size."""
    for batch in args.batches:
        torch.compiler.reset()
        batches = measure.make_batches(batch, device, 1)
        setting = setting_of(method, networks, batches, "product", args.precisions[-1], args.compile[-1])
        measure.take_turns([setting], args.rounds, args.repeats)
        yield {"batch": batch, **measure.speed(batch, setting.seconds), "peak_memory_gib": setting.peak_gib}


def overhead_rows(method: str, networks: Networks, device: torch.device, args: argparse.Namespace) -> list[Row]:
    """Seconds per step of the step itself, of the data pipeline alone and of the logging alone."""
    flags = ["--precision", args.precisions[-1], "--compile", str(args.compile[-1])]
    step = ProductStep(method, networks, measure.make_batches(args.batch, device), *flags)
    setting = measure.Setting({}, device, lambda: step)
    measure.take_turns([setting], args.rounds, args.repeats)
    x = torch.randint(256, (EPOCH_IMAGES, 3, measure.SIDE, measure.SIDE), dtype=torch.uint8).to(device)
    y = torch.randint(measure.CLASSES, (EPOCH_IMAGES,)).to(device)
    images = Data(
        name="random", x_train=x, y_train=y, x_test=x[:1], y_test=y[:1], num_classes=measure.CLASSES, pad=4, flip=True,
        sha256="",
    )  # fmt: skip
    steps, terms = images.steps(args.batch), step()

    def pipeline() -> None:
        for _ in images.batches(args.batch, 0, 1):
            pass

    with tempfile.TemporaryDirectory() as folder:
        argv = ["--dataset", "digits", "--run_dir", folder, "--device", str(device), "--aa_examples", "0"]
        script = step.script
        run = Run(cli.parse_args(script.__file__, script.RECIPE, argv), script.__file__, script.RECIPE)

        def log() -> None:
            for _ in range(steps):
                run.count(terms)

        seconds = {"step": measure.median_and_quartiles(setting.seconds)[0]}
        for part, work in (("data", pipeline), ("logging", log)):
            work()
            times = [measure.seconds_of(work, device) for _ in range(args.rounds)]
            seconds[part] = measure.median_and_quartiles(times)[0] / steps
    return [{"part": part, "seconds": value, "share": value / seconds["step"]} for part, value in seconds.items()]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, with the defaults that depend on the device."""
    parser = cli.Parser(prog="python -m benchmarks.training_step", description=__doc__.partition("\n")[0])
    report.add_flags(parser)
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
    add(
        "--tricks", nargs="*", choices=("all", *TRICKS), default=[], help="time these at the last precision and compile"
    )
    add("--count", nargs="*", default=[], metavar="TEACHER", help="teachers whose steps' operations are counted")
    add("--overhead", type=int, choices=(0, 1), default=0, help="time data pipeline and logging beside the step")
    add("--batches", nargs="*", type=cli.whole(2), default=[], help="batches to time, for the last method")
    args = parser.parse_args(argv)
    args.device = cli.resolve_device(parser, args.device)
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
    networks = measure.make_networks(args.student, args.teacher, device)
    method = args.methods[-1] if args.methods else METHODS[-1]
    rates = list(dict.fromkeys(["fp32", *(["tf32"] if device.type == "cuda" else []), *args.precisions]))
    tops = measure.ceilings(device, rates)
    line = f"{args.teacher} → {args.student}, batch {args.batch}, {args.rounds} rounds of {args.repeats} steps:"
    found = report.Report("training_step", args, device, line)
    found.add("ceilings", tops)
    for name in args.methods:
        found.add("rows", method_rows(name, networks, tops, device, args))
        print(f"{name}: measured", file=sys.stderr, flush=True)
    fastest = (args.precisions[-1], args.compile[-1])
    if args.profile:
        batches = measure.make_batches(args.batch, device)
        found.add("profile", measure.profile_rows(setting_of(method, networks, batches, "product", *fastest)))
    found.add("tricks", trick_rows(method, networks, tops, device, args))
    found.add("batches", batch_rows(method, networks, device, args))
    if args.overhead:
        found.add("overhead", overhead_rows(method, networks, device, args))
    found.add("operations", operation_rows(args))
    found.show()


if __name__ == "__main__":
    cli.guard(main)
