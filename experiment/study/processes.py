"""The processes of a study: several at a time, each with its threads or its device, stopped in order."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment import RunStopped
from experiment.study.plan import FINISHED, RUNNING, PlannedRun
from experiment.text import started_as

POLL_SECONDS = 0.5


@dataclass
class _Child:
    run: PlannedRun
    process: subprocess.Popen
    device: str | None


class Processes:
    """Runs one process per run, `jobs` at a time or one per device.

    Ctrl-C, SIGTERM, SIGUSR1 and a hang-up stop the children in order (each saves itself); no further one is started.

    Args:
        logs: folder of what the runs print, a file per run.
        jobs: processes at a time; the machine's cores are divided among them unless OMP_NUM_THREADS is set.
        devices: values of --device, one process on each at a time; they take the place of `jobs`.
    """

    def __init__(self, logs: Path, jobs: int = 1, devices: Sequence[str] = ()) -> None:
        self._logs = logs
        self._places: list[str | None] = list(devices) or [None] * jobs
        self._threads = max(1, len(os.sched_getaffinity(0)) // len(self._places))
        self._children: list[_Child] = []
        self._stopped_by: signal.Signals | None = None
        self._failed: dict[str, str] = {}

    def work(self, runs: Sequence[PlannedRun]) -> dict[str, str]:
        """Run all of them; return by name the last line of each failed run, which does not stop the others.

        Raises:
            RunStopped: a signal came; the children have ended.
        """
        waiting = list(runs)
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]  # the last is a cluster's warning
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            while (waiting and not self._stopped_by) or self._children:
                while waiting and not self._stopped_by and self._places:
                    self._start(waiting.pop(0))
                time.sleep(POLL_SECONDS if self._children else 0)
                self._children = [child for child in self._children if not self._has_ended(child)]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stopped_by:
            name = self._stopped_by.name
            raise RunStopped(f"stopped by {name}; the same command resumes it", RunStopped.INTERRUPTED)
        return self._failed

    def _start(self, run: PlannedRun) -> None:
        state = run.state()  # now: another process may have taken it since the grid was read
        if state in (FINISHED, RUNNING):
            print(f"{run.name}: {state}{' in another process' if state == RUNNING else ''}, skipped", flush=True)
            return
        device = self._places.pop(0)
        self._logs.mkdir(parents=True, exist_ok=True)
        with self._log(run).open("ab") as output:
            # A group of its own: the terminal's Ctrl-C must reach it once, through this process, and not twice.
            process = subprocess.Popen(
                [sys.executable, *started_as(run.script), *run.arguments, *(["--device", device] if device else [])],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(self._threads), **os.environ},
                process_group=0,
            )
        self._children.append(_Child(run, process, device))
        if self._stopped_by:  # while the process was made: it was no child yet
            process.send_signal(signal.SIGTERM)
        print(f"{run.name}: {'resumed' if (run.folder / 'last.pt').exists() else 'started'}", flush=True)

    def _log(self, run: PlannedRun) -> Path:
        return self._logs / f"{run.name}.log"

    def _has_ended(self, child: _Child) -> bool:
        status, run = child.process.poll(), child.run
        if status is None:
            return False
        self._places.append(child.device)
        end = "finished"
        if self._stopped_by and status == RunStopped.INTERRUPTED:
            saved = (run.folder / "last.pt").is_file()
            end = f"stopped, {'saved' if saved else 'before it had anything to save'}"
        elif status:
            lines = self._log(run).read_text(errors="replace").strip().splitlines()
            last = lines[-1].strip() if lines else "it printed nothing"
            self._failed[run.name] = f"{last} (exit status {status}, {self._log(run)})"
            end = f"failed: {self._failed[run.name]}"
        print(f"{run.name}: {end}", flush=True)
        return True

    def _on_signal(self, number: int, _frame: object) -> None:
        self._stopped_by = signal.Signals(number)
        for child in self._children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
