"""Time one training step: research code's own order of passes against the product's, at each setting.

    python -m benchmarks.training_step --out runs/bench/training_step.json
    python -m benchmarks.training_step --methods adaad_IGDM --tricks all --profile 1
    python -m benchmarks.training_step --methods adaad_IGDM --batches 32 64 128 256 --gpus 1 2 4 8

Networks are the real architectures with random weights, images are random. For each method all settings take turns in
one process. Speeds are medians with quartiles over the rounds, a ratio is that of the medians. With --tricks the ratio
is the trick's median time over the product's: below 1, it pays. With --gpus, torchrun starts one process per GPU (on
the CPU: per number given, over gloo), and the batches are global ones, split over the processes.
"""

import argparse
import copy
import importlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import measure, operations, profiling, published, report
from benchmarks.tricks import TRICKS
from experiment import UserError, cli, optim
from experiment.data import Data
from experiment.engine import Engine
from experiment.files import read_json, write_json
from experiment.run import Run

METHODS = tuple(operations.PASSES)
EPOCH = 1
EPOCH_IMAGES = 50_000
"""CIFAR-100's training set: the data pipeline is timed on as many images."""
Networks = tuple[nn.Module, nn.Module]


class ProductStep:
    """The step of a method's script, exactly as its main() makes it, on given networks and batches.

    With --preset paper: its losses are those that the published step computes.
    """

    def __init__(
        self,
        method: str,
        networks: Networks,
        batches: list,
        precision: str,
        compiled: int,
        trick: str = "product",
        teacher_every: int = 1,
    ) -> None:
        """Args: method, the script's name without _cifar100; batches, (x, y) to go round; the rest is the engine's."""
        self.student, teacher = networks
        self.script = importlib.import_module(f"{method}_cifar100")
        device, size = str(batches[0][0].device), len(batches[0][0])
        flags = {"preset": "paper", "device": device, "batch": size, "precision": precision, "compile": compiled}
        if teacher_every > 1:
            flags["teacher_every"] = teacher_every
        argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        self.args = cli.parse_args(self.script.__file__, self.script.RECIPE, argv)
        measure.RESEARCH_CODE.apply()  # a trick's switch must not outlive it; the engine sets what it needs
        self.engine = Engine(self.args)
        self.optimizer = optim.sgd(self.student, self.args)
        self.engine.distribute(self.student, self.optimizer)
        optim.set_lr(self.optimizer, self.args, EPOCH)
        self.fast_student, self.fast_teacher = self.engine.accelerate(self.student), self.engine.accelerate(teacher)
        TRICKS[trick](self)
        self._batches = itertools.cycle(batches)

    def __call__(self) -> dict[str, torch.Tensor]:
        """One optimizer step on the next batch; the terms of its loss."""
        x, y = next(self._batches)
        return self.step(x, y, 0, len(x))

    def step(self, x: torch.Tensor, y: torch.Tensor, first: int, total: int) -> dict[str, torch.Tensor]:
        """One optimizer step on these rows of the global batch."""
        self.student.train()
        self.engine.begin_batch(first, len(x), total)
        with self.engine.step():
            terms = self.script.training_loss(self.fast_student, self.fast_teacher, x, y, EPOCH, self.args)
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        self.optimizer.step()
        return terms


def published_step(method: str, networks: Networks, batches: list) -> Callable[[], float]:
    """The published step on these networks and batches, ready to be called."""
    measure.RESEARCH_CODE.apply()
    student, teacher = networks
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    rounds = itertools.cycle(batches)
    return lambda: published.training_step(method, student, teacher, optimizer, *next(rounds))


def setting_of(
    method: str,
    networks: Networks,
    batches: list,
    kind: str,
    precision: str,
    compiled: int,
    trick: str = "product",
    teacher_every: int = 1,
) -> measure.Setting:
    """A step that is ready to be timed, on copies of the networks."""

    def build() -> Callable[[], object]:
        copies = copy.deepcopy(networks)
        if kind == "published":
            return published_step(method, copies, batches)
        return ProductStep(method, copies, batches, precision, compiled, trick, teacher_every)

    fields = {"method": method, "step": kind, "precision": precision, "compile": compiled}
    if teacher_every > 1:
        fields["teacher_every"] = teacher_every
    return measure.Setting(fields, batches[0][0].device, build)


def row_of(
    setting: measure.Setting, baseline: Sequence[float], networks: Networks, batch: int, tops: list[dict[str, Any]]
) -> dict[str, Any]:
    """A timed setting's figures; the ratio is the baseline's seconds over its own."""
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
    method: str, networks: Networks, tops: list, device: torch.device, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], measure.Setting]:
    """All settings of one method in turns: their rows, and the product's fastest."""
    torch.compiler.reset()  # a limited number of compiled variants is kept per forward: make room for these
    batches = measure.make_batches(args.batch, device)
    kinds = [("published", "fp32", 0), *(("product", p, c) for p in args.precisions for c in args.compile)]
    settings = [setting_of(method, networks, batches, *kind) for kind in kinds]
    if method.startswith("adaad"):
        fastest = (args.precisions[-1], args.compile[-1])
        settings += [
            setting_of(method, networks, batches, "product", *fastest, teacher_every=every)
            for every in args.teacher_every
        ]
    measure.take_turns(settings, args.rounds, args.repeats)
    rows = [row_of(setting, settings[0].seconds, networks, args.batch, tops) for setting in settings]
    return rows, min(settings[1:], key=lambda setting: min(setting.seconds))


def trick_rows(
    method: str, networks: Networks, tops: list, device: torch.device, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Return a row per trick, alternating with the unchanged step; the row of a failing trick has its error."""
    batches = measure.make_batches(args.batch, device)
    precision, compiled = args.precisions[-1], args.compile[-1]
    torch.compiler.reset()
    # Each setting compiles variants of the same functions; past the limit they would run eagerly, without a word.
    torch._dynamo.config.recompile_limit = 8 * (len(TRICKS) + 1)
    product = setting_of(method, networks, batches, "product", precision, compiled)
    for name in args.tricks:
        try:
            product.seconds.clear()
            setting = product
            if name != "product":
                setting = setting_of(method, networks, batches, "product", precision, compiled, name)
            turns = [product] if setting is product else [product, setting]
            measure.take_turns(turns, args.rounds, args.repeats)
            row = row_of(setting, product.seconds, networks, args.batch, tops)
            # Turned round: how much longer than the product it takes.
            yield {**row, "trick": name, **measure.ratio(setting.seconds, product.seconds)}
        except Exception as error:  # a trick that does not work must not take the others' figures with it
            yield {"setting": name, "error": " ".join(str(error).split())[:300]}


def operation_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Operations per image by teacher and method, published order and product, counted from passes and layers."""
    student, rows = measure.make_network(args.student, torch.device("cpu"), 0), []
    for name in args.count:
        teacher = measure.make_network(name, torch.device("cpu"), 1)
        gmac = operations.gflop_of_passes(teacher)[0] / 2
        for method in METHODS:
            fields = {"teacher": name, "student": args.student, "method": method, "teacher_gmac": gmac}
            rows.append(fields | operations.gflop_of_step(method, (student, teacher)))
    return rows


# How the step grows, and what is not the step -----------------------------------------------------------------------


def batch_row(
    batch: int, networks: Networks, method: str, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """Images per second at one global batch; under torchrun, this process runs its own share of it."""
    torch.compiler.reset()
    ((x, y),) = measure.make_batches(batch, device, 1)
    step = ProductStep(method, copy.deepcopy(networks), [(x, y)], args.precisions[-1], args.compile[-1])
    rank, world = step.engine.rank, step.engine.world
    begin, end = batch * rank // world, batch * (rank + 1) // world
    x, y = x[begin:end], y[begin:end]
    fields = {"processes": world, "batch": batch, "precision": args.precisions[-1], "compile": args.compile[-1]}
    setting = measure.Setting(fields, device, lambda: lambda: step.step(x, y, begin, batch))
    measure.take_turns([setting], args.rounds, args.repeats)
    return {**fields, **measure.speed(batch, setting.seconds), "peak_memory_gib": setting.peak_gib}


def spawn(processes: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """batch_row in processes that torchrun starts.

    Raises:
        UserError: they failed; their own message is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "benchmarks.training_step", "--batches", str(batch), "--out", str(out)]
        # The kind of device only: each process takes the GPU of its rank.
        command += ["--device", args.device.partition(":")[0], "--methods", args.methods[-1]]
        command += ["--precisions", args.precisions[-1], "--compile", str(args.compile[-1])]
        for name in ("teacher", "student", "rounds", "repeats"):
            command += [f"--{name}", str(getattr(args, name))]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"--gpus {processes}: torchrun failed, see above")
        return read_json(out)


def overhead_rows(step: ProductStep, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per step of the step itself, of the data pipeline alone and of the logging alone."""
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
        run = Run(
            cli.parse_args(step.script.__file__, step.script.RECIPE, argv), step.script.__file__, step.script.RECIPE
        )

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
    add("--profile", type=int, choices=(0, 1), default=0, help="profile the last method's fastest setting")
    add(
        "--tricks", nargs="*", choices=("all", *TRICKS), default=[], help="time these at the last precision and compile"
    )
    add("--count", nargs="*", default=[], metavar="TEACHER", help="teachers whose steps' operations are counted")
    add("--overhead", type=int, choices=(0, 1), default=0, help="time data pipeline and logging beside the step")
    add("--batches", nargs="*", type=cli.whole(2), default=[], help="global batches to time, for the last method")
    add("--gpus", nargs="+", type=cli.positive_int, default=[1], help="numbers of processes to time them with")
    args = parser.parse_args(argv)
    args.device = cli.resolve_device(parser, args.device)
    cuda = args.device.startswith("cuda")
    args.precisions = args.precisions or (["fp32", "tf32", "bf16"] if cuda else ["fp32"])
    args.compile = args.compile or ([0, 1] if cuda else [0])
    args.repeats = args.repeats or (4 if cuda else 1)
    args.tricks = list(TRICKS) if "all" in args.tricks else args.tricks
    if cuda and max(args.gpus) > torch.cuda.device_count():
        parser.error(f"argument --gpus: {max(args.gpus)} is not allowed; torch sees {torch.cuda.device_count()}")
    return args


def main() -> None:
    """Measure, write, print; a process of torchrun measures its share of one batch, and rank 0 writes the row."""
    args = parse_args()
    worker, device = "LOCAL_RANK" in os.environ, torch.device(args.device)
    if worker and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    networks = tuple(measure.make_network(name, device, i) for i, name in enumerate((args.student, args.teacher)))
    if worker:
        row = batch_row(args.batches[0], networks, args.methods[-1], device, args)
        if dist.get_rank() == 0:
            write_json(args.out, row)
        return
    method = args.methods[-1] if args.methods else METHODS[-1]
    rates = list(dict.fromkeys(["fp32", *(["tf32"] if device.type == "cuda" else []), *args.precisions]))
    tops = measure.ceilings(device, rates)
    found: dict[str, Any] = {"ceilings": tops, "rows": []}
    for name in args.methods:
        rows, best = method_rows(name, networks, tops, device, args)
        found["rows"] += rows
        print(f"{name}: measured", file=sys.stderr, flush=True)
    if args.profile and args.methods:
        found["profile"] = profiling.profile_rows(best)
    if args.tricks:
        found["tricks"] = list(trick_rows(method, networks, tops, device, args))
    if args.batches:
        found["batches"] = [
            spawn(n, batch, args) if n > 1 else batch_row(batch, networks, method, device, args)
            for n in args.gpus
            for batch in args.batches
        ]
    if args.overhead:
        batches = measure.make_batches(args.batch, device)
        step = ProductStep(method, copy.deepcopy(networks), batches, args.precisions[-1], args.compile[-1])
        found["overhead"] = overhead_rows(step, device, args)
    if args.count:
        found["operations"] = operation_rows(args)
    line = f"{args.teacher} → {args.student}, batch {args.batch}, {args.rounds} rounds of {args.repeats} steps:"
    report.report("training_step", args, device, {"line": line, **found})


if __name__ == "__main__":
    cli.guard(main)
