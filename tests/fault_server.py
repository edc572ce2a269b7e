"""Run scripts in forks of one process: the project is imported once, which saves three seconds per run."""

import hashlib
import importlib
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fault_injection import sabotage

ROOT = Path(__file__).parent.parent
SCRIPTS = ("adaad_cifar100", "adaad_IGDM_cifar100")
SMALL = [
    *("--dataset", "digits", "--student", "RES-8", "--teacher", "teacher/student.pt"),
    *("--train_examples", "300", "--batch", "52", "--epochs", "2", "--steps", "2"),
    *("--epsilon", "0.14", "--step_size", "0.07", "--device", "cpu"),
    *("--aa_examples", "12", "--aa_batch", "4", "--checkpoint_minutes", "1e-9"),
]
"""12 steps in two epochs, a checkpoint after each, and AutoAttack in three chunks."""
TEACHER = [
    *("--dataset", "digits", "--model", "RES-8", "--train_examples", "600", "--batch", "64"),
    *("--epochs", "2", "--steps", "2", "--epsilon", "0.1", "--step_size", "0.05", "--aa_examples", "0"),
    *("--run_dir", ".", "--run_name", "teacher"),
]
TIMES = ("seconds", "attack_seconds", "images_per_second")
HANGS = 3600
"""Seconds after which a process counts as hung: far above what any takes on the slowest machine."""
Row = tuple[str, int, str]
"""Of the table in docs/reliability.md: fault, times, outcome."""


def serve() -> None:
    """Answer requests, one JSON object a line, until stdin ends."""
    sys.path.insert(0, str(ROOT))
    # Imported once for all forks. torch imports _inductor only when an Engine or an optimizer is made: two seconds.
    for name in (
        "sklearn.datasets",
        "sklearn.model_selection",
        "tqdm",
        "wandb",
        "pyautoattack",
        "torch._inductor",
        "matplotlib.pyplot",
        "pandas",
        "scipy.stats",
        *SCRIPTS,
        "train_teacher",
        "evaluate",
        "experiment.evaluation",
    ):
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            children = []
            for rank in range(request.get("ranks", 1)):
                child = os.fork()
                if child == 0:
                    os.dup2(out.fileno(), 1)
                    os.dup2(err.fileno(), 2)
                    _child(request, {"RANK": str(rank), "LOCAL_RANK": str(rank)} if "ranks" in request else {})
                children.append(child)
            answer = {"status": max((_wait(child, request) for child in children), key=abs)}
            for name, file in (("out", out), ("err", err)):
                file.seek(0)
                answer[name] = file.read().decode(errors="replace")
        print(json.dumps(answer), flush=True)


def _wait(child: int, request: dict) -> int:
    """The exit status (negative: the signal that killed it); kill the child at the moment asked for, or if it hangs."""
    end = time.monotonic() + request.get("kill_after", HANGS)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if "kill_after" in request else 999


def _child(request: dict, place: dict[str, str]) -> None:
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the fault run itself may be under nohup
        os.chdir(request["cwd"])
        os.environ.update(request.get("env", {}) | place)
        sys.stdin, sys.argv = io.StringIO(), [request["script"] + ".py", *request["argv"]]
        for fault in request.get("faults", []):
            sabotage(*fault)
        if Path(sys.argv[0]).is_file():
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            importlib.import_module("experiment.cli").guard(importlib.import_module(request["script"]).main)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Server:
    """Runs scripts in forks of one process, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # One thread: a fork of a process with an OpenMP pool hangs.
            env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        )

    def run(self, script: str | Path, argv: list[str], cwd: Path, **request: object) -> "Outcome":
        """Run a file (without .py) or a module's main; faults: [(point, n, action)], kill_after: seconds, ranks."""
        if "ranks" in request:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            request["env"] = {**address, "WORLD_SIZE": str(request["ranks"])}
        request |= {"script": str(script), "argv": [str(a) for a in argv], "cwd": str(cwd)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


class Outcome:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def expect(self, status: int, pattern: str = "") -> "Outcome":
        """Assert the exit status, and for one above 0 a single line on stderr, beside warnings and AutoAttack's."""
        printed = f"status {self.status}\n{self.out}\n{self.err}"
        assert self.status == status, printed
        assert "Traceback" not in self.err, printed
        lines = [line for line in self.err.splitlines() if not line.startswith(("warning:", "AutoAttack"))]
        assert status <= 0 or len(lines) == 1, printed
        assert re.search(pattern, self.err), printed
        return self


def result_of(folder: Path) -> dict:
    """The results of a finished run without its times: equal bit for bit between runs."""

    def untimed(value):
        if isinstance(value, dict):
            return {k: untimed(v) for k, v in value.items() if k not in TIMES}
        return value

    from experiment import files

    rows = [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = untimed(json.loads((folder / "result.json").read_text()))
    student = files.load_student(folder)
    assert files.state_sha256(student) == result["student_sha256"]
    names = ("clean", "pgd20", "autoattack", "gradients", "best", "swa", "student_sha256")
    return {"rows": rows, **{name: result.get(name) for name in names}}


def tree(folder: Path) -> dict[str, str]:
    """Path to SHA-256 of every file below a folder, but for locks."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def prepare(server: Server, home: Path) -> dict[str, dict]:
    """Train a small robust teacher in home/teacher and both scripts without interruption; results by script."""
    server.run("train_teacher", TEACHER, home).expect(0)
    expected = {}
    for script in SCRIPTS:
        server.run(script, [*SMALL, "--run_name", f"{script}_whole"], home).expect(0)
        expected[script] = result_of(home / "runs" / f"{script}_whole")
    return expected


def stopped_run(server: Server, home: Path, name: str, script: str = SCRIPTS[0], flags: list[str] = SMALL) -> Path:
    """A run folder with last.pt and previous.pt, stopped in its second epoch."""
    fault = ("step", 9, "SIGTERM")
    server.run(script, [*flags, "--run_name", name], home, faults=[fault]).expect(75)
    return home / "runs" / name


def reproduces(server: Server, script: str, home: Path, name: str, expected: dict, flags: list[str] = SMALL) -> Outcome:
    """Give the command again, which must end with the expected result and leave no partial file."""
    outcome = server.run(script, [*flags, "--run_name", name], home).expect(0)
    folder = home / "runs" / name
    assert result_of(folder) == expected, (script, name)
    assert not list(folder.rglob("*.tmp"))
    seconds = json.loads((folder / "result.json").read_text())["seconds"]
    assert all(0 <= value < HANGS for value in seconds.values()), seconds
    return outcome


if __name__ == "__main__":
    serve()
