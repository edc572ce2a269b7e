"""A study as a job array of a SLURM cluster, through submitit; a preempted job is queued again and its run resumes."""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiment import UserError
from experiment.study.plan import FINISHED, RUNNING, PlannedRun, Study
from experiment.text import started_as

DEFAULTS = {"name": "study", "timeout_min": 24 * 60, "gpus_per_node": 1, "cpus_per_task": 8, "nodes": 1}
"""submitit's parameters; --slurm_options beats them."""
SECONDS_TO_SAVE, POLL_SECONDS = 60, 0.5


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
    sent = []
    if waiting:
        with executor.batch():
            sent = [executor.submit(_job(run)) for run in waiting]
    for run, job in zip(waiting, sent, strict=True):
        print(f"{run.name}: job {job.job_id}")
    print(f"output of the jobs: {folder}")
    return sent


def _job(run: PlannedRun) -> Job:
    return Job([sys.executable, *started_as(run.script.resolve()), *run.arguments])
