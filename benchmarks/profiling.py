"""Where a training step's time goes, by torch's profiler."""

from typing import Any

from torch import nn

from benchmarks import convolutions, measure

KINDS = {
    # Fused kernels of the compiler carry the names of what they fuse, convolutions' among them: first.
    "pointwise and normalisation, compiled": ("triton_", "cpp_fused"),
    "normalisation and layouts, of the library": (
        "bn_fw", "bn_bw", "batchnorm", "batch_norm", "nhwctonchw", "nchwtonhwc",
    ),
    "convolutions and matrix products": (
        "conv", "cudnn", "gemm", "wgrad", "dgrad", "fprop", "xmma", "cutlass", "nvjet", "sm90_", "sm80_", "aten::mm",
        "addmm",
    ),
    "pointwise and normalisation": (
        "elementwise", "relu", "silu", "sigmoid", "threshold", "bn_", "add", "mul", "clamp", "sign", "softmax",
        "reduce", "copy", "fill", "cat", "sub", "where", "sum", "mean", "foreach", "multi_tensor", "sgd", "rsqrt",
        "pad", "pool", "memcpy", "memset",
    ),
}  # fmt: skip
"""Kind of work by parts of the name of a CPU operator or GPU kernel; the first kind that fits counts."""


def kind_of(name: str) -> str:
    """The kind of work of an operator or kernel."""
    name = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profile_rows(
    method: str, setting: measure.Setting, networks: tuple[nn.Module, nn.Module], batch: int, repeats: int = 3
) -> list[dict[str, Any]]:
    """Where a step's time goes: by kind, the ten largest operators (CPU) or kernels (GPU), its convolutions alone."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    setting.turn(1)
    precision = setting.fields["precision"]
    # Before and after: the machine may be slower for some seconds, and the least is wanted.
    alone = [convolutions.seconds_alone(method, networks, batch, precision, setting.device)]
    with profiler(activities=activities) as trace:
        wall = measure.seconds_of(lambda: [setting.run() for _ in range(repeats)], setting.device)
    alone.append(convolutions.seconds_alone(method, networks, batch, precision, setting.device))
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    times: dict[str, float] = {}
    for event in trace.key_averages():
        # Annotations on the device's timeline span kernels that count by themselves.
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False):
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[event.key] = times.get(event.key, 0.0) + own / 1e6
    total = sum(times.values())
    shares = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, seconds in times.items():
        shares[kind_of(name)] += seconds / total
    rows = [{"name": kind, "share": share} for kind, share in shares.items() if share]
    rows.append({"name": "(device busy, of wall-clock time)", "share": total / wall})
    share = min(alone) / (wall / repeats)
    rows.append({"name": "(the same convolutions, each timed by itself, of wall-clock time)", "share": share})
    top = sorted(times.items(), key=lambda item: -item[1])[:10]
    return rows + [{"name": f"`{name[:70]}`", "share": seconds / total} for name, seconds in top]
