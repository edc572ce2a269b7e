"""What the benchmarks share: interleaved timing, machine ceilings, a profile.

The speed of a machine drifts. Settings that are compared therefore alternate in one process. Reported are medians with
quartiles, and ratios of each round.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from experiment import UserError


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
        """Warm up what `build` returns, which also sets the global settings; `fields` name the setting in reports."""
        self.fields, self.device = fields, device
        before = self._allocated()
        self.run = build()
        self.numerics = Numerics.current()
        for _ in range(2 if fields.get("compile") else 1):  # a second call may compile another variant
            self.run()
        # Weights, optimizer state and gradients stay between turns; those of the other settings do not count.
        self._resident = self._allocated() - before
        self.seconds: list[float] = []
        self.peak_gib: float | None = None  # of a turn; None on the CPU
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
        self.seconds.append(seconds_of(self._call, self.device, repeats))
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - before + self._resident
            self.peak_gib = max(self.peak_gib or 0.0, peak / 2**30)

    def _call(self) -> None:
        self.result = self.run()

    def check_finite(self) -> None:
        """Raise UserError unless the last timed call returned finite numbers."""
        values = self.result.values() if isinstance(self.result, dict) else [self.result]
        if not all(torch.as_tensor(value).isfinite().all() for value in values):
            raise UserError(f"{self.fields}: the loss is not finite; the measured times are not valid")


def take_turns(settings: Sequence[Setting], rounds: int, repeats: int = 1) -> None:
    """Time all settings `rounds` times in alternating order, so that drift affects all of them."""
    for i in range(rounds):
        for setting in settings if i % 2 == 0 else reversed(settings):
            setting.turn(repeats)


def synchronize(device: torch.device) -> None:
    """Wait for all kernels of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall-clock seconds per call of consecutive calls, including the device's work."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def speed(images: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Images per second: median and quartiles, with the measured seconds."""
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return {
        "images_per_second": images / middle,
        "images_per_second_quartiles": [images / high, images / low],
        "seconds": list(seconds),
    }


def ratio(baseline: Sequence[float], seconds: Sequence[float]) -> dict[str, Any]:
    """Speed relative to the baseline: ratio of the medians, and quartiles of the ratios of each round."""
    quartiles = np.quantile(np.divide(baseline, seconds), (0.25, 0.75)).tolist()
    return {"ratio": statistics.median(baseline) / statistics.median(seconds), "ratio_quartiles": quartiles}


def ceilings(device: torch.device, precisions: Sequence[str], rounds: int = 7) -> list[dict[str, Any]]:
    """A row per precision: the highest rates of a large matrix product and a large convolution, 10^12 operations/s."""
    cuda = device.type == "cuda"
    size, images = (8192, 2048) if cuda else (2048, 64)
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
        product = best_seconds(partial(torch.mm, a, b), device, rounds, repeats)
        convolution = best_seconds(partial(F.conv2d, x, weight, padding=1), device, rounds, repeats)
        rates = {"matmul_tflops": 2 * size**3 / product / 1e12}
        rates["convolution_tflops"] = 2 * 9 * 320 * x.numel() / convolution / 1e12
        found.append({"precision": precision, **rates})
    return found


def best_seconds(run: Callable[[], object], device: torch.device, rounds: int, repeats: int) -> float:
    """The shortest of `rounds` turns of `repeats` calls, per call, after one turn to warm up."""
    seconds_of(run, device, repeats)
    return min(seconds_of(run, device, repeats) for _ in range(rounds))


def profile_rows(setting: Setting, repeats: int = 3) -> list[dict[str, Any]]:
    """The device's share of the wall-clock time, and the ten operators (CPU) or kernels (GPU) that take the most."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = setting.device.type == "cuda"
    setting.turn(1)
    with profiler(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as trace:
        wall = repeats * seconds_of(setting.run, setting.device, repeats)
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
