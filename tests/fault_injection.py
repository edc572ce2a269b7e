"""Faults put into a running script from outside: at a place, when it is reached for the n-th time."""

import errno
import importlib
import io
import os
import random
import signal
import time
from pathlib import Path


def sabotage(point: str, n: int, action: str) -> None:
    """Do `action` when `point` is reached for the n-th time (from 1); "write:FILE": n bytes of FILE were written."""
    import torch

    import attacks
    import rslad_loss
    from experiment import UserError, files, run

    point, _, name = point.partition(":")
    if point == "clock":
        real = time.time
        time.time = lambda: real() + random.Random(n).uniform(-1e9, 1e9)
    elif point == "start":
        start = run.Run.start

        def admitted(self, *args):
            start(self, *args)
            raise UserError("admitted")

        run.Run.start = admitted
    elif point == "write":
        files.open = lambda path, mode: _Watched(path, mode, n, action, name)
    elif point in ("replace", "fsync"):
        real = getattr(os, point)
        calls = iter(range(1, 1 << 30))

        def watched(*args):
            if not (name and Path(args[-1]).name != name) and next(calls) == n:
                if action == "kill after":
                    real(*args)
                _act(action)
            return real(*args)

        setattr(os, point, watched)
    else:
        module, function = {
            "attack": (attacks, "project"),
            "step": (torch.optim.SGD, "step"),
            "evaluation": (importlib.import_module("experiment.evaluation.accuracy"), "pgd_accuracy"),
            "autoattack": (importlib.import_module("experiment.evaluation.autoattack"), "_check_adversarial"),
            "loss": (rslad_loss, "adaad"),
            "start of run": (run.Run, "start"),
        }[point]
        original, calls = getattr(module, function), iter(range(1, 1 << 30))

        def reached(*args, **kwargs):
            due = next(calls) == n
            if due and action not in ("nan", "nan weights", "constant", "one class"):
                _act(action)
            value = original(*args, **kwargs)
            if due and action == "nan":
                return value * float("nan")
            if due and action in ("nan weights", "constant", "one class"):
                _spoil(args[0].param_groups[0]["params"][-2:], action)
            return value

        setattr(module, function, reached)


def _spoil(last_layer: list, action: str) -> None:
    import torch

    weight, bias = last_layer
    with torch.no_grad():
        if action == "one class":
            bias[3] += 1e4
        else:
            weight.fill_(float("nan") if action == "nan weights" else 0)


def _act(action: str) -> None:
    import torch

    if action in ("kill", "kill after"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif action.startswith("SIG"):
        for _ in range(2 if action.endswith(" twice") else 1):
            os.kill(os.getpid(), getattr(signal, action.partition(" ")[0]))
            time.sleep(0.01)
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "broken":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
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
    """A file in which something happens after so many bytes."""

    def __init__(self, path: Path, mode: str, n: int, action: str, name: str) -> None:
        super().__init__(path, mode)
        self._left = n if not name or f".{name}." in Path(path).name else 1 << 60
        self._action = action

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        if "w" in self.mode and len(data) > self._left:
            super().write(data[: self._left])
            self._left = 1 << 60
            _act(self._action)
        self._left -= len(data)
        return super().write(data)
