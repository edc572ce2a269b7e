"""The fault run: all that can happen to a run, done to real ones. ``python tests/fault_run.py`` prints the table.

A server process imports the project once and forks for every run, which spares the three seconds of imports; the child
is an ordinary process that is killed, starved and lied to. Faults are put in from outside: the project has no hooks.
"""

import argparse
import errno
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ("adaad_cifar100", "adaad_IGDM_cifar100")
SMALL = [
    *("--dataset", "digits", "--student", "RES-8", "--teacher", "teacher/student.pt", "--batch", "256"),
    *("--epochs", "2", "--steps", "2", "--epsilon", "0.14", "--step_size", "0.07", "--device", "cpu"),
    *("--aa_examples", "12", "--aa_batch", "4", "--checkpoint_minutes", "1e-9"),
]
"""12 steps in two epochs, a checkpoint after each, and AutoAttack in three chunks."""
TEACHER = [
    *("--dataset", "digits", "--model", "RES-8", "--batch", "128", "--epochs", "2", "--steps", "2"),
    *("--epsilon", "0.1", "--step_size", "0.05", "--aa_examples", "0", "--run_dir", ".", "--run_name", "teacher"),
]
TIMES = ("seconds", "attack_seconds", "images_per_second")
SECONDS = 120  # after which a run of some seconds counts as hung


# The server: one fork per request ---------------------------------------------------------------------------------


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
        *SCRIPTS,
        "train_teacher",
        "evaluate",
        "compare",
        "experiment.evaluation",
    ):
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                _child(request)
            status = _wait(child, request)
            answer = {"status": status}
            for name, file in (("out", out), ("err", err)):
                file.seek(0)
                answer[name] = file.read().decode(errors="replace")
        print(json.dumps(answer), flush=True)


def _wait(child: int, request: dict) -> int:
    """The exit status (negative: the signal that killed it); kill the child at the moment asked for, or if it hangs."""
    end = time.monotonic() + request.get("kill_after", SECONDS)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if "kill_after" in request else 999


def _child(request: dict) -> None:
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the fault run itself may be under nohup
        os.chdir(request["cwd"])
        os.environ.update(request.get("env", {}))
        sys.stdin, sys.argv = io.StringIO(), [request["script"] + ".py", *request["argv"]]
        script, cli = (importlib.import_module(name) for name in (request["script"], "experiment.cli"))
        for fault in request.get("faults", []):
            _sabotage(*fault)
        cli.guard(script.main)
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
            [sys.executable, __file__, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # One thread: a fork of a process with an OpenMP pool hangs.
            env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        )

    def run(self, script: str, argv: list[str], cwd: Path, **request: object) -> "Outcome":
        """Run a script's main as its command line would; faults: [(point, n, action)], kill_after: seconds."""
        request |= {"script": script, "argv": [str(a) for a in argv], "cwd": str(cwd)}
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

    @property
    def lines(self) -> list[str]:
        """What stderr says, without notes that are not about an end."""
        notes = ("warning:", "AutoAttack")
        return [line for line in self.err.splitlines() if not line.startswith(notes)]

    def expect(self, status: int, pattern: str = "") -> "Outcome":
        """Assert the exit status; for one that is not 0, a single line on stderr that says why."""
        told = f"status {self.status}\n{self.out}\n{self.err}"
        assert self.status == status, told
        assert "Traceback" not in self.err, told
        if status > 0:
            assert len(self.lines) == 1, told
        assert re.search(pattern, self.err), told
        return self


# Faults -----------------------------------------------------------------------------------------------------------


def _sabotage(point: str, n: int, action: str) -> None:
    """Do `action` when `point` is reached for the n-th time (from 1); "write:FILE": n bytes of FILE were written."""
    import torch

    import attacks
    import rslad_loss
    from experiment import UserError, evaluation, files, run

    point, _, name = point.partition(":")
    if point == "clock":
        real = time.time
        time.time = lambda: real() + random.Random(n).uniform(-1e9, 1e9)
    elif point == "start":
        start = run.Run.start

        def admitted(self, *args):
            start(self, *args)
            raise UserError("admitted")

        run.Run.start = admitted
    elif point == "write":
        files.open = lambda path, mode: _Watched(path, mode, n, action, name)
    elif point in ("replace", "fsync"):
        real = getattr(os, point)
        calls = iter(range(1, 1 << 30))

        def watched(*args):
            if not (name and Path(args[-1]).name != name) and next(calls) == n:
                if action == "kill after":
                    real(*args)
                _act(action)
            return real(*args)

        setattr(os, point, watched)
    else:
        module, function = {
            "attack": (attacks, "project"),
            "step": (torch.optim.SGD, "step"),
            "evaluation": (evaluation, "pgd_accuracy"),
            "autoattack": (importlib.import_module("experiment.evaluation.autoattack_chunk"), "_check_adversarial"),
            "loss": (rslad_loss, "adaad"),
            "start of run": (run.Run, "start"),
        }[point]
        original, calls = getattr(module, function), iter(range(1, 1 << 30))

        def reached(*args, **kwargs):
            due = next(calls) == n
            if due and action not in ("nan", "nan weights", "constant", "one class"):
                _act(action)
            value = original(*args, **kwargs)
            if due and action == "nan":
                return value * float("nan")
            if due and action in ("nan weights", "constant", "one class"):
                _spoil(args[0].param_groups[0]["params"][-2:], action)
            return value

        setattr(module, function, reached)


def _spoil(last_layer: list, action: str) -> None:
    import torch

    weight, bias = last_layer
    with torch.no_grad():
        if action == "one class":
            bias[3] += 1e4
        else:
            weight.fill_(float("nan") if action == "nan weights" else 0)


def _act(action: str) -> None:
    import torch

    if action in ("kill", "kill after"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif action.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, action))
        time.sleep(0.01)
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "broken":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    elif action == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1")
    elif action.startswith("fill "):
        with open(Path(action[5:]) / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(1 << 12))
            except OSError:
                pass
    else:
        raise ValueError(action)


class _Watched(io.FileIO):
    """A file in which something happens after so many bytes."""

    def __init__(self, path: Path, mode: str, n: int, action: str, name: str) -> None:
        super().__init__(path, mode)
        self._left = n if not name or f".{name}." in Path(path).name else 1 << 60
        self._action = action

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        if "w" in self.mode and len(data) > self._left:
            super().write(data[: self._left])
            self._left = 1 << 60
            _act(self._action)
        self._left -= len(data)
        return super().write(data)


# What must not change ---------------------------------------------------------------------------------------------


def result_of(folder: Path) -> dict:
    """Everything a finished run found out, without the times it took: to be equal bit for bit."""

    def untimed(value):
        if isinstance(value, dict):
            return {k: untimed(v) for k, v in value.items() if k not in TIMES}
        return value

    sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
    from experiment import files

    rows = [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = untimed(json.loads((folder / "result.json").read_text()))
    student = files.load_student(folder)
    assert files.state_sha256(student) == result["student_sha256"]
    return {"rows": rows, **{k: result[k] for k in ("clean", "pgd20", "autoattack", "gradients", "student_sha256")}}


def tree(folder: Path) -> dict[str, str]:
    """Path to SHA-256 of every file below a folder, but for locks."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def reproduces(server: Server, script: str, home: Path, name: str, expected: dict, flags: list[str] = SMALL) -> None:
    """The same command again ends well, with exactly the expected result."""
    server.run(script, [*flags, "--run_name", name], home).expect(0)
    assert result_of(home / "runs" / name) == expected, (script, name)


def prepare(server: Server, home: Path) -> dict[str, dict]:
    """A small robust teacher in home/teacher and the uninterrupted runs; result by script."""
    server.run("train_teacher", TEACHER, home).expect(0)
    expected = {}
    for script in SCRIPTS:
        server.run(script, [*SMALL, "--run_name", f"{script}_whole"], home).expect(0)
        expected[script] = result_of(home / "runs" / f"{script}_whole")
    return expected


# Kinds of faults: each returns (how often, what happened) -----------------------------------------------------------


def kill_at_random(server: Server, home: Path, expected: dict, times: int, seed: int = 0) -> tuple[int, str]:
    """SIGKILL after a random time, again and again until the run is done; then the next run."""
    rng, kills, runs = random.Random(seed), 0, 0
    while kills < times:
        script, name = SCRIPTS[runs % 2], f"killed_{seed}_{runs}"
        runs += 1
        for _ in range(200):
            outcome = server.run(script, [*SMALL, "--run_name", name], home, kill_after=rng.uniform(0.05, 2.5))
            if outcome.status == 0:
                break
            assert outcome.status == -signal.SIGKILL, outcome.err
            kills += 1
        assert result_of(home / "runs" / name) == expected[script], name
        shutil.rmtree(home / "runs" / name)
    return kills, f"{runs} runs went on after each kill; weights, metrics rows and AutoAttack bit for bit the same"


POINTS = {
    "inside the attack": ("attack", 2, 23),
    "in an optimizer step": ("step", 1, 11),
    "while last.pt is written": ("write:last.pt", 1, 600_000),
    "before last.pt gets its name": ("replace:last.pt", 1, 14),
    "after last.pt has got its name": ("replace:last.pt", 1, 14),
    "while previous.pt is kept": ("replace:previous.pt", 1, 13),
    "while metrics.jsonl is written": ("write:metrics.jsonl", 1, 150),
    "while config.json is written": ("write:config.json", 1, 900),
    "inside PGD-20": ("attack", 25, 44),
    "inside AutoAttack": ("autoattack", 1, 2),
    "while an AutoAttack chunk is written": ("write:chunk-00001.json", 1, 500),
    "while student.pt is written": ("write:student.pt", 1, 300_000),
    "while result.json is written": ("write:result.json", 1, 900),
}


def kill_at_points(server: Server, home: Path, expected: dict, times: int, points: list[str], seed: int = 1):
    """SIGKILL at chosen places, at a random one of their occurrences; yields (place, how often, what happened)."""
    rng = random.Random(seed)
    for place in points:
        point, low, high = POINTS[place]
        for i in range(times):
            script, name = SCRIPTS[i % 2], f"point_{points.index(place)}_{i}"
            action = "kill after" if place.startswith("after") else "kill"
            fault = (point, rng.randint(low, high), action)
            server.run(script, [*SMALL, "--run_name", name], home, faults=[fault]).expect(-signal.SIGKILL)
            reproduces(server, script, home, name, expected[script])
            shutil.rmtree(home / "runs" / name)
        yield f"SIGKILL {place}", times, "the same command went on; everything bit for bit the same"


def interrupt(server: Server, home: Path, expected: dict, times: int, seed: int = 2) -> tuple[int, str]:
    """SIGTERM, SIGINT and SIGHUP in attacks, steps, PGD-20 and AutoAttack."""
    rng, places = random.Random(seed), (("attack", 2, 23), ("step", 1, 12), ("evaluation", 1, 1), ("autoattack", 1, 2))
    for i in range(times):
        script, name = SCRIPTS[i % 2], f"signal_{seed}_{i}"
        point, low, high = places[i % len(places)]
        action = ("SIGTERM", "SIGINT", "SIGHUP")[i % 3]
        # A checkpoint a day: what is saved is saved because of the signal.
        flags = [*SMALL, "--checkpoint_minutes", "1440", "--run_name", name]
        fault = (point, rng.randint(low, high), action)
        server.run(script, flags, home, faults=[fault]).expect(75, f"stopped by {action}.*goes on")
        if point == "evaluation":  # PGD-20 comes after the last step: nothing of the epoch may be lost
            assert "epoch 1, step 6" in server.run(script, flags, home, faults=[("start", 1, "")]).out
        reproduces(server, script, home, name, expected[script], flags)
        shutil.rmtree(home / "runs" / name)
    return times, "one line, exit status 75, state saved; the same command went on; everything bit for bit the same"


def storage(server: Server, home: Path, expected: dict, times: int, seed: int = 3) -> Iterator[tuple[str, int, str]]:
    """Failing writes; then the same command with room again."""
    rng, script = random.Random(seed), SCRIPTS[1]
    kinds = {
        "no space left while last.pt is written": ("write:last.pt", 1, 600_000, "full"),
        "no space left while metrics.jsonl is written": ("write:metrics.jsonl", 1, 150, "full"),
        "no space left while an AutoAttack chunk is written": ("write:chunk-00000.json", 1, 300, "full"),
        "no space left while student.pt is written": ("write:student.pt", 1, 300_000, "full"),
        "no space left while result.json is written": ("write:result.json", 1, 900, "full"),
        "fsync fails (I/O error)": ("fsync", 3, 28, "broken"),
    }
    for i, (kind, (point, low, high, action)) in enumerate(kinds.items()):
        for j in range(times):
            name = f"storage_{i}_{j}"
            fault = (point, rng.randint(low, high), action)
            outcome = server.run(script, [*SMALL, "--run_name", name], home, faults=[fault])
            outcome.expect(2, "error: cannot write .*(No space left|Input/output error)")
            assert not list((home / "runs" / name).rglob(".*.tmp"))
            reproduces(server, script, home, name, expected[script])
            shutil.rmtree(home / "runs" / name)
        yield kind, times, "one line, exit status 2, no partial file; the same command went on, bit for bit"


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[bool]:
    """Mount something at a folder; False where this process may not."""
    folder.mkdir()
    done = shutil.which("mount") is not None
    done = done and subprocess.run(["mount", *options, str(folder)], check=False, capture_output=True).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(folder)], check=True)


def real_mounts(server: Server, home: Path, expected: dict) -> Iterator[tuple[str, int, str]]:
    """A disk that fills up, one that is too small, one that is read-only: real file systems, where we may mount."""
    script = SCRIPTS[0]
    denied = "not done: this process may not mount file systems"
    with mounted(home / "full", "-t", "tmpfs", "-o", "size=4m", "tmpfs") as done:
        if done:
            flags = [*SMALL, "--run_dir", home / "full", "--run_name", "r"]
            fault = ("step", 8, f"fill {home / 'full'}")
            server.run(script, flags, home, faults=[fault]).expect(2, "error: cannot write .*No space left")
            (home / "full" / "filler").unlink()
            server.run(script, flags, home).expect(0)
            assert result_of(home / "full" / "r") == expected[script]
        outcome = "one line, exit status 2; with room again it went on, bit for bit" if done else denied
        yield "a disk (tmpfs) that fills up in mid-run", int(done), outcome
    with mounted(home / "small", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as done:
        if done:
            flags = [*SMALL, "--run_dir", home / "small", "--run_name", "r"]
            server.run(script, flags, home).expect(2, "error: .*needs 2 MiB for checkpoints, the disk has")
        yield (
            "a disk too small for the checkpoints",
            int(done),
            "refused at the start, exit status 2" if done else denied,
        )
    with mounted(home / "read_only", "-t", "tmpfs", "-o", "ro", "tmpfs") as done:
        if done:
            flags = [*SMALL, "--run_dir", home / "read_only", "--run_name", "r"]
            server.run(script, flags, home).expect(2, "error: cannot write .*Read-only file system; choose another")
        yield "a read-only run folder", int(done), "refused at the start, exit status 2" if done else denied


def stopped_run(server: Server, home: Path, name: str, script: str = SCRIPTS[0], flags: list[str] = SMALL) -> Path:
    """A run folder with last.pt and previous.pt, stopped in its second epoch."""
    fault = ("step", 9, "SIGTERM")
    server.run(script, [*flags, "--run_name", name], home, faults=[fault]).expect(75)
    return home / "runs" / name


def damaged_checkpoints(server: Server, home: Path, expected: dict, times: int, seed: int = 4):
    """last.pt truncated, or with one bit flipped: previous.pt takes over; both damaged: refused."""
    rng, script = random.Random(seed), SCRIPTS[0]
    whole = stopped_run(server, home, "to_damage")
    for kind in ("cut short", "with one bit flipped", "emptied"):
        for i in range(times):
            name = f"damaged_{i}"
            folder = home / "runs" / name
            shutil.copytree(whole, folder)
            config = json.loads((folder / "config.json").read_text())
            config["settings"]["run_name"] = name
            (folder / "config.json").write_text(json.dumps(config))
            content = bytearray((folder / "last.pt").read_bytes())
            position = rng.randrange(1000, len(content) - 1000)
            if kind == "with one bit flipped":
                content[position] ^= 1 << rng.randrange(8)
            else:
                del content[position if kind == "cut short" else 0 :]
            (folder / "last.pt").write_bytes(content)
            outcome = server.run(script, [*SMALL, "--run_name", name], home, faults=[("start", 1, "")])
            outcome.expect(2, "admitted")
            harmless = "put aside" not in outcome.out  # the flipped bit lay in padding between the tensors
            assert harmless == (folder / "last.pt").exists()
            assert harmless or (folder / "last.damaged.pt").read_bytes() == content
            reproduces(server, script, home, name, expected[script])
            shutil.rmtree(folder)
        yield f"last.pt {kind}", times, "previous.pt used, said so, damaged file put aside; bit for bit the same"
    for path in (whole / "last.pt", whole / "previous.pt"):
        path.write_bytes(path.read_bytes()[:-5000])
    before = tree(whole)
    outcome = server.run(script, [*SMALL, "--run_name", "to_damage"], home)
    outcome.expect(2, "error: .*last.pt is truncated.*previous.pt is truncated.*no other checkpoint is left: delete")
    assert tree(whole) == before
    shutil.rmtree(whole)
    yield "last.pt and previous.pt damaged", 1, "refused in one line, exit status 2; no file changed"


def numerical(server: Server, home: Path) -> Iterator[tuple[str, int, str]]:
    """Not finite, constant, collapsed: stopped within the epoch with status 3; what was saved is from before."""
    # 206 steps: settled from 200 on.
    long = [*SMALL, "--batch", "14", "--steps", "1", "--checkpoint_minutes", "10"]
    cases = {
        "loss NaN": ("loss", 9, "nan", SMALL, "the loss is not finite in epoch 2, step 3"),
        "weights NaN after the last step of an epoch": ("step", 12, "nan weights", SMALL, "weights are not finite in"),
        "student's logits the same for every image": ("step", 12, "constant", SMALL, "logits are the same for every"),
        "student collapsed to one class": ("step", 206, "one class", long, "predicts one class for every image"),
    }
    for i, (kind, (point, n, action, flags, message)) in enumerate(cases.items()):
        script = SCRIPTS[flags is SMALL]  # the baseline's steps take less time
        outcome = server.run(script, [*flags, "--run_name", f"bad_{i}"], home, faults=[(point, n, action)])
        outcome.expect(3, f"{message}.*lr 0.*nothing after it is saved.*last.pt")
        folder = home / "runs" / f"bad_{i}"
        assert not (folder / "student.pt").exists()
        assert not (folder / "result.json").exists()
        assert "nan" not in (folder / "metrics.jsonl").read_text().lower()
        server.run(script, [*flags, "--run_name", f"bad_{i}"], home, faults=[("start", 1, "")]).expect(2, "admitted")
        yield kind, 1, "stopped within the epoch, exit status 3; the checkpoint from before is good"
    outcome = server.run(
        SCRIPTS[1], [*SMALL, "--aa_examples", "0", "--run_name", "early"], home, faults=[("step", 3, "one class")]
    )
    outcome.expect(0)
    yield "student of one class in the first 200 steps", 1, "allowed: BatchNorm statistics are not settled"
    outcome = server.run(SCRIPTS[1], [*SMALL, "--run_name", "oom"], home, faults=[("attack", 3, "memory")])
    outcome.expect(2, "error: .*memory does not suffice at --batch 256 .*try --batch 128")
    server.run(SCRIPTS[1], [*SMALL, "--batch", "128", "--run_name", "oom"], home, faults=[("start", 1, "")]).expect(2)
    yield "out of GPU memory (raised on the CPU)", 1, "one line with the batch to try next, exit status 2"


def broken_teachers(server: Server, home: Path) -> Iterator[tuple[str, int, str]]:
    """A teacher that is not finite, one that says the same of every image, one of another number of classes."""
    import torch

    from cifar100_models import build_model
    from experiment import files

    for kind, status, message in (
        ("teacher with NaN weights", 2, "values that are not finite"),
        ("teacher with infinite logits", 3, "logits are not finite"),
        ("teacher with constant logits", 3, "logits are the same for every image"),
        ("teacher of another number of classes", 2, "has 7 classes but the data has 10"),
    ):
        model = build_model("RES-8", 7 if "another" in kind else 10)
        weight = list(model.parameters())[-2]
        with torch.no_grad():
            weight.fill_(float("nan") if "NaN" in kind else 3e38 if "infinite" in kind else 0)
            model.layer3[0].bn2.bias.fill_(10)  # features far above 0, so that 3e38 times their sum is infinite
        files.save_student(home / "broken.pt", model, "RES-8", weight.shape[0], {})
        outcome = server.run(SCRIPTS[0], [*SMALL, "--teacher", "broken.pt", "--run_name", kind], home)
        outcome.expect(status, message)
        yield kind, 1, f"refused before training, exit status {status}"


def two_processes(server: Server, home: Path) -> tuple[int, str]:
    """A second process on the folder of a running one."""
    from experiment.run import folder

    (home / "runs" / "shared").mkdir(parents=True, exist_ok=True)
    held = folder.lock(home / "runs" / "shared")
    try:
        server.run(SCRIPTS[0], [*SMALL, "--run_name", "shared"], home).expect(2, "in use by another process")
    finally:
        os.close(held)
    server.run(SCRIPTS[0], [*SMALL, "--run_name", "shared"], home, faults=[("start", 1, "")]).expect(2, "admitted")
    return 1, "the second is refused, exit status 2"


def clock_jumps(server: Server, home: Path, expected: dict) -> tuple[int, str]:
    """The wall clock set by up to 30 years at every reading."""
    name, script = "clock", SCRIPTS[1]
    server.run(script, [*SMALL, "--run_name", name], home, faults=[("clock", 1, "")]).expect(0)
    assert result_of(home / "runs" / name) == expected[script]
    seconds = json.loads((home / "runs" / name / "result.json").read_text())["seconds"]
    assert all(0 <= value < SECONDS for value in seconds.values()), seconds
    return 1, "no effect: durations are of the monotonic clock"


# Untrusted files and flags ------------------------------------------------------------------------------------------


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One to eight bytes changed, removed, added, moved or cut off."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        position = rng.randrange(len(data) + 1)
        # Half of the time near the ends, where the headers and directories of archives are.
        if rng.random() < 0.5:
            position = min(len(data), rng.choice((position % 300, len(data) - position % 900)))
        kind = rng.randrange(5)
        if kind <= 1 and position < len(data):
            data[position] = rng.randrange(256)
        elif kind == 2:
            del data[position : position + rng.randint(1, 64)]
        elif kind == 3:
            data[position:position] = rng.randbytes(rng.randint(1, 16))
        elif rng.random() < 0.1:
            del data[position:]
        if not data:
            break
    return bytes(data)


def refused_or_admitted(server: Server, home: Path, argv: list[str], script: str = SCRIPTS[0]) -> bool:
    """Run up to the start; assert a clean refusal or a clean start, and that no file changed. Whether it started."""
    before = tree(home)
    outcome = server.run(script, argv, home, faults=[("start", 1, "")]).expect(2, "(?m)^error: ")
    after = tree(home)
    shutil.rmtree(home / "runs" / "fuzzed", ignore_errors=True)
    new = {name for name in after if name.startswith("runs/fuzzed/")}
    assert {name: after[name] for name in after if name not in new} == before
    return "error: admitted" in outcome.err


def small_npz(path: Path, **changes: object) -> Path:
    """A valid .npz of 40 random images of ten classes, but for the changes."""
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(40) % 10,
        "x_test": rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(20) % 10,
    }
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def fuzz_files(server: Server, home: Path, times: int, seed: int = 5) -> Iterator[tuple[str, int, str]]:
    """Byte mutations of a data set, a teacher, a last.pt and a config.json: `times` of each."""
    rng = random.Random(seed)
    (home / "fuzz").mkdir()
    originals = {
        ".npz data set": small_npz(home / "fuzz" / "data.npz"),
        "teacher checkpoint": Path(shutil.copy(home / "teacher" / "student.pt", home / "fuzz" / "teacher.pt")),
    }
    folder = stopped_run(server, home, "resumed")
    (folder / "previous.pt").unlink()
    originals |= {"last.pt": folder / "last.pt", "config.json": folder / "config.json"}
    for kind, path in originals.items():
        content, started = path.read_bytes(), 0
        for _ in range(times):
            path.write_bytes(mutate(rng, content))
            flags = ["--run_name", "resumed" if path.parent == folder else "fuzzed"]
            if kind == ".npz data set":
                flags += ["--dataset", path, "--batch", "8"]
            elif kind == "teacher checkpoint":
                flags += ["--teacher", path]
            started += refused_or_admitted(server, home, [*SMALL, *flags])
        path.write_bytes(content)
        outcome = f"{times - started} refused in one line with exit status 2, {started} harmless; no file changed"
        yield f"random bytes of a {kind} changed", times, outcome


def crafted_files(server: Server, home: Path) -> Iterator[tuple[str, int, str]]:
    """Well-formed files with bad content."""
    import numpy as np
    import torch

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {home}/executed",)

    def checks(kind: str, cases: dict[str, Callable[[Path], object]], suffix: str, flag: str):
        for name, make in cases.items():
            path = home / f"crafted{suffix}"
            make(path)
            argv = [*SMALL, "--batch", "8", flag, path, "--run_name", "fuzzed"]
            assert not refused_or_admitted(server, home, argv), name
            path.unlink()
        assert not (home / "executed").exists()
        return kind, len(cases), f"refused: {', '.join(cases)}"

    x, y = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 10

    def bomb(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("x_train", "y_train", "x_test", "y_test"):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(
                        member, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40,)}
                    )
                    member.write(bytes(1 << 20))

    npz = {
        "object array": {"x_train": np.array([None] * 40, dtype=object)},
        "float images": {"x_train": x.astype(np.float32)},
        "NaN": {"x_train": np.full(x.shape, np.nan)},
        "NCHW": {"x_train": x.transpose(0, 3, 1, 2)},
        "other sizes": {"x_train": np.zeros((40, 9, 9, 3), np.uint8)},
        "float labels": {"y_train": y.astype(float)},
        "durations as labels": {"y_train": y.astype("timedelta64[s]")},
        "negative label": {"y_train": y - 1},
        "label out of range": {"y_test": np.full(20, 10)},
        "huge label": {"y_train": y.astype(np.uint64) + 2**63},
        "empty class": {"y_train": np.where(y == 3, 4, y)},
        "missing array": {"y_test": None},
        "no images": {"x_test": x[:0], "y_test": y[:0]},
        "too few labels": {"y_train": y[:-1]},
    }
    cases = {name: lambda path, c=changes: small_npz(path, **c) for name, changes in npz.items()}
    yield checks("crafted .npz", {**cases, "zip bomb": bomb}, ".npz", "--dataset")

    good = torch.load(home / "teacher" / "student.pt", weights_only=True)
    vast = {k: v.new_zeros(1).expand(1 << 40) if v.ndim else v for k, v in good["state_dict"].items()}

    def recompressed(path: Path) -> None:
        with (
            zipfile.ZipFile(home / "teacher" / "student.pt") as source,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
        ):
            for member in source.infolist():
                target.writestr(member.filename, source.read(member))

    saved = {
        "pickle that runs code": Evil(),
        "list": [1, 2],
        "other format": {**good, "format": "x"},
        "unknown architecture": {**good, "architecture": "RES-9000"},
        "architecture that is a list": {**good, "architecture": ["RES-8"]},
        "architecture too large for any memory": {**good, "architecture": "WRN-994-20"},
        "number of classes too large": {**good, "num_classes": 1 << 40},
        "number of classes as text": {**good, "num_classes": "10"},
        "weights larger than the file": {**good, "state_dict": vast},
        "weight missing": {**good, "state_dict": dict(list(good["state_dict"].items())[1:])},
        "state_dict that is a tensor": {**good, "state_dict": torch.zeros(3)},
        "numbers for weights": {**good, "state_dict": dict.fromkeys(good["state_dict"], 1.0)},
    }
    cases = {name: lambda path, c=content: torch.save(c, path) for name, content in saved.items()}
    cases |= {
        "old pickle that runs code": lambda path: torch.save(Evil(), path, _use_new_zipfile_serialization=False),
        "compressed archive": recompressed,
    }
    cases |= {"HTML page": lambda path: path.write_text("<!DOCTYPE html><html></html>")}
    cases |= {"empty file": lambda path: path.write_bytes(b"")}
    yield checks("crafted teacher checkpoint", cases, ".pt", "--teacher")

    folder = stopped_run(server, home, "crafted")
    (folder / "previous.pt").unlink()
    last, config = folder / "last.pt", folder / "config.json"
    state, settings = torch.load(last, weights_only=True), json.loads(config.read_text())

    def refused(kind: str, cases: dict[str, object], path: Path, write: Callable[[object], None]):
        original = path.read_bytes()
        for name, content in cases.items():
            write(content)
            assert not refused_or_admitted(server, home, [*SMALL, "--run_name", "crafted"]), name
        path.write_bytes(original)
        assert not (home / "executed").exists()
        return kind, len(cases), f"refused: {', '.join(cases)}"

    states = {
        "pickle that runs code": Evil(),
        "that of another run": {**state, "id": "0123456789ab"},
        "epoch out of range": {**state, "epoch": 10**9},
        "epoch as text": {**state, "epoch": "1"},
        "rows missing": {**state, "rows": []},
        "rows that are no rows": {**state, "rows": [1]},
        "generator state of a wrong size": {**state, "rng": state["rng"][:9]},
        "sums as text": {**state, "sums": {"adaad": "much"}},
        "without optimizer": {**state, "optimizer": {}},
        "of another network": {**state, "model": good["state_dict"] | {"fc.weight": torch.zeros(3)}},
    }
    yield refused("crafted last.pt", states, last, lambda content: torch.save(content, last))
    edits = {
        "another setting": {**settings, "settings": {**settings["settings"], "lr": 0.2}},
        "setting of a wrong type": {**settings, "settings": {**settings["settings"], "lr": "0.1"}},
        "setting missing": {**settings, "settings": {"lr": 0.1}},
        "setting unknown": {**settings, "settings": {**settings["settings"], "temperature": 4}},
        "settings as list": {**settings, "settings": []},
        "other data": {**settings, "dataset_sha256": "0" * 64},
        "other teacher": {**settings, "teacher_sha256": None},
        "other script": {**settings, "script": SCRIPTS[1] + ".py"},
        "id as number": {**settings, "id": 7},
        "other format": {**settings, "format": 2},
        "a list": [],
    }
    cases = {name: json.dumps(content) for name, content in edits.items()}
    cases |= {"not JSON": "{", "deep nesting": "[" * 100_000, "not UTF-8": "\udcff"}
    yield refused(
        "config.json edited by hand",
        cases,
        config,
        lambda text: config.write_bytes(text.encode(errors="surrogateescape")),
    )


def flag_values():
    """A hypothesis strategy of values that nobody meant for a flag."""
    from hypothesis import strategies as st

    odd = ["", " ", "-1", "0", "nan", "inf", "-inf", "1e400", "8/0", "8/255/2", "0x10", "1_0", "٣", "½", "None", "true",
           "..", "/", "a/b", "~", "*", "--", "-", "%s", "{}", "\n", "💾", "x" * 5000, "9" * 400, "RES-8 ", "WRN-28-999",
           "/dev/null", ".", "cuda:99", "cuda:-1", "missing.npz", "missing.pt"]  # fmt: skip
    # What a command line can hold: no NUL. Lone surrogates stand for bytes that are no UTF-8.
    text = st.text(st.characters(exclude_characters="\0"), max_size=20)
    return st.one_of(st.sampled_from(odd), text, st.floats().map(str), st.integers().map(str))


def fuzz_flags(server: Server, home: Path, times: int) -> tuple[int, str]:
    """Random values for random flags of random scripts, through hypothesis; no run ever begins."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from experiment import cli

    flags = sorted({*cli.METHOD_FLAGS, *cli.RUN_FLAGS, "preset", "teacher_path", "unknown"} - {"run_dir", "nowand"})
    done = 0

    @settings(max_examples=times, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(SCRIPTS), st.lists(st.tuples(st.sampled_from(flags), flag_values()), min_size=1, max_size=3))
    def fuzz(script, given_flags):
        nonlocal done
        extra = [part for name, value in given_flags for part in (f"--{name}", value)]
        before = tree(home)
        # --batch 1 is refused at the start: what is valid gets that far.
        argv = [*SMALL, "--run_name", "fuzzed", "--batch", "1", *extra]
        outcome = server.run(script, argv, home, faults=[("start", 1, "")])
        assert outcome.status == 2 or (outcome.status == 0 and "usage:" in outcome.out), (argv, outcome.err)
        if outcome.status == 2:
            outcome.expect(2, "^error: |\nerror: ")
        after = tree(home)
        assert {name: digest for name, digest in after.items() if not name.startswith("runs/")} == {
            name: digest for name, digest in before.items() if not name.startswith("runs/")
        }
        done += 1

    fuzz()
    shutil.rmtree(home / "runs" / "fuzzed", ignore_errors=True)
    return done, "always one line and exit status 2, no traceback; no file changed"


def odd_paths(server: Server, home: Path) -> tuple[int, str]:
    """Spaces, unicode and symbolic links in every path."""
    place = home / "ein Ordner" / "Ünïcödé 数字"
    place.mkdir(parents=True)
    shutil.copy(home / "teacher" / "student.pt", place / "der Lehrer.pt")
    (place / "link.pt").symlink_to(place / "der Lehrer.pt")
    small_npz(place / "meine Daten.npz")
    (home / "linked").symlink_to(place, target_is_directory=True)
    flags = [*SMALL, "--epochs", "1", "--aa_examples", "2", "--batch", "20"]
    for i, (teacher, data, runs) in enumerate(
        (
            (place / "der Lehrer.pt", place / "meine Daten.npz", place / "meine Läufe"),
            (home / "linked" / "link.pt", home / "linked" / "meine Daten.npz", home / "linked" / "l"),
        )
    ):
        flags += ["--teacher", teacher, "--dataset", data, "--run_dir", runs, "--run_name", f"Lauf {i} ☃"]
        server.run(SCRIPTS[0], flags, home).expect(0)
        assert (runs / f"Lauf {i} ☃" / "result.json").is_file()
    return 2, "trained, attacked and saved there"


# Determinism --------------------------------------------------------------------------------------------------------


def threads(home: Path) -> str:
    """The same run with one and with two threads, each twice: what differs, and by how much."""
    import torch

    states, losses = {}, {}
    for count in (1, 2):
        for attempt in range(2):
            name = f"threads_{count}_{attempt}"
            flags = [*SMALL, "--checkpoint_minutes", "10", "--aa_examples", "0", "--epochs", "1", "--steps", "10"]
            subprocess.run(
                [sys.executable, ROOT / f"{SCRIPTS[1]}.py", *flags, "--run_name", name],
                cwd=home,
                env={**os.environ, "OMP_NUM_THREADS": str(count)},
                check=True,
                capture_output=True,
            )
            states[name] = torch.load(home / "runs" / name / "student.pt", weights_only=True)["state_dict"]
            losses[name] = json.loads((home / "runs" / name / "metrics.jsonl").read_text())["loss"]
        first, second = states[f"threads_{count}_0"], states[f"threads_{count}_1"]
        assert all(torch.equal(first[key], second[key]) for key in first), f"{count} threads are not repeatable"
    one, two = states["threads_1_0"], states["threads_2_0"]
    floats = [key for key in one if one[key].is_floating_point()]
    difference = torch.cat([(one[key] - two[key]).flatten() for key in floats])
    size = torch.cat([one[key].flatten() for key in floats])
    relative = abs(losses["threads_1_0"] - losses["threads_2_0"]) / losses["threads_1_0"]
    return (
        "Same seed, same machine, same number of threads: identical bits (two runs each with 1 and with 2 threads). "
        f"1 against 2 threads, AdaAD+IGDM on digits, after one epoch ({len(size):,} weights and statistics): the loss "
        f"differs by {relative:.1e} of itself, the weights by at most {difference.abs().max():.1e}, and "
        f"{difference.norm() / size.norm():.1e} of their norm."
    )


# The run ------------------------------------------------------------------------------------------------------------


def everything(home: Path) -> Iterator[tuple[str, int, str]]:
    """All faults at full length, as (fault, times, what happened)."""
    server = Server()
    try:
        expected = prepare(server, home)
        yield "SIGKILL at a random moment", *kill_at_random(server, home, expected, 60)
        yield from kill_at_points(server, home, expected, 4, list(POINTS))
        yield "SIGTERM, Ctrl-C, hang-up", *interrupt(server, home, expected, 24)
        yield from storage(server, home, expected, 3)
        yield from real_mounts(server, home, expected)
        yield from damaged_checkpoints(server, home, expected, 10)
        yield "second process on one run folder", *two_processes(server, home)
        yield "clock set at random", *clock_jumps(server, home, expected)
        yield from numerical(server, home)
        yield from broken_teachers(server, home)
        shutil.rmtree(home / "runs")
        yield from crafted_files(server, home)
        yield from fuzz_files(server, home, 400)
        yield "random values for random flags", *fuzz_flags(server, home, 600)
        yield "paths with spaces, unicode, symbolic links", *odd_paths(server, home)
    finally:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="also write the table to this Markdown file")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    lines = ["| fault | times | what happened |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as place:
        for fault, times, outcome in everything(Path(place)):
            lines.append(f"| {fault} | {times} | {outcome} |")
            print(lines[-1], flush=True)
        measured = threads(Path(place))
    minutes = (time.monotonic() - began) / 60
    import torch

    from experiment.engine.machine import _cpu_name

    machine = f"{_cpu_name()}, torch {torch.__version__}"
    footer = f"{measured}\n\nPrinted by `make test-faults` in {minutes:.0f} minutes: {machine}."
    print(f"\n{footer}")
    if args.write:
        text = (
            "# Reliability\n\nEvery fault that was tried on real runs (AdaAD and AdaAD+IGDM, RES-8 on digits, on the "
        )
        text += "CPU), how often, and what happened. A row is printed only after its assertions held.\n\n"
        args.write.write_text(text + "\n".join(lines) + f"\n\n{footer}\n")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
