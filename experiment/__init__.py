"""Everything around a method: flags, data, teachers, optimizer, engine, run folder, evaluation, comparison."""


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the value and what is allowed; never a traceback."""


class RunStopped(BaseException):
    """A run that ended early, in order: what happened in one line, and the exit status of the process.

    Like KeyboardInterrupt no Exception: a signal may raise it anywhere, and an ``except Exception`` around the reading
    of a checkpoint must not take it for a damaged file.
    """

    INTERRUPTED = 75
    """Exit status after SIGTERM or Ctrl-C: saved, start the same command again (EX_TEMPFAIL of sysexits.h)."""
    DIVERGED = 3
    """Exit status after a numerical fault: loss not finite, teacher broken, student collapsed."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
