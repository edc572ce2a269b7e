"""CIFAR-10 and CIFAR-100: torchvision's archives, downloaded where absent, and checked."""

import http.client
import io
import socket
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np

from experiment import UserError
from experiment.data.arrays import Arrays


def read_cifar(dataset: str, folder: Path) -> Arrays:
    """CIFAR-10 or CIFAR-100, in the order of the archives."""
    from experiment.compat import import_torchvision

    torchvision = import_torchvision()
    kind = torchvision.datasets.CIFAR100 if dataset == "cifar100" else torchvision.datasets.CIFAR10
    archive = folder / kind.filename
    advice = f"fetch {kind.url} in a browser and put it at {archive}"
    try:
        splits = [kind(str(folder), train=train, download=False) for train in (True, False)]
    except RuntimeError:
        # Absent, truncated and altered files all give this one error; a good archive beside them mends each case.
        if archive.exists() and not torchvision.datasets.utils.check_integrity(str(archive), kind.tgz_md5):
            # torchvision would overwrite it; it is not ours to delete.
            raise UserError(
                f"{archive} is damaged or incomplete (its MD5 is not {kind.tgz_md5}); remove it, {advice}"
            ) from None
        present, unpacked = archive.exists(), folder / kind.base_folder
        altered = f"{unpacked} is incomplete or altered (MD5)" if unpacked.exists() else ""
        if not present:
            print(f"{altered or f'{dataset} is not in {folder}'}; downloading {kind.url}", flush=True)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # torchvision waits for ever
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                splits = [kind(str(folder), train=train, download=True) for train in (True, False)]
        except (RuntimeError, OSError, EOFError, http.client.HTTPException) as error:
            if not present and archive.exists():
                archive.unlink()  # half an archive, or a web page saved under its name
            reason = " ".join(str(error).split())[:120]
            found = f"{altered}, and " if altered else ""
            raise UserError(f"{found}{dataset} could not be downloaded ({reason}); {advice}") from error
        finally:
            socket.setdefaulttimeout(before)
    train, test = splits
    labels = np.asarray(train.targets), np.asarray(test.targets)
    return Arrays(train.data, labels[0], test.data, labels[1], len(train.classes), tuple(train.classes))
