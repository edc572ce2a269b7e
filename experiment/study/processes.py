"""The runs of a study as processes of this machine, or as a job array of a SLURM cluster through submitit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment import RunStopped, UserError
from experiment.study.plan import FINISHED, RUNNING, PlannedRun, Study
from experiment.text import started_as

POLL_SECONDS = 0.5
DEFAULTS = {"name": "study", "timeout_min": 24 * 60, "gpus_per_node": 1, "cpus_per_task": 8, "nodes": 1}
"""submitit's parameters; --slurm_options beats them."""
SECONDS_TO_SAVE = 60


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


class Job:
    """One run as a job: its command in a process of its own, so that what is stopped is stopped in order."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Run to the end; raise if it failed, so that the job fails too."""
        self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, process_group=0)
        while self._process.poll() is None:  # wait() would hold the lock that the wait in checkpoint() needs
            time.sleep(POLL_SECONDS)
        if status := self._process.returncode:
            raise RuntimeError(f"exit status {status}: {' '.join(self.command)}")
        return 0

    def checkpoint(self) -> Any:
        """Preempted, or out of time: let the run save itself, and ask to be queued again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(SECONDS_TO_SAVE)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return DelayedSubmission(Job(self.command))


def submit(study: Study, jobs: int, options: Mapping[str, Any], cluster: str = "slurm") -> list[Any]:
    """Send what is not finished as one array, at most `jobs` at a time, after a missing teacher; return its jobs.

    `cluster` may also be submitit's local executor, which starts processes on this machine.

    Raises:
        UserError: no SLURM, an unknown option, or a teacher that is being trained elsewhere.
    """
    import submitit

    folder = study.folder / "logs" / "slurm"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        parallel = {"slurm_array_parallelism": jobs} if cluster == "slurm" else {}
        executor.update_parameters(**{**DEFAULTS, **parallel, **options})
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise UserError(f"submitit: {' '.join(str(error).split())}") from error
    if study.teacher and study.teacher.state() == RUNNING:
        raise UserError(f"{study.teacher.folder} is being trained; send the runs once it is finished")
    if study.teacher and study.teacher.state() != FINISHED:
        teacher = executor.submit(_job(study.teacher))
        print(f"{study.teacher.name}: job {teacher.job_id}")
        if cluster == "slurm":
            executor.update_parameters(slurm_additional_parameters={"dependency": f"afterok:{teacher.job_id}"})
        else:
            teacher.result()
    waiting = [run for run in study.runs if run.state() not in (FINISHED, RUNNING)]
    jobs_sent = executor.submit_array([_job(run) for run in waiting]) if waiting else []
    for run, job in zip(waiting, jobs_sent, strict=True):
        print(f"{run.name}: job {job.job_id}")
    print(f"output of the jobs: {folder}")
    return jobs_sent


def _job(run: PlannedRun) -> Job:
    return Job([sys.executable, *started_as(run.script.resolve()), *run.arguments])
