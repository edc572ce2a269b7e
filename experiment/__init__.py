"""Infrastructure for the methods: flags, data, teachers, optimizer, engine, runs, evaluation, comparison."""


class UserError(ValueError):
    """A user's mistake: one line with the value and what is expected, printed without a traceback."""


class RunStopped(BaseException):
    """A run that ended early: what happened in one line, and the exit status of the process.

    Not an Exception, like KeyboardInterrupt: a signal may raise it anywhere, and an ``except Exception`` around the
    reading of a checkpoint must not take it for a damaged file.
    """

    INTERRUPTED = 75
    """Exit status after SIGTERM or Ctrl-C: the same command resumes the run (EX_TEMPFAIL of sysexits.h)."""
    DIVERGED = 3
    """Exit status after a numerical error: loss not finite, unusable teacher, collapsed student."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
