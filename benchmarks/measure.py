"""What the benchmarks share: interleaved timing, machine ceilings, networks and batches.

The speed of a machine drifts. Settings that are compared therefore alternate in one process. Reported are medians with
quartiles, and ratios of each round.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import dm_wide_resnet
from cifar100_models import build_model
from experiment import UserError

DM = "DM-WRN-"
CLASSES, SIDE = 100, 32
"""As CIFAR-100 has; the time does not depend on the pixels."""


@dataclass(frozen=True)
class Numerics:
    """Global settings of torch under which a benchmark setting runs; restored before each of its turns."""

    matmul_tf32: bool
    convolution_tf32: bool
    choose_kernels: bool

    @classmethod
    def current(cls) -> "Numerics":
        """The current values."""
        cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
        return cls(cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark)

    def apply(self) -> None:
        """Set these values."""
        torch.backends.cuda.matmul.allow_tf32 = self.matmul_tf32
        torch.backends.cudnn.allow_tf32 = self.convolution_tf32
        torch.backends.cudnn.benchmark = self.choose_kernels


RESEARCH_CODE = Numerics(matmul_tf32=False, convolution_tf32=True, choose_kernels=True)
"""The framework's defaults, except cudnn.benchmark, which is on and speeds up the baseline."""


class Setting:
    """A function to time, the global settings it runs under, and its peak memory."""

    def __init__(self, fields: dict[str, Any], device: torch.device, build: Callable[[], Callable[[], object]]) -> None:
        """Build and warm up.

        Args:
            fields: identify the setting in the report.
            build: sets the global settings and returns the function to time.
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
        self.result: object = None

    def _allocated(self) -> int:
        synchronize(self.device)
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def turn(self, repeats: int) -> None:
        """Time `repeats` consecutive calls, which may overlap on a GPU, and record the peak memory."""
        self.numerics.apply()
        before = self._allocated()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.seconds.append(seconds_of(lambda: self._runs(repeats), self.device) / repeats)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - before + self._resident
            self.peak_bytes = max(self.peak_bytes, peak)

    def _runs(self, repeats: int) -> None:
        for _ in range(repeats):
            self.result = self.run()

    def check_finite(self) -> None:
        """Raise UserError unless the last timed call returned finite numbers."""
        values = self.result.values() if isinstance(self.result, dict) else [self.result]
        if not all(torch.as_tensor(value).isfinite().all() for value in values):
            raise UserError(f"{self.fields}: the loss is not finite; the measured times are not valid")

    @property
    def peak_gib(self) -> float | None:
        """Peak memory of a turn in GiB; None on the CPU."""
        return self.peak_bytes / 2**30 if self.device.type == "cuda" else None


def take_turns(settings: Sequence[Setting], rounds: int, repeats: int = 1) -> None:
    """Time all settings `rounds` times in alternating order, so that drift affects all of them."""
    for i in range(rounds):
        for setting in settings if i % 2 == 0 else reversed(settings):
            setting.turn(repeats)


def synchronize(device: torch.device) -> None:
    """Wait for all kernels of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, including the device's work."""
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
    """Images per second: median and quartiles, with the measured seconds."""
    middle, low, high = median_and_quartiles(seconds)
    return {
        "images_per_second": images / middle,
        "images_per_second_quartiles": [images / high, images / low],
        "seconds": list(seconds),
    }


def ratio(baseline: Sequence[float], seconds: Sequence[float]) -> dict[str, Any]:
    """Speed relative to the baseline: ratio of the medians, and quartiles of the ratios of each round."""
    _, low, high = median_and_quartiles([b / s for b, s in zip(baseline, seconds, strict=True)])
    return {"ratio": statistics.median(baseline) / statistics.median(seconds), "ratio_quartiles": [low, high]}


def ceilings(device: torch.device, precisions: Sequence[str], rounds: int = 7) -> list[dict[str, Any]]:
    """A row per precision: the highest rates of large matrix products, a large convolution and a large copy.

    10^12 floating-point operations per second; 10^9 bytes read plus bytes written per second.
    """
    cuda = device.type == "cuda"
    size, images = (8192, 2048) if cuda else (2048, 64)
    source = torch.rand(2**28 if cuda else 2**25, device=device)  # far larger than any cache
    best = best_seconds(partial(torch.empty_like(source).copy_, source), device, rounds, 1)
    copied = 2 * source.numel() * source.element_size() / best / 1e9
    found = []
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
        row = {"precision": precision, "copy_gb_per_second": copied}
        best = best_seconds(partial(torch.mm, a, b), device, rounds, repeats)
        row["matmul_tflops"] = 2 * size**3 / best / 1e12
        best = best_seconds(partial(F.conv2d, x, weight, padding=1), device, rounds, repeats)
        row["convolution_tflops"] = 2 * 9 * 320 * x.numel() / best / 1e12
        found.append(row)
    return found


def best_seconds(run: Callable[[], object], device: torch.device, rounds: int, repeats: int) -> float:
    """The shortest of `rounds` turns of `repeats` calls, per call, after one turn to warm up."""

    def several() -> None:
        for _ in range(repeats):
            run()

    several()
    return min(seconds_of(several, device) for _ in range(rounds)) / repeats


def peak(tops: Sequence[dict[str, Any]], precision: str) -> float:
    """The ceiling to measure a step against: the faster of matrix product and convolution.

    They differ on CPUs, where two libraries compute them; on a GPU it is the matrix product.
    """
    (top,) = (row for row in tops if row["precision"] == precision)
    return max(top["matmul_tflops"], top["convolution_tflops"])


def make_network(name: str, device: torch.device, seed: int) -> nn.Module:
    """A network with random weights, in eval mode, whose BatchNorm statistics fit its activations.

    A name of cifar100_models, or DM-WRN-d-w: the shape of RobustBench's strongest teachers (`dm_wide_resnet`). With
    fresh statistics the logits of a deep network overflow its softmax, and gradients vanish or become NaN.
    """
    torch.manual_seed(seed)
    if name.startswith(DM):
        depth, _, width = name.removeprefix(DM).partition("-")
        model = dm_wide_resnet.build(int(depth), int(width), CLASSES)
    else:
        model = build_model(name, CLASSES)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.rand(4, 3, SIDE, SIDE))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval().to(device)


def make_networks(student: str, teacher: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Student and teacher by `make_network`."""
    return make_network(student, device, 0), make_network(teacher, device, 1)


def make_batches(batch: int, device: torch.device, count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images in [0, 1] and labels; several batches, so that no cache holds what a step needs."""
    torch.manual_seed(0)
    return [
        (torch.rand(batch, 3, SIDE, SIDE).to(device), torch.randint(CLASSES, (batch,)).to(device)) for _ in range(count)
    ]


def profile_rows(setting: Setting, repeats: int = 3) -> list[dict[str, Any]]:
    """The device's share of the wall-clock time, and the ten operators (CPU) or kernels (GPU) that take the most."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = setting.device.type == "cuda"
    setting.turn(1)
    with profiler(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as trace:
        wall = seconds_of(lambda: [setting.run() for _ in range(repeats)], setting.device)
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    times: dict[str, float] = {}
    for event in trace.key_averages():
        # Annotations on the device's timeline span kernels that count by themselves.
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False):
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[event.key] = times.get(event.key, 0.0) + own / 1e6
    total = sum(times.values())
    top = sorted(times.items(), key=lambda item: -item[1])[:10]
    busy = {"name": "(device busy, of wall-clock time)", "share": total / wall}
    return [busy, *({"name": f"`{name[:70]}`", "share": seconds / total} for name, seconds in top)]
