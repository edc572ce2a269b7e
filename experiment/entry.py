"""How every command ends: its exit status, and one line instead of a traceback for a user's mistake."""

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from cifar100_models import ModelError
from experiment import RunStopped, UserError

_OUT_OF_MEMORY = ("out of memory", "unable to find an engine", "alloc_failed", "allocation_failed")


def guard(main: Callable[[], None]) -> None:
    """Run a script's main; a user's mistake or a stopped run becomes one line on stderr and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may have characters that the terminal cannot show
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # compare.py ... | head
        # Otherwise the interpreter prints an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, ModelError) as error:
        _leave(f"error: {error}", 2)
    except RunStopped as stop:
        _leave(str(stop), stop.status)
    except KeyboardInterrupt:  # outside the signal handling of a run
        _leave("interrupted", 128 + signal.SIGINT)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition(". ")[0]  # the rest is about torch's allocator
        advice = "use a smaller batch (a run needs another --run_name for it), or free some"
        _leave(f"error: out of GPU memory ({reason}); {advice}", 2)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether device memory is exhausted; only torch's own allocator has an exception for it.

    Libraries fail with others: cuDNN with a RuntimeError about an allocation or a missing engine, CUDA with an
    AcceleratorError.
    """
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _OUT_OF_MEMORY)


def _leave(line: str, status: int) -> NoReturn:
    if line:  # of several ranks, one prints
        print(" ".join(line.split()), file=sys.stderr)
    sys.exit(status)
