"""Where a training step's time goes, by torch's profiler."""

from typing import Any

from benchmarks import measure


def profile_rows(setting: measure.Setting, repeats: int = 3) -> list[dict[str, Any]]:
    """The device's share of the wall-clock time, and the ten operators (CPU) or kernels (GPU) that take the most."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = setting.device.type == "cuda"
    setting.turn(1)
    with profiler(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as trace:
        wall = measure.seconds_of(lambda: [setting.run() for _ in range(repeats)], setting.device)
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
