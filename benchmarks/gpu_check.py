"""Check a GPU within some minutes, most important part first: correctness, the fastest step, where its time goes.

    python -m benchmarks.gpu_check --minutes 9 --out DIR --commit SHA     # on the GPU machine
    python -m benchmarks.report DIR --insert docs/performance_tables.md   # afterwards, from DIR/gpu_check.json
    python -m benchmarks.gpu_check --rehearse --out DIR                   # every part at toy size on a CPU, no limits

Each part is another benchmark in a process with a time limit; time that it does not use goes to later parts. It writes
DIR/parts/NAME.json after every setting, so an interrupted check keeps what it measured. A part that fails or reaches
its limit is reported, and the next one starts.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from experiment import UserError, cli
from experiment.files import read_json, write_json

ROOT = Path(__file__).parent.parent
ARITHMETIC = "float64 or losses_near"
SHORT_SET = f"{ARITHMETIC} or out_of_memory or deterministic or (every_script and adaad_IGDM)"


def commands(rehearse: bool) -> dict[str, tuple[float, list[str]]]:
    """Each part's share of the minutes, and its command: a module and its flags."""
    device = ["--device", "cpu" if rehearse else "cuda"]
    networks = ["--student", "RES-8"] if rehearse else []
    fast = ["--precisions", "fp32", "--compile", "0"] if rehearse else ["--precisions", "bf16", "--compile", "1"]
    eager = ["--precisions", *(["fp32"] if rehearse else ["tf32", "bf16"]), "--compile", "0"]
    step = ["benchmarks.training_step", *device, *networks]
    step += ["--teacher", "DM-WRN-10-1", "--batch", "4", "--rounds", "1"] if rehearse else []
    method = ["--methods", "adaad_IGDM"]
    pytest = ["pytest", "-W", "default", "-m", "gpu", "-k", ARITHMETIC if rehearse else SHORT_SET, "-v", "--tb=short"]
    pytest += ["-o", "addopts=", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    fidelity = ["benchmarks.fidelity", *device, *networks]
    fidelity += ["--teacher", "RES-8", "--epochs", "1", "--precisions", "fp16"] if rehearse else []
    autoattack = ["benchmarks.evaluation", *device, *networks, "--examples", "2" if rehearse else "2048"]
    autoattack += ["--aa_student", "RES-8" if rehearse else "RES-18", "--aa_examples", "1" if rehearse else "1000"]
    autoattack += ["--aa_batches", *(["1"] if rehearse else ["250", "500"])]
    return {
        "tests": (2, pytest),
        "baseline": (1, [*step, *method, *eager, "--teacher_every", "5", "10"]),
        "step": (3, [*step, "--methods", "--tricks", "all", *fast]),
        "profile": (0.75, [*step, "--methods", "--profile", "1", *fast]),
        "fidelity": (0.75, fidelity),
        # Kernels too short to hide the host.
        "launches": (0.5, [*step, "--methods", "ard_IGDM", "--tricks", "product", "without CUDA graph", *fast]),
        "autoattack": (4, autoattack),
    }


def machine_rows() -> list[dict[str, str]]:
    """Name, driver and clocks of the GPU, where there is one."""
    queried = ("name", "driver_version", "clocks.max.sm", "clocks.current.sm", "power.limit", "memory.total")
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(queried)}", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines() or [""]
    return [{"name": name, "value": value} for name, value in zip(queried, lines[0].split(", "), strict=False)]


def run_part(name: str, command: list[str], out: Path, limit: float | None) -> dict[str, Any]:
    """Run a part for at most `limit` seconds; return its status, seconds and rows."""
    log, file = out / "parts" / f"{name}.log", out / "parts" / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", *command, *(["--out", str(file)] if command[0] != "pytest" else [])]
    environment = {"OMP_NUM_THREADS": "4", "PYTHONUNBUFFERED": "1", **os.environ}  # 16 threads took six times as long
    environment["GPU_TESTS_DEVICE"] = "cuda" if torch.cuda.is_available() else "cpu"
    began, status = time.monotonic(), "done"
    with log.open("w") as output:
        pipes = {"stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
        try:
            if process.wait(limit):
                status = f"failed: {(log.read_text().strip().splitlines() or [''])[-1][:200]}"
        except subprocess.TimeoutExpired:
            status = f"stopped at its limit of {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
                process.wait()
    found = read_json(file) if file.exists() else {}
    outcomes = re.findall(r"^\S+::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", log.read_text(), re.MULTILINE)
    found["tests"] = [{"name": test, "outcome": outcome.lower()} for test, outcome in outcomes]
    rows = {kind: found[kind] for kind in report.COLUMNS if found.get(kind)}
    return {"status": status, "seconds": time.monotonic() - began, **rows}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = cli.Parser(prog="python -m benchmarks.gpu_check", description=__doc__.partition("\n")[0])
    names = tuple(commands(rehearse=False))
    parser.add_argument("--minutes", type=cli.number(above=True), default=9.0, help="for all parts together")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the figures and logs")
    parser.add_argument("--commit", help="the commit, where git is missing")
    parser.add_argument("--rehearse", action="store_true", help="all of it at toy size on the CPU")
    parser.add_argument("--parts", nargs="+", choices=names, default=names[:-1], help="default all but autoattack")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()  # the parts run in the folder of the project
    report.make_folder(parser, args.out / "parts")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --rehearse runs at toy size on the CPU")
    return args


def main() -> None:
    """Run the parts one after another; a summary last."""
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception: it ends the part too
    end, parts = time.monotonic() + 60 * args.minutes, commands(args.rehearse)
    about = report.about("gpu_check", args, torch.device("cpu" if args.rehearse else "cuda"))
    found: dict[str, Any] = {**about, "machine": machine_rows(), "parts": {}}
    for i, name in enumerate(args.parts):
        shares = [parts[later][0] for later in args.parts[i:]]
        limit = None if args.rehearse else max(0.0, end - time.monotonic()) * shares[0] / sum(shares)
        part = found["parts"][name] = run_part(name, parts[name][1], args.out, limit)
        write_json(args.out / "gpu_check.json", found)
        print(f"{name}: {part['status']}, {part['seconds']:.0f} s", flush=True)
    print(f"\n{report.text_of(found)}", flush=True)
    bad = [name for name, part in found["parts"].items() if part["status"] != "done"]
    if bad:
        raise UserError(f"not complete: {', '.join(bad)}; the rest is in {args.out}")


if __name__ == "__main__":
    cli.guard(main)
