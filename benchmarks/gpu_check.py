"""Check a GPU within some minutes, most important part first: correctness, the fastest step, where its time goes.

    python -m benchmarks.gpu_check --minutes 9 --out DIR --commit SHA     # on the GPU machine
    python -m benchmarks.report DIR --insert docs/performance_tables.md          # afterwards, from DIR/gpu_check.json
    python -m benchmarks.gpu_check --rehearse --out DIR                   # every part at toy size, on a CPU

Each part is a process with a time limit; time that it does not use goes to later parts. The JSON file is written after
every setting, so an interrupted check keeps what it measured. A part that fails or reaches its limit is reported, and
the next one starts. The limits of a rehearsal follow from the seconds of its first part. On a CPU without bfloat16
instructions, the bfloat16 measurements are left out.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attacks
import rslad_loss
from benchmarks import evaluation, measure, profiling, report, training_step
from benchmarks.tricks import TRICKS
from cifar100_models import build_model
from experiment import UserError, cli, data
from experiment.files import read_json, write_json

ROOT = Path(__file__).parent.parent
Rows = Iterator[tuple[str, dict[str, Any]]]
METHOD = "adaad_IGDM"


def networks_of(args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Student and teacher with random weights."""
    return tuple(
        measure.make_network(name, torch.device(args.device), i) for i, name in enumerate((args.student, args.teacher))
    )


def has_bfloat16(device: str) -> bool:
    """Whether a device has bfloat16 instructions; a CPU without them emulates them, up to a hundred times slower."""
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def rates_of(device: str) -> list[str]:
    """The precisions that are measured on a device."""
    return ["fp32", *(["tf32"] if device == "cuda" else []), *(["bf16"] if has_bfloat16(device) else [])]


def tops_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The ceilings that the first part measured; measured now where it did not."""
    there = _parts(args).get("machine", {}).get("ceilings", [])
    rates = rates_of(args.device)
    return there if len(there) == len(rates) else measure.ceilings(torch.device(args.device), rates, args.rounds)


def _parts(args: argparse.Namespace) -> dict[str, Any]:
    path = args.out / "gpu_check.json"
    return read_json(path)["parts"] if path.exists() else {}


def machine(args: argparse.Namespace) -> Rows:
    """The device's name, driver and clocks; the ceilings of a matrix product and of the largest convolution."""
    asked = ("name", "driver_version", "clocks.max.sm", "clocks.current.sm", "power.limit", "memory.total")
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        for name, value in zip(asked, (said or [""])[0].split(", "), strict=False):
            yield "machine", {"name": name, "value": value}
    yield "machine", {"name": "torch", "value": torch.__version__}
    yield "machine", {"name": "teacher's class", "value": type(networks_of(args)[1]).__module__}
    for row in tops_of(args):
        yield "ceilings", row


ARITHMETIC = "float64 or losses_near"
SHORT_SET = f"{ARITHMETIC} or out_of_memory or deterministic or (every_script and adaad_IGDM)"


def tests(args: argparse.Namespace) -> Rows:
    """The GPU tests that matter most, each with its outcome."""
    chosen = ARITHMETIC if args.rehearse else SHORT_SET
    command = [sys.executable, "-m", "pytest", "-W", "default", "-m", "gpu", "-k", chosen, "-v", "--tb=short"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    environment = {**os.environ, "GPU_TESTS_DEVICE": args.device}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            found = re.match(r"\S+::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", line)
            if found:
                yield "tests", {"name": found[1], "outcome": found[2].lower()}


def baseline(args: argparse.Namespace) -> Rows:
    """The published order; the product's eager step in TF32 and bfloat16, and asking the teacher less often."""
    networks, tops = networks_of(args), tops_of(args)
    batches = measure.make_batches(args.batch, torch.device(args.device))
    published = training_step.setting_of(METHOD, networks, batches, "published", "fp32", 0)
    precisions = rates_of(args.device)[1 if args.device == "cuda" else 0 :]
    for precision, every in [*((name, 1) for name in precisions), (precisions[-1], 5), (precisions[-1], 10)]:
        fields = (METHOD, networks, batches, "product", precision, 0)
        setting = training_step.setting_of(*fields, teacher_every=every)
        published.seconds.clear()
        measure.take_turns([published, setting], args.rounds, args.repeats)
        for timed in (published, setting):
            yield "rows", training_step.row_of(timed, published.seconds, networks, args.batch, tops)


def step(args: argparse.Namespace) -> Rows:
    """bfloat16: the compiled step, and each trick on its own beside it."""
    networks, tops, device = networks_of(args), tops_of(args), torch.device(args.device)
    args.precisions, args.compile, args.tricks = ["bf16"], [1], list(TRICKS)
    for row in training_step.trick_rows(METHOD, networks, tops, device, args):
        yield "tricks", row


def profile(args: argparse.Namespace) -> Rows:
    """Where the time of the fastest step so far goes."""
    rows = [row for row in _parts(args).get("step", {}).get("tricks", []) if "error" not in row]
    best = max(rows, key=lambda row: row["images_per_second"], default={"trick": "product", "compile": 1})
    networks = networks_of(args)
    batches = measure.make_batches(args.batch, torch.device(args.device))
    fields = (METHOD, networks, batches, "product", "bf16", best["compile"], best["trick"])
    for row in profiling.profile_rows(training_step.setting_of(*fields)):
        yield "profile", row


def trained_networks(args: argparse.Namespace) -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    """A student and a teacher trained for some steps against FGSM on digits, and test images with their labels."""
    device = torch.device(args.device)
    images = data.load_data("digits", device=device)
    trained = []
    for i, name in enumerate((args.student, "WRN-16-4" if args.device == "cuda" else "RES-8")):
        torch.manual_seed(i)
        network = build_model(name, images.num_classes).to(device)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        for epoch in range(1, args.fidelity_epochs + 1):
            for x, y, _, _ in images.batches(128, 0, epoch):
                x_adv = attacks.fgsm(network, x, y, 0.1)
                optimizer.zero_grad()
                nn.functional.cross_entropy(network.train()(x_adv), y).backward()
                optimizer.step()
        trained.append(network.eval())
    return *trained, data.as_float(images.x_test[:128]), images.y_test[:128]


def fidelity(args: argparse.Namespace) -> Rows:
    """Each precision against float32: signs that flip in an attack's first step, and the objective after ten steps."""
    student, teacher, x, y = trained_networks(args)
    device = torch.device(args.device)

    def attacked(name: str, precision: str, steps: int) -> torch.Tensor:
        measure.Numerics(precision == "tf32", precision == "tf32", False).apply()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)
        torch.manual_seed(0)
        with torch.autocast(device.type, dtype, enabled=precision in ("bf16", "fp16")):
            return attacks.perturb(name, student, teacher, x, y, 0.1, 0.025, steps)

    def objective(name: str, x_adv: torch.Tensor) -> float:
        measure.Numerics(False, False, False).apply()
        with torch.no_grad(), attacks.frozen(student, teacher):
            if name == "pgd":
                return nn.functional.cross_entropy(student(x_adv), y).item()
            return rslad_loss.kl_divergence(student(x_adv), teacher(x_adv)).item()

    for name in ("adaad", "pgd"):
        torch.manual_seed(0)
        start = attacks.gaussian_start(x) if name == "adaad" else attacks.uniform_start(x, 0.1)
        first = (attacked(name, "fp32", 1) - start).sign()
        reached = objective(name, attacked(name, "fp32", 10))
        for precision in (*rates_of(device.type)[1:], "fp16"):
            flipped = ((attacked(name, precision, 1) - start).sign() != first).float().mean().item()
            ratio = objective(name, attacked(name, precision, 10)) / reached
            fields = {"method": name, "precision": precision}
            yield "fidelity", {**fields, "flipped": flipped, "objective_ratio": ratio}


def launches(args: argparse.Namespace) -> Rows:
    """ARD+IGDM in bfloat16, whose kernels are too short to hide the host: with the CUDA graph and without; memory."""
    args.precisions, args.compile, args.tricks = ["bf16"], [1], ["product", "without CUDA graph"]
    device = torch.device(args.device)
    for row in training_step.trick_rows("ard_IGDM", networks_of(args), tops_of(args), device, args):
        yield "tricks", row


def autoattack(args: argparse.Namespace) -> Rows:
    """AutoAttack, standard: seconds of each attack per image, by batch."""
    student = measure.make_network(args.student, torch.device(args.device), 0)
    fields = {"aa_examples": args.aa_examples, "aa_rounds": 1}
    for batch in args.aa_batches:
        flags = argparse.Namespace(**fields, aa_batches=[batch])
        for row in evaluation.autoattack_rows(student, torch.device(args.device), flags):
            yield "autoattack", row


@dataclass(frozen=True)
class Part:
    """One part: what it yields, its share of the minutes, and whether it measures bfloat16 alone."""

    rows: Callable[[argparse.Namespace], Rows]
    minutes: float
    bfloat16: bool = False


PARTS = {
    "machine": Part(machine, 0.5),
    "tests": Part(tests, 2),
    "baseline": Part(baseline, 1),
    "step": Part(step, 3, bfloat16=True),
    "profile": Part(profile, 0.75, bfloat16=True),
    "fidelity": Part(fidelity, 0.75),
    "launches": Part(launches, 0.5, bfloat16=True),
    "autoattack": Part(autoattack, 4),
}
PATIENCE = 50
"""In a rehearsal, a part has this many times the seconds that its share of the first part's would be."""
FIRST = tuple(name for name in PARTS if name != "autoattack")
TOY = {
    **{"device": "cpu", "teacher": "DM-WRN-10-1", "student": "RES-8", "batch": 4, "rounds": 1, "repeats": 1},
    **{"fidelity_epochs": 1, "aa_examples": 1, "aa_batches": [1]},
}


def run_part(name: str, args: argparse.Namespace) -> None:
    """In the part's own process: a line of JSON on stdout for every row, as soon as there is one."""
    if args.rehearse:  # the whole of torch.compile but its code generation, which takes a minute
        torch.compile = partial(torch.compile, backend="aot_eager")
    for kind, row in PARTS[name].rows(args):
        print(json.dumps({"kind": kind, "row": row}), flush=True)


def watch_part(name: str, args: argparse.Namespace, limit: float | None, found: dict[str, Any]) -> None:
    """Run a part in a process of its own, for `limit` seconds at most if there is one; write its rows as they come."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", *sys.argv[1:], "--part", name]
    part = found["parts"][name] = {"status": "running", "seconds": 0.0}
    started, stopped = time.monotonic(), threading.Event()
    with (args.out / "gpu_check.log").open("a+") as log:
        log.write(f"\n== {name}\n")
        log.flush()
        pipes = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
        environment = {"OMP_NUM_THREADS": "4", **os.environ}  # 16 took six times as long to build the networks
        with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:

            def stop() -> None:
                stopped.set()
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started

            timer = threading.Timer(limit or 0.0, stop)
            if limit is not None:
                timer.start()
            try:
                for line in process.stdout:
                    try:
                        said = json.loads(line)
                        kind, row = said["kind"], said["row"]
                    except (ValueError, TypeError, KeyError):  # a library's word
                        log.write(line)
                        continue
                    part.setdefault(kind, []).append(row)
                    part["seconds"] = time.monotonic() - started
                    write_json(args.out / "gpu_check.json", found)
                process.wait()
            finally:
                timer.cancel()
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        last = (log.read().strip().splitlines() or [""])[-1]
    part["seconds"] = time.monotonic() - started
    part["status"] = "done"
    if stopped.is_set():
        part["status"] = f"stopped at its limit of {limit:.0f} s"
    elif process.returncode:
        part["status"] = f"failed: {last[:200]}"
    write_json(args.out / "gpu_check.json", found)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = cli.Parser(prog="python -m benchmarks.gpu_check", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--minutes", type=cli.number(above=True), default=9.0, help="for all parts together")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of gpu_check.json, .md and .log")
    add("--commit", help="the commit, where git cannot tell it")
    add("--rehearse", action="store_true", help="all of it at toy size on the CPU")
    add("--parts", nargs="+", choices=tuple(PARTS), default=list(FIRST), help="parts to run; autoattack is no default")
    add("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    add("--teacher", default="DM-WRN-28-10", help="DM-WRN-d-w, WRN-d-w or another name of cifar100_models")
    add("--student", default="RES-18", help="name of cifar100_models")
    add("--batch", type=cli.whole(2), default=128, help="images per step")
    add("--rounds", type=cli.positive_int, default=5, help="turns per setting")
    add("--repeats", type=cli.positive_int, default=4, help="steps per turn")
    add("--aa_examples", type=cli.positive_int, default=1000, help="images under AutoAttack")
    add("--aa_batches", nargs="+", type=cli.positive_int, default=[250, 500], help="its batches")
    args = parser.parse_args(argv)
    args.device, args.fidelity_epochs = "cuda", 20
    if args.rehearse:
        vars(args).update(TOY)
    elif not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --rehearse runs at toy size on the CPU")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {args.out} cannot be made: {error.strerror}")
    return args


LEFT_OUT = "left out: this CPU has no bfloat16 instructions"


def limit_of(i: int, args: argparse.Namespace, found: dict[str, Any], end: float) -> float | None:
    """Seconds for the i-th part: a share of the time left; in a rehearsal, a multiple of the first finished part's."""
    shares = [PARTS[later].minutes for later in args.parts[i:]]
    if not args.rehearse:
        return max(0.0, end - time.monotonic()) * shares[0] / sum(shares)
    done = ((name, part) for name, part in found["parts"].items() if part["status"] == "done")
    measured = [(PARTS[name].minutes, part["seconds"]) for name, part in done]
    if not measured:
        return None
    minutes, seconds = measured[0]
    return PATIENCE * seconds * shares[0] / minutes


def main() -> None:
    """Run the parts one after another; a summary last."""
    args = parse_args()
    if args.part:
        run_part(args.part, args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception: it takes the part along
    end = time.monotonic() + 60 * args.minutes
    found = {**report.about("gpu_check", args, torch.device(args.device)), "parts": {}}
    for i, name in enumerate(args.parts):
        if PARTS[name].bfloat16 and not has_bfloat16(args.device):
            found["parts"][name] = {"status": LEFT_OUT, "seconds": 0.0}
            print(f"{name}: {LEFT_OUT}", flush=True)
            continue
        watch_part(name, args, limit_of(i, args, found, end), found)
        print(f"{name}: {found['parts'][name]['status']}, {found['parts'][name]['seconds']:.0f} s", flush=True)
    text = report.text_of(found)
    (args.out / "gpu_check.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}", flush=True)
    bad = [name for name, part in found["parts"].items() if part["status"] not in ("done", LEFT_OUT)]
    if bad:
        raise UserError(f"not complete: {', '.join(bad)}; the rest is in {args.out}")


if __name__ == "__main__":
    cli.guard(main)
