"""What the benchmarks share: interleaved timing, machine ceilings, counted operations, the report.

Machines are noisy and change speed while they are measured. Therefore what is compared runs in turns in one process,
in alternating order; medians are compared, with quartiles as spread, and ratios are taken round by round.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cifar100_models import build_model
from experiment import UserError, cli
from experiment.engine import Engine
from experiment.files import write_atomically, write_json
from experiment.run import provenance

FORMAT = 1
CLASSES, SIDE = 100, 32
"""CIFAR-100's; time does not depend on what the pixels show."""


@dataclass(frozen=True)
class Numerics:
    """The process-wide switches that a setting runs under; each setting puts its own back before its turn."""

    matmul_tf32: bool
    convolution_tf32: bool
    choose_kernels: bool

    @classmethod
    def current(cls) -> "Numerics":
        """Those of the process at this moment."""
        backends = torch.backends
        return cls(backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark)

    def apply(self) -> None:
        """Make them those of the process."""
        torch.backends.cuda.matmul.allow_tf32 = self.matmul_tf32
        torch.backends.cudnn.allow_tf32 = self.convolution_tf32
        torch.backends.cudnn.benchmark = self.choose_kernels


RESEARCH_CODE = Numerics(matmul_tf32=False, convolution_tf32=True, choose_kernels=True)
"""The framework's defaults, but for cuDNN's choice of kernels by trial, which is off there: it speeds the baseline."""


class Setting:
    """One of several things to time: a function to call, the switches it runs under, and the memory it holds."""

    def __init__(self, fields: dict[str, Any], device: torch.device, build: Callable[[], Callable[[], object]]) -> None:
        """Build it and let it run, so that compilation, kernel choice and first allocations are over.

        Args:
            fields: what names it in the report.
            device: where it runs.
            build: returns the function to time; leaves the process with the switches that it is to run under.
        """
        self.fields, self.device = fields, device
        before = self._allocated()
        self.run = build()
        self.numerics = Numerics.current()
        for _ in range(2 if fields.get("compile") else 1):  # a second call may compile another variant
            self.run()
        # Weights, optimizer state and gradients stay between turns; those of the other settings do not count.
        self._resident = self._allocated() - before
        self.seconds: list[float] = []
        self.peak_bytes = 0

    def _allocated(self) -> int:
        synchronize(self.device)
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def turn(self, repeats: int) -> None:
        """Time `repeats` calls in a row, which may overlap on a GPU, and note the peak of memory."""
        self.numerics.apply()
        before = self._allocated()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.seconds.append(seconds_of(lambda: [self.run() for _ in range(repeats)], self.device) / repeats)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - before + self._resident
            self.peak_bytes = max(self.peak_bytes, peak)


def take_turns(settings: Sequence[Setting], rounds: int, repeats: int = 1) -> None:
    """Time all settings `rounds` times, in alternating order: drift of the machine hits all alike."""
    for i in range(rounds):
        for setting in settings if i % 2 == 0 else reversed(settings):
            setting.turn(repeats)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def median_and_quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def speed(images: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Images per second for the report: median, quartiles, and the seconds they are made of."""
    middle, low, high = median_and_quartiles(seconds)
    return {
        "images_per_second": images / middle,
        "images_per_second_quartiles": [images / high, images / low],
        "seconds": list(seconds),
    }


def ratio(baseline: Sequence[float], seconds: Sequence[float]) -> dict[str, Any]:
    """How much faster than the baseline: ratio of the medians, and the quartiles of the rounds' ratios."""
    _, low, high = median_and_quartiles([b / s for b, s in zip(baseline, seconds, strict=True)])
    return {
        "ratio": statistics.median(baseline) / statistics.median(seconds),
        "ratio_quartiles": [low, high],
    }


# The machine ------------------------------------------------------------------------------------------------------


def ceilings(device: torch.device, precisions: Sequence[str], rounds: int = 7) -> dict[str, Any]:
    """What the machine reaches at best: large matrix products, a large convolution, a large copy.

    Returns:
        ``matmul_tflops`` and ``convolution_tflops`` {precision: 10^12 floating-point operations per second}, and
        ``copy_gb_per_second`` (10^9 bytes read plus bytes written per second). Each is the best of the rounds: a
        ceiling is what the undisturbed machine does.
    """
    cuda = device.type == "cuda"
    size, images = (8192, 2048) if cuda else (2048, 64)
    found: dict[str, Any] = {"matmul_tflops": {}, "convolution_tflops": {}}
    for precision in precisions:
        Numerics(precision == "tf32", precision == "tf32", True).apply()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # Random numbers: zeros draw less power and run faster than real data.
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        x, weight = (
            torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
            for shape in ((images, 320, 16, 16), (320, 320, 3, 3))  # the middle stage of a WRN-28-10
        )
        repeats = 20 if cuda else 1
        best = best_seconds(partial(torch.mm, a, b), device, rounds, repeats)
        found["matmul_tflops"][precision] = 2 * size**3 / best / 1e12
        best = best_seconds(partial(F.conv2d, x, weight, padding=1), device, rounds, repeats)
        found["convolution_tflops"][precision] = 2 * 9 * 320 * x.numel() / best / 1e12
    source = torch.rand(2**28 if cuda else 2**25, device=device)  # far larger than any cache
    best = best_seconds(partial(torch.empty_like(source).copy_, source), device, rounds, 1)
    found["copy_gb_per_second"] = 2 * source.numel() * source.element_size() / best / 1e9
    return found


def best_seconds(run: Callable[[], object], device: torch.device, rounds: int, repeats: int) -> float:
    """The shortest of `rounds` turns of `repeats` calls, per call, after one turn to warm up."""

    def several() -> None:
        for _ in range(repeats):
            run()

    several()
    return min(seconds_of(several, device) for _ in range(rounds)) / repeats


def better(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The higher ceilings of two measurements, so that a disturbance during one of them does not count."""
    return {
        name: better(value, second[name]) if isinstance(value, dict) else max(value, second[name])
        for name, value in first.items()
    }


def peak(found: dict[str, Any], precision: str) -> float:
    """The ceiling to measure a step against: the faster of matrix product and convolution.

    They differ on CPUs, where two libraries compute them; on a GPU it is the matrix product.
    """
    return max(found["matmul_tflops"][precision], found["convolution_tflops"][precision])


def ceilings_line(found: dict[str, Any]) -> str:
    """The ceilings as the reports show them."""
    text = [
        f"{precision}: matrix product {found['matmul_tflops'][precision]:.3g}, "
        f"convolution {found['convolution_tflops'][precision]:.3g} TFLOP/s"
        for precision in found["matmul_tflops"]
    ]
    return f"ceilings measured in the same process: {'; '.join(text)}; copy {found['copy_gb_per_second']:.3g} GB/s"


class _FlopCounter(TorchDispatchMode):
    """torch.utils.flop_counter's formulas alone: its FlopCounterMode cannot follow torch.autograd.grad."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def count_flop(run: Callable[[], object]) -> int:
    """Floating-point operations of convolutions and matrix products in one call, forward and backward (2 per MAC)."""
    with _FlopCounter() as counter:
        run()
    return counter.total


def make_network(name: str, device: torch.device, seed: int) -> nn.Module:
    """A network with random weights, in eval mode, whose BatchNorm statistics fit its activations.

    With fresh statistics the logits of a deep network overflow its softmax, and gradients vanish or become NaN.
    """
    torch.manual_seed(seed)
    model = build_model(name, CLASSES)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.rand(4, 3, SIDE, SIDE))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval().to(device)


def make_batches(batch: int, device: torch.device, count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images in [0, 1] and labels; several batches, so that no cache holds what a step needs."""
    torch.manual_seed(0)
    return [
        (torch.rand(batch, 3, SIDE, SIDE).to(device), torch.randint(CLASSES, (batch,)).to(device)) for _ in range(count)
    ]


# The report -------------------------------------------------------------------------------------------------------


def output_file(text: str) -> Path:
    """A parser of paths to be written: makes the folder now, because minutes of measuring lie before the write."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from error
    return path


class _Insert(argparse.Action):
    """FILE and MARK, held to be there before anything is measured."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            split_at(Path(values[0]), values[1])
        except UserError as error:
            parser.error(f"argument {option}: {error}")
        setattr(namespace, self.dest, values)


def add_report_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every benchmark has."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=cli.positive_int, default=5, help="turns per setting")
    parser.add_argument("--out", type=output_file, help="write the figures to this JSON file")
    parser.add_argument(
        "--insert",
        nargs=2,
        action=_Insert,
        metavar=("FILE", "MARK"),
        help="replace what is between MARK's markers in a Markdown file",
    )


def hardware(device: torch.device) -> str:
    """Name of the GPU or CPU."""
    args = argparse.Namespace(device=str(device), precision="fp32", compile=0, batch=1, deterministic=0, seed=0)
    return Engine(args).hardware()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def spread(value: float, quartiles: Sequence[float], digits: int = 2) -> str:
    """A median with its quartiles, as the tables show it."""
    low, high = quartiles
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def report(name: str, args: argparse.Namespace, device: torch.device, figures: dict[str, Any], *tables: str) -> None:
    """Write the JSON file and the Markdown where asked, and print the tables, last of all.

    No date: two reports of one commit on one machine differ by noise only.
    """
    # Only what moves the figures: where they are written to does not.
    given = sys.argv[1:]
    for flag, values in (("--out", 1), ("--insert", 2)):
        if flag in given:
            at = given.index(flag)
            given = given[:at] + given[at + 1 + values :]
    origin, threads = provenance(Path(__file__)), os.environ.get("OMP_NUM_THREADS")
    about = {
        "benchmark": name,
        "command": (f"OMP_NUM_THREADS={threads} " if threads else "")
        + shlex.join(["python", "-m", f"benchmarks.{name}", *given]),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": origin["versions"]["python"],
        "commit": origin["commit"],
    }
    if args.out:
        write_json(args.out, {"format": FORMAT, **about, **figures})
    where = f"{about['hardware']}; torch {about['torch']}; commit {about['commit']}"
    text = "\n\n".join([f"`{about['command']}`  \n{where}", *tables])
    if args.insert:
        insert(Path(args.insert[0]), args.insert[1], text)
    print(f"\n{text}", flush=True)


def insert(path: Path, mark: str, text: str) -> None:
    """Put text between the lines ``<!-- begin MARK -->`` and ``<!-- end MARK -->`` of a file.

    Raises:
        UserError: the file does not have them.
    """
    before, after = split_at(path, mark)
    write_atomically(path, lambda file: file.write(f"{before}{text}\n{after}".encode()))


def split_at(path: Path, mark: str) -> tuple[str, str]:
    """A file's text up to and with MARK's begin line, and from its end line on.

    Raises:
        UserError: the file does not have them.
    """
    begin, end = f"<!-- begin {mark} -->\n", f"<!-- end {mark} -->"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{path} has no lines {begin.strip()!r} and {end!r} to write between")
    return before + begin, end + after
