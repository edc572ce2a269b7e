"""Downloads of data sets and teachers: one attempt that cannot hang, and a reason in one line where it fails."""

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from experiment import UserError

SECONDS_OF_SILENCE = 30
"""A connection that sends nothing for as long is given up."""


def download(url: str, file: Path) -> None:
    """Download a URL into a new file, of which the caller checks the content and removes what is left after an error.

    Raises:
        UserError: no connection, no answer in time, an HTTP error, a web page, fewer bytes than announced, a full disk.
    """
    from tqdm import tqdm  # only downloads need it

    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})  # some hosts reject urllib's own
    try:
        # The file is opened first: a folder that cannot be written to is an error before the network is waited for.
        with open(file, "wb") as content, urllib.request.urlopen(request, timeout=SECONDS_OF_SILENCE) as response:
            if response.headers.get_content_type() == "text/html":
                raise UserError("the answer is a web page (HTML), often about a download quota")
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, unit="B", unit_scale=True, disable=None) as bar:
                while block := response.read(1 << 20):
                    content.write(block)
                    bar.update(len(block))
            content.flush()
            os.fsync(content.fileno())
            if total and content.tell() != total:
                raise UserError(f"the connection ended after {content.tell():,} of {total:,} bytes")
    except UserError:
        raise
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise UserError(str(error)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a malformed header
        wrapped = getattr(error, "reason", None)  # URLError wraps the OSError that has the reason
        cause = wrapped if isinstance(wrapped, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise UserError(" ".join(reason.split())) from error
