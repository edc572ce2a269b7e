"""Faults put into a running script from outside when a place is reached for the n-th time."""

import errno
import io
import os
import pkgutil
import signal
import time
from pathlib import Path

PLACES = {
    "start": "experiment.run.Run.start",
    "start of run": "experiment.run.Run.start",
    "step": "torch.optim.SGD.step",
    "attack": "attacks.project",
    "loss": "rslad_loss.adaad",
    "evaluation": "experiment.evaluation.accuracy.pgd_accuracy",
    "autoattack": "experiment.evaluation.autoattack._check_adversarial",
    "replace": "os.replace",
    "fsync": "os.fsync",
}
AFTER = ("", "kill after", "nan", "nan weights", "constant", "one class")
"""Actions after the function has run; all others come before it. "" leaves the run once it has been admitted."""


def sabotage(point: str, n: int, action: str) -> None:
    """Do `action` when `point` is reached for the n-th time (from 1).

    "write:FILE" counts the bytes of all writes of FILE; "replace:FILE" the renames to FILE.
    """
    from experiment import files

    point, _, name = point.partition(":")
    if point == "write":
        left = [n]
        files.open = lambda path, mode: _Watched(path, mode, left if f".{name}." in path.name else [1 << 60], action)
        return
    owner, _, function = PLACES[point].rpartition(".")
    owner = pkgutil.resolve_name(owner)
    original, count = getattr(owner, function), 0

    def reached(*args, **kwargs):
        nonlocal count
        counts = not name or Path(args[-1]).name == name
        count += counts
        due = counts and count == n
        if due and action not in AFTER:
            _act(action)
        value = original(*args, **kwargs)
        return _act_after(action, args, value) if due and action in AFTER else value

    setattr(owner, function, reached)


def _act_after(action: str, args: tuple, value: object) -> object:
    import torch

    from experiment import UserError

    if action == "":
        raise UserError("admitted")
    if action == "kill after":
        _act("kill")
    if action == "nan":
        return value * float("nan")
    weight, bias = args[0].param_groups[0]["params"][-2:]  # the last layer of SGD's network
    with torch.no_grad():
        if action == "one class":
            bias[3] += 1e4
        else:
            weight.fill_(float("nan") if action == "nan weights" else 0)
    return value


def _act(action: str) -> None:
    import torch

    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action.startswith("SIG"):
        for _ in range(2 if action.endswith(" twice") else 1):
            os.kill(os.getpid(), getattr(signal, action.partition(" ")[0]))
            time.sleep(0.01)
    elif action in ("ENOSPC", "EIO"):
        number = getattr(errno, action)
        raise OSError(number, os.strerror(number))
    elif action == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1")
    elif action.startswith("fill "):
        with open(Path(action[5:]) / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(1 << 12))
            except OSError:
                pass
    else:
        raise ValueError(action)


class _Watched(io.FileIO):
    """A file in which something happens after so many bytes, which are counted in a list for all files of a name."""

    def __init__(self, path: Path, mode: str, left: list[int], action: str) -> None:
        super().__init__(path, mode)
        self._left, self._action = left, action

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        if len(data) > self._left[0]:
            super().write(data[: self._left[0]])
            self._left[0] = 1 << 60
            _act(self._action)
        self._left[0] -= len(data)
        return super().write(data)
