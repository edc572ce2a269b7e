"""Run a study as processes on this machine, or submit it as a job array to a SLURM cluster with submitit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiment import RunStopped, UserError
from experiment.study.plan import FINISHED, RUNNING, PlannedRun, Study
from experiment.text import started_as

POLL_SECONDS = 0.5
DEFAULTS = {"name": "study", "timeout_min": 24 * 60, "gpus_per_node": 1, "cpus_per_task": 8, "nodes": 1}
"""Default parameters of submitit; --slurm_options has precedence."""
SECONDS_TO_SAVE = 60


class Processes:
    """Run one process per run, `jobs` at a time or one per device; the output of a run goes to a file in `logs`.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP terminate the processes, which save their state; no further one is started.
    The cores are divided among the processes unless OMP_NUM_THREADS is set.
    """

    def __init__(self, logs: Path, jobs: int = 1, devices: Sequence[str] = ()) -> None:
        self._logs = logs
        self._places: list[str | None] = list(devices) or [None] * jobs
        self._threads = max(1, len(os.sched_getaffinity(0)) // len(self._places))
        self._started: list[subprocess.Popen] = []
        self._stopped_by: signal.Signals | None = None
        self._failed: dict[str, str] = {}

    def work(self, runs: Sequence[PlannedRun]) -> dict[str, str]:
        """Run all of them; return the last line of each failed run by name. A failed run does not stop the others."""
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]  # SIGUSR1 is a cluster's warning
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            with ThreadPoolExecutor(len(self._places)) as pool:  # a thread per place waits for its process
                list(pool.map(self._run, runs))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stopped_by:
            name = self._stopped_by.name
            raise RunStopped(f"stopped by {name}; the same command resumes it", RunStopped.INTERRUPTED)
        return self._failed

    def _run(self, run: PlannedRun) -> None:
        if self._stopped_by:
            return
        state = run.state()  # again, because another process may have started it since
        if state in (FINISHED, RUNNING):
            print(f"{run.name}: {state}{' in another process' if state == RUNNING else ''}, skipped", flush=True)
            return
        device, log = self._places.pop(0), self._logs / f"{run.name}.log"
        self._logs.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            # In its own process group, so that Ctrl-C in the terminal reaches it only once, through this process.
            process = subprocess.Popen(
                [sys.executable, *started_as(run.script), *run.arguments, *(["--device", device] if device else [])],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(self._threads), **os.environ},
                process_group=0,
            )
        self._started.append(process)
        if self._stopped_by:  # while the process was starting
            process.terminate()
        print(f"{run.name}: {'resumed' if (run.folder / 'last.pt').exists() else 'started'}", flush=True)
        status, end = process.wait(), "finished"
        self._places.append(device)
        if self._stopped_by and status == RunStopped.INTERRUPTED:
            saved = (run.folder / "last.pt").is_file()
            end = f"stopped, {'saved' if saved else 'before it had anything to save'}"
        elif status:
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            self._failed[run.name] = f"{lines[-1].strip()} (exit status {status}, {log})"
            end = f"failed: {self._failed[run.name]}"
        print(f"{run.name}: {end}", flush=True)

    def _on_signal(self, number: int, _frame: object) -> None:
        self._stopped_by = signal.Signals(number)
        for process in self._started:
            process.terminate()


class Job:
    """A SLURM job that runs one command as a child process, which saves its state when it is terminated."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Wait for the command; raise RuntimeError if it failed, so that the job fails too."""
        self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, process_group=0)
        while self._process.poll() is None:  # wait() would hold the lock that the wait in checkpoint() needs
            time.sleep(POLL_SECONDS)
        if status := self._process.returncode:
            raise RuntimeError(f"exit status {status}: {' '.join(self.command)}")
        return 0

    def checkpoint(self) -> Any:
        """On preemption or timeout: terminate the run, which saves its state, and requeue the job."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(SECONDS_TO_SAVE)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return DelayedSubmission(Job(self.command))


def submit(study: Study, jobs: int, options: Mapping[str, Any], cluster: str = "slurm") -> list[Any]:
    """Submit the unfinished runs as one array, `jobs` at a time, after the teacher; return the jobs."""
    import submitit

    folder = study.folder / "logs" / "slurm"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**{**DEFAULTS, "slurm_array_parallelism": jobs, **options})
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"submitit: {' '.join(str(error).split())}") from error
    if study.teacher and study.teacher.state() == RUNNING:
        raise UserError(f"{study.teacher.folder} is being trained; submit the runs when it is finished")
    sent = []
    if study.teacher and study.teacher.state() != FINISHED:
        sent = [executor.submit(_job(study.teacher))]
        print(f"{study.teacher.name}: job {sent[0].job_id}")
        executor.update_parameters(slurm_additional_parameters={"dependency": f"afterok:{sent[0].job_id}"})
    if waiting := [run for run in study.runs if run.state() not in (FINISHED, RUNNING)]:
        jobs_of_runs = executor.submit_array([_job(run) for run in waiting])
        for run, job in zip(waiting, jobs_of_runs, strict=True):
            print(f"{run.name}: job {job.job_id}")
        sent += jobs_of_runs
    print(f"output of the jobs: {folder}")
    return sent


def _job(run: PlannedRun) -> Job:
    return Job([sys.executable, *started_as(run.script.resolve()), *run.arguments])
