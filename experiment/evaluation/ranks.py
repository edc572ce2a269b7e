"""The ranks of a torch.distributed group that evaluates together, and how they share work of unequal length."""

import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from experiment import UserError

_LOOK_AGAIN = 0.5  # seconds between two looks at what the other ranks have done


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class SharedWork:
    """A list of tasks that all ranks work off: whoever is free takes the next one.

    Nobody waits at a barrier while another rank works, since a barrier gives up after the group's timeout. With
    several ranks, the counters are in a file of a folder that all of them see.
    """

    def __init__(self, tasks: list[int], folder: Path | None) -> None:
        """Begin together: what rank 0 was given is what all ranks work off.

        Args:
            tasks: the numbers of the tasks, on rank 0.
            folder: a folder that all ranks share; None with one rank only.
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
        """The tasks of this rank; each counts as done when the next one is asked for.

        Raises:
            UserError: a task of another rank failed.
        """
        while self._goes_on() and (number := self._store.add("taken", 1) - 1) < len(self.tasks):
            yield self.tasks[number]
            self._store.add("done", 1)

    def fail(self) -> None:
        """Let the other ranks end instead of waiting for this one."""
        self._store.add("failed", 1)

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Wait until all tasks of all ranks are done, however long that takes; the counters end with this.

        Args:
            meanwhile: called now and then, and once at the end.

        Raises:
            UserError: a task of another rank failed.
        """
        while self._goes_on() and self.counted("done") < len(self.tasks):
            meanwhile()
            time.sleep(_LOOK_AGAIN)
        meanwhile()
        if self._file is not None:
            dist.barrier()  # everyone has seen the end: a short wait
            if self._remove:
                self._file.unlink(missing_ok=True)

    def count(self, counter: str, number: int) -> None:
        """Add to a counter of all ranks: ``images`` or ``robust``."""
        self._store.add(counter, number)

    def counted(self, counter: str) -> int:
        """What a counter has come to over all ranks."""
        return int(self._store.get(counter))

    def _goes_on(self) -> bool:
        if self.counted("failed"):
            raise UserError("another rank stopped with an error; what was finished is kept")
        return True
