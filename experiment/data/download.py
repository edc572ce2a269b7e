"""Downloads of data sets: one process at a time, aside, checked, then renamed."""

import http.client
import io
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from experiment import UserError

SECONDS_OF_SILENCE = 30


@contextmanager
def place_aside(folder: Path, dataset: str) -> Iterator[Path]:
    """An empty folder within `folder`, for this process alone; what a killed process left in it is removed first.

    Raises:
        UserError: the folder cannot be written to.
    """
    from filelock import FileLock  # only downloads need it

    aside = folder / f".{dataset}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{dataset}.lock"):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            try:
                yield aside
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another --data_dir") from error


def fetch(what: str, work: Callable[[], None], advice: str) -> None:
    """Do the work of a download quietly, with a limit on silence.

    Args:
        what: what is said not to be there, for the error.

    Raises:
        UserError: it failed.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_OF_SILENCE)  # torchvision waits for ever
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            work()
    except (RuntimeError, OSError, EOFError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{what} could not be downloaded ({reason}); {advice}") from error
    finally:
        socket.setdefaulttimeout(before)
