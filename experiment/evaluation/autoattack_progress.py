"""The progress of AutoAttack over all ranks."""

import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from experiment.evaluation.autoattack_files import AUTOATTACK
from experiment.evaluation.ranks import SharedWork


@contextmanager
def signals_held() -> Iterator[None]:
    """Deliver the signals that arrive in the block after it.

    tqdm takes locks to draw. Its cleanup raises RuntimeError if a signal handler raises while it takes one, and that
    error would replace the handler's. Outside of the main thread, where no handler runs, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    # None is a handler that was not set by Python, and cannot be set again.
    handlers = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not None}
    for number in handlers:
        signal.signal(number, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in held:
        signal.raise_signal(number)


class AutoAttackProgress:
    """Images done on all ranks, the attack at work on this one, and the share that is robust so far.

    On a terminal a bar; elsewhere a line per chunk.
    """

    def __init__(self, images: int, done: Iterable[dict[str, Any]], work: SharedWork, *, show: bool) -> None:
        """Begin with what was done before.

        Args:
            images: of all chunks together.
            done: the records of the chunks that were there.
            work: what the ranks share; it counts for all of them.
        """
        from tqdm import tqdm

        self._show, self._total, self._work = show, images, work
        self._images_before, self._robust_before = map(sum, zip((0, 0), *map(_counts, done), strict=True))
        self._said = self._images_before
        shown = show and sys.stderr.isatty()
        self._bar = tqdm(total=images, unit="image", desc="AutoAttack", disable=not shown, dynamic_ncols=True)
        self.look()

    def say(self, line: str) -> None:
        """Print a line on stderr, above the bar."""
        if self._show:
            with signals_held():
                self._bar.write(line, file=sys.stderr)

    def begin(self, attack: str, record: dict[str, Any]) -> None:
        """Show the attack that starts now, and the robust share with the chunk at hand."""
        images, robust = self._so_far()
        *_, latest = record["flags"].values()
        share = (robust + latest.count("1")) / (images + record["images"])
        with signals_held():
            self._bar.set_postfix_str(f"{attack}, robust {100 * share:.2f} %")

    def finish(self, record: dict[str, Any]) -> None:
        """Count a chunk that is done now, for all ranks."""
        for counter, count in zip(("images", "robust"), _counts(record), strict=True):
            self._work.count(counter, count)
        self.look()

    def look(self) -> None:
        """Bring what is shown up to what all ranks have done."""
        images, robust = self._so_far()
        with signals_held():
            self._bar.update(images - self._bar.n)
        if self._bar.disable and images > self._said:
            self._said = images
            self.say(f"AutoAttack: {images} of {self._total} images, robust {100 * robust / images:.2f} %")

    def _so_far(self) -> tuple[int, int]:
        images, robust = (self._work.counted(counter) for counter in ("images", "robust"))
        return self._images_before + images, self._robust_before + robust

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def _counts(record: dict[str, Any]) -> tuple[int, int]:
    return record["images"], record["flags"][AUTOATTACK[-1]].count("1")
