"""Stopping in order: a signal to this process, to another rank, or twice to the same one.

``torchrun`` forwards SIGTERM, SIGINT and SIGHUP to its workers and kills them 30 seconds later; a scheduler that stops
the whole job signals the workers itself, and the signal arrives twice. SIGUSR1 (SLURM's ``--signal``) it
forwards only with ``--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1``; without, the agent dies of it, and its workers
stop in order if the scheduler signals them too. Every worker ends with status 75, torchrun itself with 1.

Between two steps all ranks stop after one and the same step (``engine.requests``). While a network is measured, when
ranks are anywhere and nothing is unsaved, a rank that is told to stop tells the others through the store, waits until
all have heard, and leaves; the others leave wherever they are, also out of a collective that will never end.
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
"""Within so many seconds a second signal is the first one again: a shell and a study both pass a Ctrl-C on."""
AGENT_SECONDS = 30.0
"""The same under torchrun, whose agent kills its workers so long after the first signal."""
HEARD_SECONDS = 5.0
"""The longest wait for the other ranks to hear that this one leaves."""
BLOCKED_SECONDS = 10
"""After so many, a rank whose main thread is stuck in a collective is ended by its watching thread."""


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    pass


class Stopping:
    """Takes over the signals of a run.

    Attributes:
        busy: whether a signal is only noted, for the loop to heed at the next step boundary; otherwise the run stops
            where it is.
        number: the signal that this run was told to stop by, None so far.
    """

    def __init__(self, engine: Engine, save: Callable[[], None], describe: Callable[[str], str]) -> None:
        """Take over SIGTERM, SIGINT, SIGUSR1, and SIGHUP unless nohup has had it ignored.

        Args:
            save: called before the run stops where it is; saves what is not saved yet.
            describe: the line that says by which signal the run stopped, and where.
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
            self._stop()  # somebody does not want to wait for the step

    def requested(self) -> bool:
        """Whether this rank was told to stop."""
        return self.number is not None

    def leave(self) -> None:
        """Stop where the run is, between two things that could be lost.

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
        """Stop after a step that all ranks agreed on; everything is saved.

        Raises:
            RunStopped: always.
        """
        self._ignore_signals()
        self._engine.barrier()  # who left earlier would make torchrun signal the one that still saves
        self._stop()

    def _stop(self) -> None:
        self._ignore_signals()
        main = self._engine.main  # one line for all ranks
        raise RunStopped(self._describe(self._name()) if main else "", RunStopped.INTERRUPTED)

    def _name(self) -> str:
        if self.number is None:
            try:
                told = self._engine.store.check(["signal"])
                self.number = int(self._engine.store.get("signal")) if told else None
            except RuntimeError:  # the store has gone with the agent
                pass
        if self.number is None:
            return "a signal to another process"
        return signal.Signals(self.number).name

    @staticmethod
    def _ignore_signals() -> None:
        """From here on the process ends by itself, whatever else arrives."""
        # SIG_IGN at once would make Python complain of a signal that has arrived but was not handled yet; a function
        # of ours, on the other hand, is taken away a moment before the interpreter has ended.
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
        except RuntimeError:  # the store has gone with the agent; the gradients still carry the request
            pass

    def _count_heard(self) -> int:
        try:
            return self._engine.store.add("heard", 0)
        except RuntimeError:
            return self._engine.world

    def _watch(self) -> None:
        """In a thread of its own: wait until some rank leaves; say that it was heard; make the main thread leave."""
        store = self._engine.store
        try:
            while not store.check(["leaving"]):
                if self._over.wait(0.5):
                    return
            self._other_left = True
            os.kill(os.getpid(), signal.SIGTERM)
            store.add("heard", 1)
        except RuntimeError:  # the store has gone: nobody can say anything any more
            return
        if self._over.wait(BLOCKED_SECONDS):
            return
        if self._engine.main:
            print(self._describe(self._name()), file=sys.stderr, flush=True)
        os._exit(RunStopped.INTERRUPTED)

    def _end_watch(self) -> None:
        self._over.set()
        self._watcher.join(HEARD_SECONDS)
