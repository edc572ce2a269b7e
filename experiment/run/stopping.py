"""Orderly stop after a signal to this process or to another rank.

``torchrun`` forwards SIGTERM, SIGINT and SIGHUP to its workers and kills them 30 seconds later. A scheduler that stops
the whole job also signals the workers, so the signal arrives twice. torchrun forwards SIGUSR1 (SLURM's ``--signal``)
only with ``--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1``. Without this flag SIGUSR1 kills the agent, and the
workers stop in order if the scheduler signals them too. Every worker exits with status 75, torchrun with 1.

During training, all ranks stop after the same step. During evaluation, ranks are at different places and all state is
saved. A rank that receives a signal then notifies the others through the store, waits until all have read the message,
and exits; the others exit at once, also from a collective that will never end.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from experiment import RunStopped
from experiment.engine import Engine

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

REPEAT_SECONDS = 3.0
"""Seconds within which a second signal counts as a repetition: both a shell and a study forward Ctrl-C."""
HEARD_SECONDS = 5.0
"""Seconds to wait for the other ranks to read the message."""
BLOCKED_SECONDS = 10
"""Seconds after which the watching thread ends a rank whose main thread is stuck in a collective."""


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    pass


class Stopping:
    """Signal handlers of a run.

    Attributes:
        busy: whether the loop handles signals at the next step boundary; otherwise the run stops at once.
        number: the signal received, 0 for none.
    """

    def __init__(self, engine: Engine, save: Callable[[], None], describe: Callable[[str], str]) -> None:
        """Install handlers for SIGTERM, SIGINT, SIGUSR1, and SIGHUP unless it is ignored (nohup).

        Args:
            save: called before an immediate stop; saves unsaved state.
            describe: maps the signal's name to the line that the run prints.
        """
        self.busy, self.number = False, 0
        self._engine, self._save, self._describe = engine, save, describe
        self._since, self._other_left = 0.0, False
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        if engine.world > 1:
            self._over = threading.Event()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
            # A thread that is in the store while the interpreter ends aborts the process.
            atexit.register(self._end_watch)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._other_left:
            self.leave()
        elif not self.number:
            self.number, self._since = number, time.monotonic()
            if not self.busy:
                self.leave()
        elif self._engine.world == 1 and time.monotonic() - self._since > REPEAT_SECONDS:
            self._stop()  # a later second signal: do not wait for the step

    def agreed(self) -> bool:
        """Whether any rank has received a signal; all ranks must call."""
        number = self._engine.highest(self.number)
        if number:  # do not overwrite a signal that has just arrived
            self.number = number
        return number > 0

    def leave(self) -> None:
        """Stop at once, after saving unsaved state.

        Raises:
            RunStopped: always.
        """
        self._ignore_signals()
        self._save()
        if self._engine.world > 1 and not self._other_left:
            with suppress(RuntimeError):  # the store has ended with torchrun's agent
                store, end = self._engine.store, time.monotonic() + HEARD_SECONDS
                store.set("leaving", str(int(self.number)))
                while store.add("heard", 0) < self._engine.world and time.monotonic() < end:
                    time.sleep(0.05)
        self._stop()

    def leave_together(self) -> None:
        """Stop after a step that all ranks agreed on, with all state saved.

        Raises:
            RunStopped: always.
        """
        self._ignore_signals()
        self._engine.barrier()  # an earlier exit would make torchrun signal the rank that is still saving
        self._stop()

    def _stop(self) -> None:
        self._ignore_signals()
        raise RunStopped(self._line() if self._engine.main else "", RunStopped.INTERRUPTED)

    def _line(self) -> str:
        return self._describe(signal.Signals(self.number).name)

    @staticmethod
    def _ignore_signals() -> None:
        """Ignore further signals: the process is ending."""
        # SIG_IGN would make Python report a pending signal as an error, so a function handles it first; the interpreter
        # removes that function shortly before its end, so SIG_IGN follows at exit.
        for number in SIGNALS:
            signal.signal(number, _do_nothing)
            atexit.register(signal.signal, number, signal.SIG_IGN)

    def _watch(self) -> None:
        """In a thread: wait until a rank exits, confirm that the message was read, and make the main thread exit."""
        store = self._engine.store
        try:
            while not store.check(["leaving"]):
                if self._over.wait(0.5):
                    return
            self.number, self._other_left = int(store.get("leaving")), True
            os.kill(os.getpid(), signal.SIGTERM)
            store.add("heard", 1)
        except RuntimeError:  # the store ended: no further messages
            return
        if self._over.wait(BLOCKED_SECONDS):
            return
        if self._engine.main:
            print(self._line(), file=sys.stderr, flush=True)
        os._exit(RunStopped.INTERRUPTED)

    def _end_watch(self) -> None:
        self._over.set()
        self._watcher.join(HEARD_SECONDS)
