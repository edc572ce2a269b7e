"""Time one training step: research code's own order of passes against the product's, at each setting.

    python -m benchmarks.training_step --out runs/bench/training_step.json
    python -m benchmarks.training_step --methods adaad_IGDM --profile runs/bench/profile.json

Networks are the real architectures with random weights, images are random. For each method all settings take turns in
one process. Speeds are medians with quartiles over the rounds, a ratio is that of the medians.
"""

import argparse
import copy
import importlib
import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import measure, published
from experiment import UserError, cli, optim
from experiment.engine import Engine

PASSES = {
    "ard": {"published": (12, 10, 2, 1, 0), "product": (12, 10, 1, 1, 0)},
    "ard_IGDM": {"published": (13, 10, 3, 3, 0), "product": (13, 10, 2, 3, 0)},
    "rslad": {"published": (12, 10, 2, 1, 0), "product": (12, 10, 2, 1, 0)},
    "rslad_IGDM": {"published": (14, 10, 4, 4, 0), "product": (13, 10, 3, 3, 0)},
    "adaad": {"published": (12, 10, 2, 12, 10), "product": (12, 10, 1, 11, 10)},
    "adaad_IGDM": {"published": (14, 10, 4, 14, 10), "product": (13, 10, 2, 12, 10)},
}
"""Passes of a step with ten attack steps and --preset paper: the student's forward passes, backward passes to the input
alone, and full backward passes; the teacher's forward passes and backward passes to the input. The published ones were
counted in the published code; the product's lack the plus pass, which is x_adv's, and the backward passes of terms with
weight zero; a student's clean pass without gradient, which moves BatchNorm statistics, counts."""
METHODS = tuple(PASSES)
EPOCH = 1
COUNTED = 2
"""Images of the step whose operations are counted; the count per image is the same for any batch."""


class ProductStep:
    """The step of a method's script, exactly as its main() makes it, on given networks and batches.

    With --preset paper: its losses are those that the published step computes.
    """

    def __init__(
        self, method: str, student: nn.Module, teacher: nn.Module, batches: list, precision: str, compiled: int
    ) -> None:
        """Args: method, the script's name without _cifar100; batches, (x, y) to go round; the rest is the engine's."""
        self.script = importlib.import_module(f"{method}_cifar100")
        device, size = str(batches[0][0].device), len(batches[0][0])
        flags = {"preset": "paper", "device": device, "batch": size, "precision": precision, "compile": compiled}
        argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        self.args = cli.parse_args(self.script.__file__, self.script.RECIPE, argv)
        self.engine = Engine(self.args)
        self.student = student
        self.optimizer = optim.sgd(student, self.args)
        self.engine.distribute(student, self.optimizer)
        optim.set_lr(self.optimizer, self.args, EPOCH)
        self.fast_student, self.fast_teacher = self.engine.accelerate(student), self.engine.accelerate(teacher)
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


def published_step(method: str, student: nn.Module, teacher: nn.Module, batches: list) -> Callable[[], float]:
    """The published step on these networks and batches, ready to be called."""
    measure.RESEARCH_CODE.apply()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    rounds = itertools.cycle(batches)
    return lambda: published.training_step(method, student, teacher, optimizer, *next(rounds))


def gflop_per_image(method: str, networks: tuple[nn.Module, nn.Module], device: torch.device) -> tuple[float, float]:
    """Counted operations of the published step and of the product's, 10^9 per image.

    Counted on a real eager step of two images: precision and compilation do not change what has to be computed.
    """
    batches = measure.make_batches(COUNTED, device, 1)
    theirs = published_step(method, *copy.deepcopy(networks), batches)
    ours = ProductStep(method, *copy.deepcopy(networks), batches, "fp32", 0)
    return tuple(measure.count_flop(step) / COUNTED / 1e9 for step in (theirs, ours))


def gflop_of_passes(network: nn.Module) -> tuple[float, float, float]:
    """Operations of one image's forward pass, backward pass to the input alone, and full backward pass, 10^9 each."""
    x = torch.rand(1, 3, measure.SIDE, measure.SIDE, device=next(network.parameters()).device)

    def run(wants_input: bool, wants_weights: bool) -> float:
        network.requires_grad_(wants_weights)
        logits = network(x.clone().requires_grad_(wants_input))
        return measure.count_flop(lambda: logits.sum().backward()) / 1e9

    forward = measure.count_flop(lambda: network(x)) / 1e9
    return forward, run(True, False), run(False, True)


def gflop_by_passes(
    method: str, student: tuple[float, float, float], teacher: tuple[float, float, float]
) -> tuple[float, float]:
    """Operations of a step by PASSES and what a pass costs (`gflop_of_passes`): published order and product."""
    costs = (*student, *teacher[:2])
    counts = (PASSES[method][step] for step in ("published", "product"))
    return tuple(sum(n * cost for n, cost in zip(passes, costs, strict=True)) for passes in counts)


def measure_method(
    method: str, networks: tuple[nn.Module, nn.Module], device: torch.device, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[measure.Setting]]:
    """All settings of one method in turns: their rows for the report, and the settings, fastest first."""
    torch.compiler.reset()  # a limited number of compiled variants is kept per forward: make room for these
    batches = measure.make_batches(args.batch, device)
    kinds = [("published", "fp32", 0), *(("product", p, c) for p in args.precisions for c in args.compile)]

    def build(kind: str, precision: str, compiled: int) -> Callable[[], object]:
        student, teacher = copy.deepcopy(networks)
        if kind == "published":
            return published_step(method, student, teacher, batches)
        return ProductStep(method, student, teacher, batches, precision, compiled)

    settings = []
    for kind, precision, compiled in kinds:
        fields = {"method": method, "step": kind, "precision": precision, "compile": compiled}
        settings.append(measure.Setting(fields, device, lambda k=kind, p=precision, c=compiled: build(k, p, c)))
    measure.take_turns(settings, args.rounds, args.repeats)
    gflop = dict(zip(("published", "product"), gflop_per_image(method, networks, device), strict=True))
    rows = []
    for setting in settings:
        _check_finite(setting)
        row = {**setting.fields, **measure.speed(args.batch, setting.seconds)}
        row |= measure.ratio(settings[0].seconds, setting.seconds)
        row["gflop_per_image"] = gflop[row["step"]]
        row["tflops"] = row["gflop_per_image"] * row["images_per_second"] / 1e3
        row["peak_memory_gib"] = setting.peak_bytes / 2**30 if device.type == "cuda" else None
        rows.append(row)
    return rows, sorted(settings, key=lambda setting: min(setting.seconds))


def add_share_of_peak(rows: list[dict[str, Any]], tops: dict[str, Any], device: torch.device) -> None:
    """Add to each row its operations per second as a share of the machine's ceiling at its precision."""
    for row in rows:
        # Convolutions of the published step run in TF32 on CUDA: the framework's default.
        rate = "tf32" if row["step"] == "published" and device.type == "cuda" else row["precision"]
        row["share_of_peak"] = row["tflops"] / measure.peak(tops, rate)


def _check_finite(setting: measure.Setting) -> None:
    result = setting.run()
    values = [result] if isinstance(result, float) else [term.item() for term in result.values()]
    if not all(map(math.isfinite, values)):
        raise UserError(f"{setting.fields}: the loss is not finite, so these figures are of no use")


def training_table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table."""
    header = [
        "method", "step", "images/s (quartiles)", "ratio (quartiles)", "GFLOP/image", "TFLOP/s", "share of peak",
        "peak memory, GiB",
    ]  # fmt: skip
    body = []
    for row in rows:
        memory = row["peak_memory_gib"]
        ours = f"{row['precision']}, {'compiled' if row['compile'] else 'eager'}"
        body.append(
            [
                row["method"],
                "published order" if row["step"] == "published" else f"product, {ours}",
                measure.spread(row["images_per_second"], row["images_per_second_quartiles"]),
                measure.spread(row["ratio"], row["ratio_quartiles"]),
                f"{row['gflop_per_image']:.2f}",
                f"{row['tflops']:.3f}",
                f"{100 * row['share_of_peak']:.1f} %",
                "-" if memory is None else f"{memory:.2f}",
            ]
        )
    return measure.table(header, body)


# The profile ------------------------------------------------------------------------------------------------------

KINDS = {
    "convolutions and matrix products": ("conv", "cudnn", "gemm", "wgrad", "dgrad", "fprop", "xmma", "cutlass", "mm"),
    "pointwise and normalisation": (
        "elementwise", "triton", "relu", "threshold", "batch_norm", "bn_", "add", "mul", "clamp", "sign", "softmax",
        "reduce", "copy", "fill", "cat", "sub", "where", "sum", "mean", "foreach", "sgd", "rsqrt",
    ),
}  # fmt: skip
"""Kind of work by parts of the name of a CPU operator or GPU kernel; the first kind that fits counts."""


def kind_of(name: str) -> str:
    """The kind of work of an operator or kernel."""
    name = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profile(setting: measure.Setting, repeats: int = 3) -> dict[str, Any]:
    """Where the time of one step goes: the ten largest operators (CPU) or kernels (GPU) by self time, and shares."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    setting.turn(1)
    with profiler(activities=activities) as trace:
        wall = measure.seconds_of(lambda: [setting.run() for _ in range(repeats)], setting.device)
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
    top = sorted(times.items(), key=lambda item: -item[1])[:10]
    return {
        **setting.fields,
        "seconds_per_step": wall / repeats,
        "busy_share": total / wall,
        "shares": shares,
        "top": [{"name": name, "share": seconds / total, "kind": kind_of(name)} for name, seconds in top],
    }


def convolutions_alone(
    method: str, networks: tuple[nn.Module, nn.Module], batch: int, precision: str, device: torch.device
) -> float:
    """Seconds of all convolutions of the product's step, each kind timed by itself, over and over on the same data.

    What a step would take if nothing but its convolutions cost time, and each found its data in the cache as far as it
    fits: the least that a step can take with the library's convolutions.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.rand(batch, 3, measure.SIDE, measure.SIDE, device=device)
    costs = [_convolution_seconds(network, x, dtype) for network in networks]
    student, teacher = costs
    passes = PASSES[method]["product"]
    return sum(n * cost for n, cost in zip(passes, (*student, *teacher[:2]), strict=True))


def _convolution_seconds(network: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> tuple[float, float, float]:
    """Seconds of a network's convolutions: forward, backward to the input alone, full backward."""
    kinds: dict[tuple, list] = {}

    def note(conv: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> None:
        shape = (tuple(inputs[0].shape), conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.groups)
        kinds.setdefault(shape, []).append((conv, inputs[0]))

    hooks = [m.register_forward_pre_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    seconds = [0.0, 0.0, 0.0]
    repeats = 20 if x.is_cuda else 1
    for calls in kinds.values():
        conv, given = calls[0]
        inputs, weight = (t.detach().to(dtype, memory_format=torch.channels_last) for t in (given, conv.weight))
        options = (conv.stride, conv.padding, conv.dilation)
        forward = partial(F.conv2d, inputs, weight, None, *options, conv.groups)
        gradient = torch.randn_like(forward())
        arguments = (gradient, inputs, weight, None, *options, False, (0, 0), conv.groups)
        # The gradient of the training images themselves is not needed in a full backward pass.
        masks = ((True, False, False), (given is not x, True, False))
        runs = [forward, *(partial(torch.ops.aten.convolution_backward, *arguments, mask) for mask in masks)]
        for i, run in enumerate(runs):
            seconds[i] += len(calls) * measure.best_seconds(run, x.device, 5, repeats)
    return tuple(seconds)


def profile_tables(found: dict[str, Any]) -> str:
    """The profile as Markdown."""
    head = [f"{found['method']}, {found['precision']}, {'compiled' if found['compile'] else 'eager'}", "share"]
    shares = [[kind, f"{100 * share:.1f} %"] for kind, share in found["shares"].items()]
    shares.append(["(device busy, of wall-clock time)", f"{100 * found['busy_share']:.1f} %"])
    alone = found["convolutions_alone_seconds"] / found["seconds_per_step"]
    shares.append(["(the same convolutions, each timed by itself, of wall-clock time)", f"{100 * alone:.1f} %"])
    top = [[f"`{row['name'][:70]}`", f"{100 * row['share']:.1f} %"] for row in found["top"]]
    return f"{measure.table(head, shares)}\n\n{measure.table(['ten largest', 'share'], top)}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags; defaults that depend on the device are filled in by main."""
    parser = cli.Parser(prog="python -m benchmarks.training_step", description=__doc__.partition("\n")[0])
    measure.add_report_flags(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="scripts to time")
    parser.add_argument("--teacher", default="WRN-28-10", help="WRN-d-w or another name of cifar100_models")
    parser.add_argument("--student", default="RES-18", help="name of cifar100_models")
    parser.add_argument("--batch", type=cli.whole(2), default=128, help="images per step")
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "tf32", "bf16"), help="default fp32 on the CPU, all on CUDA"
    )
    parser.add_argument(
        "--compile", nargs="+", type=int, choices=(0, 1), help="0, 1 or both; default 0 on the CPU, both on CUDA"
    )
    parser.add_argument("--repeats", type=cli.positive_int, help="steps per turn; default 1 on the CPU, 4 on CUDA")
    parser.add_argument(
        "--profile", type=measure.output_file, metavar="FILE", help="profile the last method's fastest setting"
    )
    args = parser.parse_args(argv)
    args.device = cli.resolve_device(parser, args.device)
    return args


def main() -> None:
    """Measure, write, print."""
    args = parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    args.precisions = args.precisions or (["fp32", "tf32", "bf16"] if cuda else ["fp32"])
    args.compile = args.compile or ([0, 1] if cuda else [0])
    args.repeats = args.repeats or (4 if cuda else 1)
    rates = dict.fromkeys(["fp32", *(["tf32"] if cuda else []), *args.precisions])
    found = {"ceilings": measure.ceilings(device, list(rates)), "rows": []}
    networks = tuple(measure.make_network(name, device, i) for i, name in enumerate((args.student, args.teacher)))
    tables = []
    for method in args.methods:
        rows, settings = measure_method(method, networks, device, args)
        add_share_of_peak(rows, found["ceilings"], device)
        found["rows"] += rows
        print(f"{method}: measured", file=sys.stderr, flush=True)
        if args.profile and method == args.methods[-1]:
            best = next(s for s in settings if s.fields["step"] == "product")
            alone = partial(convolutions_alone, method, networks, args.batch, best.fields["precision"], device)
            # Before and after: the machine may be slower for some seconds, and the least is wanted.
            best.numerics.apply()
            before, profiled, after = alone(), profile(best), alone()
            found["profile"] = {**profiled, "convolutions_alone_seconds": min(before, after)}
            measure.write_json(args.profile, found["profile"])
            tables.append(profile_tables(found["profile"]))
    found["ceilings"] = measure.better(found["ceilings"], measure.ceilings(device, list(rates)))
    add_share_of_peak(found["rows"], found["ceilings"], device)
    names = {name: getattr(args, name) for name in ("teacher", "student", "batch", "rounds", "repeats")}
    line = (
        f"{args.teacher} → {args.student}, batch {args.batch}, {args.rounds} rounds of {args.repeats} steps; "
        f"{measure.ceilings_line(found['ceilings'])}"
    )
    measure.report("training_step", args, device, {**names, **found}, line, *tables, training_table(found["rows"]))


if __name__ == "__main__":
    cli.guard(main)
