"""Orderly stop after a signal to this process or to another rank.

``torchrun`` forwards SIGTERM, SIGINT and SIGHUP to its workers and kills them 30 seconds later. A scheduler that stops
the whole job also signals the workers, so the signal arrives twice. torchrun forwards SIGUSR1 (SLURM's ``--signal``)
only with ``--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1``. Without this flag SIGUSR1 kills the agent, and the
workers stop in order if the scheduler signals them too. Every worker exits with status 75, torchrun with 1.

During training, all ranks stop after the same step (``engine.requests``). During evaluation, ranks are at different
places and all state is saved. A rank that receives a signal then notifies the others through the store, waits until all
have read the message, and exits; the others exit at once, also from a collective that will never end.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from experiment import RunStopped
from experiment.engine import Engine

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

REPEAT_SECONDS = 3.0
"""Seconds within which a second signal counts as a repetition: both a shell and a study forward Ctrl-C."""
AGENT_SECONDS = 30.0
"""The same under torchrun, whose agent kills its workers this long after the first signal."""
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
        number: the signal received, or None.
    """

    def __init__(self, engine: Engine, save: Callable[[], None], describe: Callable[[str], str]) -> None:
        """Install handlers for SIGTERM, SIGINT, SIGUSR1, and SIGHUP unless it is ignored (nohup).

        Args:
            save: called before an immediate stop; saves unsaved state.
            describe: maps the signal's name to the line that the run prints.
        """
        self.busy, self.number = False, None
        self._engine, self._save, self._describe = engine, save, describe
        self._since, self._other_left = 0.0, False
        self._repeat = AGENT_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else REPEAT_SECONDS
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
        elif self.number is None:
            self.number, self._since = number, time.monotonic()
            if not self.busy:
                self.leave()
            self._tell("signal")
            self._engine.requests.ask("stop")
        elif time.monotonic() - self._since > self._repeat:
            self._stop()  # a later second signal: do not wait for the step

    def requested(self) -> bool:
        """Whether this rank has received a signal."""
        return self.number is not None

    def leave(self) -> None:
        """Stop at once, after saving unsaved state.

        Raises:
            RunStopped: always.
        """
        self._ignore_signals()
        self._save()
        if self._engine.world > 1 and not self._other_left:
            self._tell("leaving")
            end = time.monotonic() + HEARD_SECONDS
            while self._count_heard() < self._engine.world and time.monotonic() < end:
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
        main = self._engine.main  # rank 0 prints the line
        raise RunStopped(self._describe(self._name()) if main else "", RunStopped.INTERRUPTED)

    def _name(self) -> str:
        if self.number is None:
            try:
                sent = self._engine.store.check(["signal"])
                self.number = int(self._engine.store.get("signal")) if sent else None
            except RuntimeError:  # the store has gone with the agent
                pass
        if self.number is None:
            return "a signal to another process"
        return signal.Signals(self.number).name

    @staticmethod
    def _ignore_signals() -> None:
        """Ignore further signals: the process is ending."""
        # SIG_IGN would make Python report a pending signal as an error, so a function handles it first; the interpreter
        # removes that function shortly before its end, so SIG_IGN follows at exit.
        for number in SIGNALS:
            signal.signal(number, _do_nothing)
            atexit.register(signal.signal, number, signal.SIG_IGN)

    # -- the other ranks ----------------------------------------------------------------------------------------------

    def _tell(self, key: str) -> None:
        if self._engine.store is None:
            return
        try:
            self._engine.store.set("signal", str(int(self.number)))
            self._engine.store.set(key, str(int(self.number)))
        except RuntimeError:  # the store ended with the agent; the request is also sent with the gradients
            pass

    def _count_heard(self) -> int:
        try:
            return self._engine.store.add("heard", 0)
        except RuntimeError:
            return self._engine.world

    def _watch(self) -> None:
        """In a thread: wait until a rank exits, confirm that the message was read, and make the main thread exit."""
        store = self._engine.store
        try:
            while not store.check(["leaving"]):
                if self._over.wait(0.5):
                    return
            self._other_left = True
            os.kill(os.getpid(), signal.SIGTERM)
            store.add("heard", 1)
        except RuntimeError:  # the store ended: no further messages
            return
        if self._over.wait(BLOCKED_SECONDS):
            return
        if self._engine.main:
            print(self._describe(self._name()), file=sys.stderr, flush=True)
        os._exit(RunStopped.INTERRUPTED)

    def _end_watch(self) -> None:
        self._over.set()
        self._watcher.join(HEARD_SECONDS)
