"""Two processes under torchrun, stopped in every way in which people and schedulers do it, killed, and resumed."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fault_server import ROOT, SCRIPTS, SMALL, result_of

FLAGS = [*SMALL, "--batch", "128", "--steps", "4"]
"""24 steps in two epochs, some seconds of training."""
SECONDS = 180

PATTERNS = {
    "SIGTERM to the agent only": (signal.SIGTERM, "agent"),
    "SIGTERM to agent and workers": (signal.SIGTERM, "agent, workers"),
    "SIGINT to agent and workers": (signal.SIGINT, "agent, workers"),
    "SIGHUP to agent and workers": (signal.SIGHUP, "agent, workers"),
    "SIGTERM to rank 0 only": (signal.SIGTERM, "rank 0"),
    "SIGTERM to rank 1 only": (signal.SIGTERM, "rank 1"),
    "SIGUSR1 to the workers": (signal.SIGUSR1, "workers"),
    "SIGUSR1 to agent and workers": (signal.SIGUSR1, "agent, workers"),
}


class Torchrun:
    """One torchrun with two workers; what each rank says goes to a file of its own."""

    def __init__(self, script: str, flags: list[str], home: Path) -> None:
        self.logs = home / "logs"
        shutil.rmtree(self.logs, ignore_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
        launcher += [f"--master_port={port}", "--redirects=3", f"--log-dir={self.logs}"]
        self.agent = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / f"{script}.py"), *map(str, flags)],
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
        """Wait until rank 0 says what it is about to do: from there on, signals are the run's on every rank."""
        while not any("attack   epsilon" in path.read_text() for path in self.logs.glob("**/0/stdout.log")):
            assert self.agent.poll() is None, self.said(0) + self.said(1)
            time.sleep(0.05)

    def send(self, number: int, whom: str) -> None:
        """Signal the agent, both workers, or one of them."""
        workers = self.workers()
        pids = [self.agent.pid] if "agent" in whom else []
        pids += workers.values() if "workers" in whom else []
        pids += [workers[int(whom.split()[1])]] if "rank" in whom else []
        for pid in pids:
            os.kill(pid, number)

    def wait(self, workers: dict[int, int] | None = None) -> int:
        """Wait for the agent and for workers that outlive it; the agent's exit status."""
        workers = self.workers() if workers is None else workers
        status = self.agent.wait(SECONDS)
        end = time.monotonic() + SECONDS
        while any(_alive(pid) for pid in workers.values()) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(_alive(pid) for pid in workers.values()), "a worker outlived its agent"
        return status

    def said(self, rank: int) -> str:
        """A rank's stderr."""
        return "".join(path.read_text() for path in self.logs.glob(f"**/{rank}/stderr.log"))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def finished(script: str, flags: list[str], home: Path) -> None:
    """Run two ranks to their end."""
    run = Torchrun(script, flags, home)
    assert run.wait() == 0, run.said(0) + run.said(1)


def stop(script: str, flags: list[str], home: Path, folder: Path, number: int, whom: str, seconds: float) -> bool:
    """Signal a run so many seconds after its start; hold what it leaves against what it says. False: it was over."""
    import torch

    run = Torchrun(script, flags, home)
    run.wait_for_header()
    time.sleep(seconds)
    if (folder / "result.json").exists():
        run.wait()
        return False
    workers = run.workers()
    run.send(number, whom)
    run.wait(workers)
    if (folder / "result.json").exists():
        return False
    errors = run.said(0) + run.said(1)
    assert "Traceback" not in errors, errors
    (line,) = re.findall(r"stopped by (\w+) (.*?);", errors)
    assert line[0] == signal.Signals(number).name, errors
    if (folder / "last.pt").exists():
        saved = torch.load(folder / "last.pt", weights_only=True)
        place = re.match(r"in epoch (\d+) after step (\d+)", line[1])
        there = (int(place[1]) - 1, int(place[2])) if place else (int(re.search(r"after epoch (\d+)", line[1])[1]), 0)
        assert (saved["epoch"], saved["step"]) == there, errors
    else:
        assert line[1] == "before the first step", errors
    return True


def kill(script: str, flags: list[str], home: Path, folder: Path, whom: str, seconds: float) -> bool:
    """SIGKILL the agent and both workers, or one worker, after so many seconds. False: it was over."""
    run = Torchrun(script, flags, home)
    run.wait_for_header()
    time.sleep(seconds)
    if (folder / "result.json").exists():
        run.wait()
        return False
    workers = run.workers()
    run.send(signal.SIGKILL, whom)
    run.wait(workers)
    return not (folder / "result.json").exists()


def stopped_ranks(home: Path, times: int, seed: int = 6) -> Iterator[tuple[str, int, str]]:
    """Every pattern of signals so many times, and as many kills; yields (fault, how often, what happened)."""
    rng, script = random.Random(seed), SCRIPTS[1]
    finished(script, [*FLAGS, "--run_name", "ranks_whole"], home)
    expected = result_of(home / "runs" / "ranks_whole")
    for kind, (number, whom) in {
        **PATTERNS,
        "SIGKILL to agent and workers": (signal.SIGKILL, "agent, workers"),
        "SIGKILL to rank 1 only": (signal.SIGKILL, "rank 1"),
    }.items():
        done = 0
        while done < times:
            folder = home / "runs" / "ranks"
            # A checkpoint a day: what is saved is saved because of the signal. Killed, it must have been before.
            minutes = "1e-9" if number == signal.SIGKILL else "1440"
            flags = [*FLAGS, "--checkpoint_minutes", minutes, "--run_name", "ranks"]
            while not (folder / "result.json").exists() and done < times:
                if number == signal.SIGKILL:
                    done += kill(script, flags, home, folder, whom, rng.uniform(0.2, 5))
                else:
                    done += stop(script, flags, home, folder, number, whom, rng.uniform(0.2, 5))
            if not (folder / "result.json").exists():
                finished(script, flags, home)
            assert result_of(folder) == expected, kind
            shutil.rmtree(folder)
        end = "killed" if number == signal.SIGKILL else "all ranks stopped after the same step, one line, saved"
        yield f"torchrun, two ranks: {kind}", times, f"{end}; resumed, bit-identical"
