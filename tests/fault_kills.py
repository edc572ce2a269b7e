"""Faults during a run: kills, signals, failing disks, diverging networks. One table, one way to check a row."""

import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fault_server import SCRIPTS, SMALL, Row, Server, reproduces, result_of
from filelock import FileLock

POINTS = {
    "inside the attack": ("attack", 2, 23),
    "inside an optimizer step": ("step", 3, 11),
    "writing last.pt": ("write:last.pt", 1, 9_000_000),
    "before renaming last.pt": ("replace:last.pt", 1, 14),
    "after renaming last.pt": ("replace:last.pt", 1, 14),
    "renaming previous.pt": ("replace:previous.pt", 1, 13),
    "writing metrics.jsonl": ("write:metrics.jsonl", 1, 500),
    "writing config.json": ("write:config.json", 1, 1900),
    "inside PGD-20": ("attack", 25, 44),
    "inside AutoAttack": ("autoattack", 1, 2),
    "writing an AutoAttack chunk": ("write:chunk-00001.json", 1, 700),
    "writing student.pt": ("write:student.pt", 1, 300_000),
    "writing result.json": ("write:result.json", 1, 1900),
}
"""Places of a run and the first and last of their occurrences; one between them is drawn."""


@dataclass(frozen=True)
class End:
    """How a run with a fault must end, and what must follow.

    Attributes:
        status, message: exit status, and pattern of stderr.
        outcome: the last cell of the table.
        resumes: the command given again must finish with the expected result.
        diverged: no file has the diverged state, and the command given again must be admitted.
        flags: flags of the run beside SMALL.
    """

    status: int
    message: str
    outcome: str
    resumes: bool = False
    diverged: bool = False
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """A row of the table: at one of the occurrences low to high of a point, do an action, in so many runs."""

    kind: str
    point: str
    low: int
    high: int
    action: str
    times: int
    end: End


RESUMED = "resumed, bit-identical"
# A checkpoint a day: what is saved is saved because of the signal.
DAILY = ("--checkpoint_minutes", "1440")
# 206 steps: BatchNorm statistics count as converged from 200 on.
LONG = ("--train_examples", "309", "--batch", "3", "--steps", "1", "--checkpoint_minutes", "10")
KILLED = End(-signal.SIGKILL, "", RESUMED, resumes=True)
STOPPED = End(75, "stopped by SIG.*resumes", f"one line, exit status 75, state saved; {RESUMED}", True, flags=DAILY)
NO_DISK = End(
    2,
    "error: cannot write .*(No space left|Input/output error)",
    f"one line, exit status 2, no partial file; {RESUMED}",
    resumes=True,
)
ALLOWED = End(0, "", "allowed", flags=(*LONG, "--aa_examples", "0", "--stop_on_collapse", "0"))
EARLY = End(0, "", "allowed: BatchNorm statistics have not converged", flags=("--aa_examples", "0"))
NO_MEMORY = End(
    2,
    "error: out of GPU memory .*use a smaller batch",
    "one line that suggests a batch size, exit status 2",
)


def diverged(message: str, flags: tuple[str, ...] = ()) -> End:
    message += ".*lr 0.*The diverged state is not saved.*last.pt"
    outcome = "stopped within the epoch, exit status 3; the previous checkpoint is valid"
    return End(3, message, outcome, diverged=True, flags=flags)


FAULTS = [
    *(
        Fault(f"SIGKILL: {place}", *where, "kill after" if place.startswith("after") else "kill", 4, KILLED)
        for place, where in POINTS.items()
    ),
    Fault("SIGTERM", "attack", 2, 23, "SIGTERM twice", 6, STOPPED),
    Fault("Ctrl-C", "step", 1, 12, "SIGINT", 6, STOPPED),
    Fault("hang-up", "evaluation", 1, 1, "SIGHUP", 6, STOPPED),
    Fault("SIGUSR1", "autoattack", 1, 2, "SIGUSR1 twice", 6, STOPPED),
    Fault("no space left: last.pt", "write:last.pt", 1, 9_000_000, "ENOSPC", 3, NO_DISK),
    Fault("no space left: metrics.jsonl", "write:metrics.jsonl", 1, 500, "ENOSPC", 3, NO_DISK),
    Fault("no space left: an AutoAttack chunk", "write:chunk-00000.json", 1, 600, "ENOSPC", 3, NO_DISK),
    Fault("no space left: student.pt", "write:student.pt", 1, 300_000, "ENOSPC", 3, NO_DISK),
    Fault("no space left: result.json", "write:result.json", 1, 1900, "ENOSPC", 3, NO_DISK),
    Fault("fsync fails (I/O error)", "fsync", 3, 28, "EIO", 3, NO_DISK),
    Fault("loss NaN", "loss", 9, 9, "nan", 1, diverged("the loss is not finite in epoch 2, step 3")),
    Fault("weights NaN after the last step of an epoch", "step", 12, 12, "nan weights", 1, diverged("weights are not")),
    Fault("student's logits the same for every image", "step", 12, 12, "constant", 1, diverged("logits are the same")),
    Fault("student collapsed to one class", "step", 206, 206, "one class", 1, diverged("predicts one class", LONG)),
    Fault("student of one class, with --stop_on_collapse 0", "step", 206, 206, "one class", 1, ALLOWED),
    Fault("student of one class in the first 200 steps", "step", 3, 3, "one class", 1, EARLY),
    Fault("out of GPU memory (raised on the CPU)", "attack", 3, 3, "memory", 1, NO_MEMORY),
]


def check(server: Server, home: Path, expected: dict, fault: Fault, times: int) -> Row:
    """Put the fault into `times` runs; return the row of the table."""
    rng, end = random.Random(fault.kind), fault.end
    flags, folder = [*SMALL, *end.flags], home / "runs" / "faulty"
    argv = [*flags, "--run_name", folder.name]
    for i in range(times):
        script, at = SCRIPTS[i % 2], rng.randint(fault.low, fault.high)
        outcome = server.run(script, argv, home, faults=[(fault.point, at, fault.action)])
        outcome.expect(end.status, end.message)
        assert end.status < 0 or not list(folder.rglob(".*.tmp"))
        if end.diverged:
            assert not (folder / "student.pt").exists()
            assert not (folder / "result.json").exists()
            assert "nan" not in (folder / "metrics.jsonl").read_text().lower()
            server.run(script, argv, home, faults=[("start", 1, "")]).expect(2, "admitted")
        if end.resumes:
            again = reproduces(server, script, home, folder.name, expected[script], flags)
            # PGD-20 comes after the last step: no part of the epoch is repeated.
            assert fault.point != "evaluation" or "resumed  in epoch 2 after step 6 of 6" in again.out
        shutil.rmtree(folder)
    return fault.kind, times, end.outcome


def kill_at_random(server: Server, home: Path, expected: dict, times: int) -> Row:
    """SIGKILL after a random time, again and again until the run is finished; then the next run."""
    rng, kills, runs = random.Random(0), 0, 0
    while kills < times:
        script, name = SCRIPTS[runs % 2], f"killed_{runs}"
        runs += 1
        argv, limit = [*SMALL, "--run_name", name], 2.5
        while (outcome := server.run(script, argv, home, kill_after=rng.uniform(0.05, limit))).status:
            assert outcome.status == -signal.SIGKILL, outcome.err
            kills, limit = kills + 1, 1.1 * limit  # a slow machine needs longer from its start to its next checkpoint
        assert result_of(home / "runs" / name) == expected[script], name
        shutil.rmtree(home / "runs" / name)
    outcome = f"{runs} runs resumed to the end; weights, metrics and AutoAttack bit-identical"
    return "SIGKILL at a random moment", kills, outcome


def two_processes(server: Server, home: Path) -> Row:
    """Start a second process on the folder of a running one."""
    argv = [*SMALL, "--run_name", "shared"]
    (home / "runs" / "shared").mkdir(parents=True)
    with FileLock(home / "runs" / "shared" / ".lock"):
        server.run(SCRIPTS[0], argv, home).expect(2, "in use by another process")
    server.run(SCRIPTS[0], argv, home, faults=[("start", 1, "")]).expect(2, "admitted")
    return "second process on one run folder", 1, "the second stops, exit status 2"


REAL_FILE_SYSTEMS = (
    (
        "disk (tmpfs) that fills up during a run",
        "size=4m",
        "error: cannot write .*No space left",
        f"one line, exit status 2; {RESUMED}",
    ),
    (
        "disk too small for the checkpoints",
        "size=1m",
        "error: .*needs 2 MiB for checkpoints, but the disk has",
        "error before training, exit status 2",
    ),
    (
        "read-only run folder",
        "ro",
        "error: cannot write .*Read-only file system. Use another",
        "error before training, exit status 2",
    ),
)


def real_file_systems(server: Server, home: Path, expected: dict) -> Iterator[Row]:
    """Yield a row for each of REAL_FILE_SYSTEMS, where this process may mount them."""
    folder, script = home / "mounted", SCRIPTS[0]
    folder.mkdir()
    flags = [*SMALL, "--run_dir", folder, "--run_name", "r"]
    for kind, options, message, outcome in REAL_FILE_SYSTEMS:
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
            yield kind, 0, "not done: this process may not mount file systems"
            continue
        try:
            faults = [("step", 8, f"fill {folder}")] if RESUMED in outcome else []
            server.run(script, flags, home, faults=faults).expect(2, message)
            if faults:
                (folder / "filler").unlink()
                server.run(script, flags, home).expect(0)
                assert result_of(folder / "r") == expected[script]
        finally:
            subprocess.run(["umount", folder], check=True)
        yield kind, 1, outcome
