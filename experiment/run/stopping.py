"""Orderly stop after a signal.

``torchrun`` forwards SIGTERM, SIGINT and SIGHUP to its workers and kills them 30 seconds later. A scheduler that stops
the whole job also signals the workers, so the signal arrives twice. torchrun forwards SIGUSR1 (SLURM's ``--signal``)
only with ``--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1``. Without this flag SIGUSR1 kills the agent, and the
workers stop in order if the scheduler signals them too. Every worker exits with status 75, torchrun with 1.

During training, all ranks stop after the same step. During evaluation, all state is saved, and a rank that receives a
signal exits at once.
"""

import atexit
import signal
import time
from collections.abc import Callable
from types import FrameType

from experiment import RunStopped
from experiment.engine import Engine

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

REPEAT_SECONDS = 3.0
"""Seconds within which a second signal counts as a repetition: both a shell and a study forward Ctrl-C."""


class Stopping:
    """Signal handlers of a run: for SIGTERM, SIGINT, SIGUSR1, and SIGHUP unless it is ignored (nohup).

    Before the run stops, `save` saves unsaved state; `describe` makes the line to print from the signal's name.
    """

    def __init__(self, engine: Engine, save: Callable[[], None], describe: Callable[[str], str]) -> None:
        self.busy = False  # whether the loop handles signals at the next step; otherwise the run stops at once
        self.number, self._since = 0, 0.0  # the signal received, 0 for none
        self._engine, self._save, self._describe = engine, save, describe
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
            if not self.busy:
                self.leave()
        elif self._engine.world == 1 and time.monotonic() - self._since > REPEAT_SECONDS:
            self.leave()  # a later second signal: do not wait for the step

    def agreed(self) -> bool:
        """Whether any rank has received a signal; all ranks must call."""
        number = self._engine.highest(self.number)
        if number:  # do not overwrite a signal that has just arrived
            self.number = number
        return number > 0

    def leave(self) -> None:
        """Save unsaved state and raise RunStopped."""
        # The process is ending: ignore further signals. SIG_IGN would make Python report a pending signal as an error,
        # so a function handles it first; the interpreter removes that function shortly before its end, so SIG_IGN
        # follows at exit.
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
            atexit.register(signal.signal, number, signal.SIG_IGN)
        self._save()
        line = self._describe(signal.Signals(self.number).name) if self._engine.main else ""
        raise RunStopped(line, RunStopped.INTERRUPTED)

    def leave_together(self) -> None:
        """Stop like `leave`, after a step that all ranks agreed on."""
        self._engine.barrier()  # an earlier exit would make torchrun signal the rank that is still saving
        self.leave()
