"""Downloads of data sets and teachers by torch.hub, with a timeout and a reason in one line where they fail."""

import http.client
import socket
import sys
from pathlib import Path

import torch

from experiment import UserError

SECONDS_OF_SILENCE = 30
"""A connection that sends nothing for as long is given up."""


def download(url: str, file: Path) -> None:
    """Download a URL into a new file, whose content the caller checks.

    Raises:
        UserError: no connection, no answer in time, an HTTP error, a full disk.
    """
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_OF_SILENCE)
    try:
        torch.hub.download_url_to_file(url, str(file), progress=sys.stderr.isatty())
    except (OSError, http.client.HTTPException) as error:
        wrapped = getattr(error, "reason", None)  # URLError wraps the OSError that has the reason
        reason = str(wrapped if isinstance(wrapped, OSError) else error) or type(error).__name__
        raise UserError(" ".join(reason.split())) from error
    finally:
        socket.setdefaulttimeout(default)
