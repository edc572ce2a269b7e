"""How the cost of training grows: with the batch, the data, the teacher and the GPUs; what data and logging take of it.

    python -m benchmarks.scaling --out runs/bench/scaling.json
    python -m benchmarks.scaling --gpus 1 2 4 8

The product's step on random weights and images. With --gpus, torchrun starts one process per GPU (on the CPU: per
number given, over gloo) and the batches are global ones, split over the processes.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import measure
from benchmarks.training_step import METHODS, ProductStep, gflop_by_passes, gflop_of_passes
from experiment import UserError, cli
from experiment.data import Data
from experiment.files import read_json
from experiment.run import Run

EPOCH_IMAGES = 50_000
"""CIFAR-100's training set: the data pipeline is timed on as many images."""


def random_data(images: int, device: torch.device) -> Data:
    """A data set of random pixels with CIFAR's shape, padding and flips."""
    torch.manual_seed(0)
    x = torch.randint(256, (images, 3, measure.SIDE, measure.SIDE), dtype=torch.uint8).to(device)
    y = torch.randint(measure.CLASSES, (images,)).to(device)
    return Data(
        name="random", x_train=x, y_train=y, x_test=x[:1], y_test=y[:1], num_classes=measure.CLASSES, pad=4, flip=True,
        sha256="",
    )  # fmt: skip


def make_step(networks: tuple[nn.Module, nn.Module], batches: list, args: argparse.Namespace) -> ProductStep:
    """The product's step on copies of the networks."""
    student, teacher = copy.deepcopy(networks)
    return ProductStep(args.method, student, teacher, batches, args.precision, args.compile)


def batch_row(
    batch: int, networks: tuple[nn.Module, nn.Module], device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """Images per second at one global batch; under torchrun, this process runs its own share of it."""
    torch.compiler.reset()
    ((x, y),) = measure.make_batches(batch, device, 1)
    step = make_step(networks, [(x, y)], args)
    rank, world = step.engine.rank, step.engine.world
    begin, end = batch * rank // world, batch * (rank + 1) // world
    x, y = x[begin:end], y[begin:end]
    fields = {"processes": world, "batch": batch, "precision": args.precision, "compile": args.compile}
    setting = measure.Setting(fields, device, lambda: lambda: step.step(x, y, begin, batch))
    measure.take_turns([setting], args.rounds, args.repeats)
    memory = setting.peak_bytes / 2**30 if device.type == "cuda" else None
    return {**fields, **measure.speed(batch, setting.seconds), "peak_memory_gib": memory}


def epoch_rows(
    networks: tuple[nn.Module, nn.Module], device: torch.device, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Seconds of whole epochs, data pipeline included, by number of training images."""
    rows = []
    for images in args.images:
        data = random_data(images, device)
        step = make_step(networks, measure.make_batches(args.batch, device, 1), args)
        step()

        def epoch(data: Data = data, step: ProductStep = step) -> None:
            for x, y, first, total in data.batches(args.batch, 0, 1):
                step.step(x, y, first, total)

        seconds = measure.seconds_of(epoch, device)
        rows.append({"images": images, "seconds": seconds, "seconds_per_image": seconds / images})
    return rows


def overhead(networks: tuple[nn.Module, nn.Module], device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of the step itself, of the data pipeline alone and of the logging alone."""
    step = make_step(networks, measure.make_batches(args.batch, device), args)
    setting = measure.Setting({"compile": args.compile}, device, lambda: step)
    measure.take_turns([setting], args.rounds, args.repeats)
    data = random_data(EPOCH_IMAGES, device)

    def pipeline() -> None:
        for _ in data.batches(args.batch, 0, 1):
            pass

    pipeline()
    found = {"step": measure.median_and_quartiles(setting.seconds)[0]}
    times = [measure.seconds_of(pipeline, device) for _ in range(args.rounds)]
    found["data"] = measure.median_and_quartiles(times)[0] / data.steps(args.batch)
    terms, steps = step(), 200
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--dataset", "digits", "--run_dir", folder, "--device", str(device)]
        flags = cli.parse_args(step.script.__file__, step.script.RECIPE, argv)
        run = Run(flags, step.script.__file__, step.script.RECIPE)

        def log() -> None:
            for _ in range(steps):
                run.count(terms)

        log()
        times = [measure.seconds_of(log, device) for _ in range(args.rounds)]
    found["logging"] = measure.median_and_quartiles(times)[0] / steps
    return found


def teacher_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Operations per image by teacher and method, published order and product; counted on the CPU."""
    cpu, rows = torch.device("cpu"), []
    student = gflop_of_passes(measure.make_network(args.student, cpu, 0))
    for name in args.teachers:
        teacher = gflop_of_passes(measure.make_network(name, cpu, 1))
        gflop = {}
        for method in METHODS:
            published, product = gflop_by_passes(method, student, teacher)
            gflop[method] = {"published": published, "product": product}
        rows.append({"teacher": name, "teacher_gmac": teacher[0] / 2, "gflop": gflop})
    return rows


def spawn(processes: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """batch_row in processes that torchrun starts.

    Raises:
        UserError: they failed; their own message is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "benchmarks.scaling", "--batches", str(batch), "--out", str(out)]
        # The kind of device only: each process takes the GPU of its rank.
        command += ["--device", args.device.partition(":")[0]]
        for name in ("method", "teacher", "student", "precision", "compile", "rounds", "repeats"):
            command += [f"--{name}", str(getattr(args, name))]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"--gpus {processes}: torchrun failed, see above")
        return read_json(out)


def tables(found: dict[str, Any]) -> list[str]:
    """The Markdown tables."""
    made = []
    if "batches" in found:
        body = [
            [
                row["processes"],
                row["batch"],
                measure.spread(row["images_per_second"], row["images_per_second_quartiles"]),
                "-" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.2f}",
            ]
            for row in found["batches"]
        ]
        made.append(measure.table(["processes", "global batch", "images/s (quartiles)", "peak memory, GiB"], body))
    if "epochs" in found:
        body = [[r["images"], f"{r['seconds']:.2f}", f"{1e3 * r['seconds_per_image']:.2f}"] for r in found["epochs"]]
        made.append(measure.table(["training images", "s/epoch", "ms/image"], body))
    if "overhead" in found:
        parts = found["overhead"]
        body = [[n, f"{1e3 * s:.3f}", f"{100 * s / parts['step']:.3f} %"] for n, s in parts.items()]
        made.append(measure.table(["part", "ms/step", "of the step"], body))
    if "teachers" in found:
        body = [
            [
                row["teacher"],
                f"{row['teacher_gmac']:.3f}",
                *(f"{g['published']:.1f} → {g['product']:.1f}" for g in row["gflop"].values()),
            ]
            for row in found["teachers"]
        ]
        made.append(measure.table(["GFLOP/image, published → product", "GMAC/forward", *METHODS], body))
    return made


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = cli.Parser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    measure.add_report_flags(parser)
    parser.add_argument("--method", choices=METHODS, default="adaad_IGDM", help="script whose step is timed")
    parser.add_argument("--teacher", default="WRN-28-10", help="WRN-d-w or another name of cifar100_models")
    parser.add_argument("--student", default="RES-18", help="name of cifar100_models")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="default fp32 on the CPU, tf32 on CUDA")
    parser.add_argument("--compile", type=int, choices=(0, 1), default=0, help="torch.compile the networks")
    parser.add_argument("--repeats", type=cli.positive_int, help="steps per turn; default 1 on the CPU, 4 on CUDA")
    parser.add_argument(
        "--batches", nargs="*", type=cli.whole(2), default=[32, 64, 128, 256, 512, 1024], help="batches to time"
    )
    parser.add_argument("--batch", type=cli.whole(2), default=128, help="batch of the epochs and of the overhead")
    parser.add_argument(
        "--images", nargs="*", type=cli.whole(2), default=[5_000, 10_000, 20_000], help="sizes of the epochs to time"
    )
    parser.add_argument("--teachers", nargs="*", default=[], help="teachers whose operations are counted, on the CPU")
    parser.add_argument("--gpus", nargs="+", type=cli.positive_int, default=[1], help="numbers of processes to time")
    args = parser.parse_args(argv)
    args.device = cli.resolve_device(parser, args.device)
    cuda = args.device.startswith("cuda")
    args.precision = args.precision or ("tf32" if cuda else "fp32")
    args.repeats = args.repeats or (4 if cuda else 1)
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
        row = batch_row(args.batches[0], networks, device, args)
        if dist.get_rank() == 0:
            measure.write_json(args.out, row)
        return
    found: dict[str, Any] = {}
    if args.batches:
        found["batches"] = [
            spawn(n, batch, args) if n > 1 else batch_row(batch, networks, device, args)
            for n in args.gpus
            for batch in args.batches
        ]
    if args.images:
        found["epochs"] = epoch_rows(networks, device, args)
    found["overhead"] = overhead(networks, device, args)
    if args.teachers:
        found["teachers"] = teacher_rows(args)
    names = ("method", "teacher", "student", "precision", "compile", "batch", "rounds", "repeats")
    line = f"{args.method}, {args.teacher} → {args.student}, {args.precision}, compile {args.compile}; "
    line += f"epochs and shares at batch {args.batch}, {args.rounds} rounds:"
    settings = {name: getattr(args, name) for name in names}
    measure.report("scaling", args, device, {**settings, **found}, line, *tables(found))


if __name__ == "__main__":
    cli.guard(main)
