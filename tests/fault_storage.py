"""Disks that are full, too small, broken or read-only."""

import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fault_server import SCRIPTS, SMALL, Server, reproduces, result_of


def storage(server: Server, home: Path, expected: dict, times: int, seed: int = 3) -> Iterator[tuple[str, int, str]]:
    """Failing writes; then the same command with room again."""
    rng, script = random.Random(seed), SCRIPTS[1]
    kinds = {
        "no space left: last.pt": ("write:last.pt", 1, 600_000, "full"),
        "no space left: metrics.jsonl": ("write:metrics.jsonl", 1, 150, "full"),
        "no space left: an AutoAttack chunk": ("write:chunk-00000.json", 1, 300, "full"),
        "no space left: student.pt": ("write:student.pt", 1, 300_000, "full"),
        "no space left: result.json": ("write:result.json", 1, 900, "full"),
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
        yield kind, times, "one line, exit status 2, no partial file; resumed, bit-identical"


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
        outcome = "one line, exit status 2; resumed after space was freed, bit-identical" if done else denied
        yield "disk (tmpfs) that fills up during a run", int(done), outcome
    with mounted(home / "small", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as done:
        if done:
            flags = [*SMALL, "--run_dir", home / "small", "--run_name", "r"]
            server.run(script, flags, home).expect(2, "error: .*needs 2 MiB for checkpoints, but the disk has")
        yield (
            "disk too small for the checkpoints",
            int(done),
            "error before training, exit status 2" if done else denied,
        )
    with mounted(home / "read_only", "-t", "tmpfs", "-o", "ro", "tmpfs") as done:
        if done:
            flags = [*SMALL, "--run_dir", home / "read_only", "--run_name", "r"]
            server.run(script, flags, home).expect(2, "error: cannot write .*Read-only file system. Use another")
        yield "read-only run folder", int(done), "error before training, exit status 2" if done else denied
