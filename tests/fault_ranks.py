"""Faults of two processes under torchrun: signals to the agent, the workers or one rank; kills; resuming."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fault_kills import RESUMED
from fault_server import HANGS, ROOT, SCRIPTS, SMALL, Row, result_of

FLAGS = [*SMALL, "--train_examples", "0", "--batch", "128", "--steps", "4"]
"""24 steps in two epochs, some seconds of training."""

SIGNALS = (
    ("SIGINT", "to agent and workers"),
    ("SIGTERM", "to rank 1 only"),
    ("SIGTERM", "to the agent only"),
    ("SIGUSR1", "to the workers"),
    ("SIGKILL", "to rank 1 only"),
)


class Torchrun:
    """torchrun with two workers; the output of each rank goes to a file of its own."""

    def __init__(self, flags: list[str], home: Path) -> None:
        self.logs = home / "logs"
        shutil.rmtree(self.logs, ignore_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
        launcher += [f"--master_port={port}", "--redirects=3", f"--log-dir={self.logs}"]
        self.agent = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / f"{SCRIPTS[1]}.py"), *map(str, flags)],
            cwd=home,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def workers(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        for task in Path(f"/proc/{self.agent.pid}/task").glob("*/children"):
            for pid in map(int, task.read_text().split()):
                with suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
                    rank = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
                    found |= {int(rank[1]): pid} if rank else {}
        return found

    def wait_for_header(self) -> None:
        """Wait until rank 0 prints its settings: from there on, the run handles signals on every rank."""
        while not any("attack   epsilon" in path.read_text() for path in self.logs.glob("**/0/stdout.log")):
            assert self.agent.poll() is None, self.errors()
            time.sleep(0.05)

    def send(self, number: int, recipients: str, workers: dict[int, int]) -> None:
        pids = [self.agent.pid] if "agent" in recipients else []
        pids += workers.values() if "workers" in recipients else []
        pids += [pid for rank, pid in workers.items() if f"rank {rank}" in recipients]
        for pid in pids:
            os.kill(pid, number)

    def wait(self, workers: dict[int, int]) -> int:
        """Wait for the agent and for workers that outlive it; the agent's exit status."""
        status = self.agent.wait(HANGS)
        end = time.monotonic() + HANGS
        while any(_alive(pid) for pid in workers.values()):
            assert time.monotonic() < end, "a worker outlived its agent"
            time.sleep(0.1)
        return status

    def errors(self) -> str:
        """Stderr of both ranks."""
        return "".join(path.read_text() for path in self.logs.glob("**/[01]/stderr.log"))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def finish(flags: list[str], home: Path) -> None:
    """Let two ranks run to their end."""
    run = Torchrun(flags, home)
    assert run.wait(run.workers()) == 0, run.errors()


def stop(flags: list[str], home: Path, folder: Path, name: str, recipients: str, seconds: float) -> bool:
    """Signal a run after some seconds, and compare its message with what it saved. False: it had finished."""
    import torch

    run = Torchrun(flags, home)
    run.wait_for_header()
    time.sleep(seconds)
    workers = run.workers()
    with suppress(ProcessLookupError):  # it has just ended
        run.send(signal.Signals[name], recipients, workers)
    run.wait(workers)
    if (folder / "result.json").exists():
        return False
    if name == "SIGKILL":
        return True
    errors = run.errors()
    assert "Traceback" not in errors, errors
    if recipients == "to rank 1 only" and "another rank has ended" in errors:  # rank 0 waited for it in evaluation
        return True
    ((stopped_by, position),) = re.findall(r"stopped by (\w+) (.*?);", errors)
    assert stopped_by == name, errors
    if (folder / "last.pt").exists():
        saved = torch.load(folder / "last.pt", weights_only=True)
        epochs = json.loads((folder / "config.json").read_text())["settings"]["epochs"]
        expected = f"after epoch {saved['epoch']} of {epochs}"
        if saved["step"]:
            expected = f"in epoch {saved['epoch'] + 1} after step {saved['step']} of 12"
    else:
        expected = "before the first step"
    assert position == expected, errors
    return True


def stopped_ranks(home: Path, times: int, signals: Sequence[tuple[str, str]] = SIGNALS) -> Iterator[Row]:
    """Every signal so many times; a run is signalled until it finishes, and then compared with an undisturbed one."""
    rng = random.Random(6)
    finish([*FLAGS, "--run_name", "ranks_whole"], home)
    expected, folder = result_of(home / "runs" / "ranks_whole"), home / "runs" / "ranks"
    for name, recipients in signals:
        # A killed run resumes from its last checkpoint; a signalled one saves because of the signal.
        minutes = "1e-9" if name == "SIGKILL" else "1440"
        flags, done = [*FLAGS, "--checkpoint_minutes", minutes, "--run_name", "ranks"], 0
        while done < times:
            while not (folder / "result.json").exists() and done < times:
                done += stop(flags, home, folder, name, recipients, rng.uniform(0.2, 5))
            if not (folder / "result.json").exists():
                finish(flags, home)
            assert result_of(folder) == expected, (name, recipients)
            shutil.rmtree(folder)
        end = "killed" if name == "SIGKILL" else "all ranks stopped, state saved"
        yield f"torchrun, two ranks: {name} {recipients}", times, f"{end}; {RESUMED}"
