"""The download of a teacher's weights: aside, checked, then renamed."""

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from torch import nn

from experiment import UserError
from experiment.teachers.weights import read_weights
from experiment.teachers.zoo import Source

SECONDS_OF_SILENCE = 30


def download(source: Source, name: str, target: Path) -> nn.Module:
    """Download the weights aside, read them, and only then give the file its name. One attempt.

    Raises:
        UserError: anything went wrong; no part of the file is left.
    """
    from tqdm import tqdm  # only downloads need it

    print(
        f"downloading {name} from {source.url} to {target} (gives up after {SECONDS_OF_SILENCE} s of silence)",
        flush=True,
    )
    # Some hosts turn urllib's own name away.
    request = urllib.request.Request(source.url, headers={"User-Agent": "Mozilla/5.0"})
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # The file first: a folder that cannot be written to shows before the network is waited for.
            with open(aside, "wb") as file, urllib.request.urlopen(request, timeout=SECONDS_OF_SILENCE) as response:
                if response.headers.get_content_type() == "text/html":
                    raise UserError("the answer is a web page (HTML), often about a download quota")
                total = int(response.headers.get("Content-Length") or 0)
                with tqdm(total=total or None, unit="B", unit_scale=True, desc=name, disable=None) as bar:
                    while block := response.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
                file.flush()
                os.fsync(file.fileno())
                if total and file.tell() != total:
                    raise UserError(f"the connection ended after {file.tell():,} of {total:,} bytes")
            try:
                model = read_weights(aside, name, source.build)
            except UserError as error:
                raise UserError(str(error).replace(str(aside), "what came")) from error
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
    except UserError:
        raise
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise UserError(str(error)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a malformed answer
        wrapped = getattr(error, "reason", None)  # URLError wraps the OSError that says what happened
        cause = wrapped if isinstance(wrapped, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise UserError(" ".join(reason.split())) from error
    return model
