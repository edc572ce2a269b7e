"""A user's network: ``FILE.py:function``, a function that is called with num_classes.

The file may import installed packages and this project, but not files next to it.
"""

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path

from torch import nn


class ModelError(ValueError):
    """The network of the user's file cannot be built; the message is one line."""


def split(name: str) -> tuple[Path, str] | None:
    """File and function of ``FILE.py:function``, or None if the name is not of that form."""
    file, colon, function = name.rpartition(":")
    return (Path(file), function) if colon and file.endswith(".py") else None


def check(name: str) -> None:
    """Raise ModelError if the file does not exist or the function's name is invalid; nothing is run."""
    path, function = split(name)
    if not path.is_file():
        raise ModelError(f"model {name!r}: no such file: {path}")
    if not function.isidentifier():
        raise ModelError(f"model {name!r}: {function!r} is not the name of a function (expected FILE.py:function)")


def build(name: str, num_classes: int) -> nn.Module:
    """Run the file and call its function.

    Returns:
        The network, in train mode, with an attribute ``source_file``: {"path", "sha256", "function"} of what was run.

    Raises:
        ModelError: the file or function does not exist, fails, or does not return a network.
    """
    check(name)
    path, function = split(name)
    content = path.read_bytes()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module, here under a name that no import uses.
    sys.modules[f"{__name__}:{path}"] = module
    module.__name__ = f"{__name__}:{path}"
    try:
        # Run exactly the hashed bytes, and write no .pyc next to the user's file.
        exec(compile(content, path, "exec"), module.__dict__)
        if not callable(getattr(module, function, None)):
            raise ValueError(f"it has no function {function}")
        model = getattr(module, function)(num_classes)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ModelError(f"model {name!r} cannot be built: {type(error).__name__}: {error}{where}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r} is a {type(model).__name__}; {function} must return a torch.nn.Module")
    digest = hashlib.sha256(content).hexdigest()
    model.source_file = {"path": str(path.resolve()), "sha256": digest, "function": function}
    return model.train()
