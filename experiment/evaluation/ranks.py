"""Ranks of a torch.distributed group, and a shared list of tasks of unequal duration."""

import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from experiment import UserError

_LOOK_AGAIN = 0.5  # seconds between two looks at the other ranks' progress


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class SharedWork:
    """A list of tasks for all ranks: a free rank takes the next task.

    No rank waits at a barrier while another works, because a barrier has a timeout. With several ranks, the counters
    are in a file in a shared folder.
    """

    def __init__(self, tasks: list[int], folder: Path | None) -> None:
        """Start on all ranks, with the tasks of rank 0.

        Args:
            tasks: the numbers of the tasks, used on rank 0.
            folder: a folder that all ranks share; None for a single rank.
        """
        rank, world = ranks()
        self._file = None
        self._store: dist.Store = dist.HashStore()
        if world > 1:
            begun = [tasks, uuid.uuid4().hex]
            dist.broadcast_object_list(begun)
            tasks, name = begun
            self._file = Path(folder) / f".shared-{name}"
            self._store = dist.FileStore(str(self._file), world)
            self._store.set_timeout(timedelta(minutes=5))
        self.tasks, self._remove = tasks, rank == 0
        for counter in ("taken", "done", "failed", "images", "robust"):
            self._store.add(counter, 0)

    def mine(self) -> Iterator[int]:
        """Yield the tasks of this rank; each counts as done when the next one is requested.

        Raises:
            UserError: a task of another rank failed.
        """
        while self._goes_on() and (number := self._store.add("taken", 1) - 1) < len(self.tasks):
            yield self.tasks[number]
            self._store.add("done", 1)

    def fail(self) -> None:
        """Make the other ranks stop instead of waiting for this one."""
        self._store.add("failed", 1)

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Wait, without a timeout, until all tasks are done; then delete the counters.

        Args:
            meanwhile: called repeatedly while waiting, and once at the end.

        Raises:
            UserError: a task of another rank failed.
        """
        while self._goes_on() and self.counted("done") < len(self.tasks):
            meanwhile()
            time.sleep(_LOOK_AGAIN)
        meanwhile()
        if self._file is not None:
            dist.barrier()  # a short wait: all tasks are done
            if self._remove:
                self._file.unlink(missing_ok=True)

    def count(self, counter: str, number: int) -> None:
        """Add to a counter of all ranks: ``images`` or ``robust``."""
        self._store.add(counter, number)

    def counted(self, counter: str) -> int:
        """Return the value of a counter over all ranks."""
        return int(self._store.get(counter))

    def _goes_on(self) -> bool:
        if self.counted("failed"):
            raise UserError("another rank stopped with an error; finished tasks are kept")
        return True
