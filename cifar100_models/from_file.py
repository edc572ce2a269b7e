"""A network of the user's own: ``FILE.py:function``, a function that is called with num_classes.

The file may import installed packages and this project; it is not found by name and its neighbours are not.
"""

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path

from torch import nn


class ModelError(ValueError):
    """The user's file cannot be built from; one line that says why."""


def split(name: str) -> tuple[Path, str] | None:
    """File and function of ``FILE.py:function``, or None if the name is not of that form."""
    file, colon, function = name.rpartition(":")
    return (Path(file), function) if colon and file.endswith(".py") else None


def check(name: str) -> None:
    """Raise the ModelError of a file that is not there or a function that cannot be one; nothing is run."""
    path, function = split(name)
    if not path.is_file():
        raise ModelError(f"model {name!r}: there is no file {path}")
    if not function.isidentifier():
        raise ModelError(f"model {name!r}: {function!r} is not the name of a function; FILE.py:function is needed")


def build(name: str, num_classes: int) -> nn.Module:
    """Run the file and call its function.

    Returns:
        The network, in train mode, with an attribute ``source_file``: {"path", "sha256", "function"} of what was run.

    Raises:
        ModelError: there is no such file or function, it fails, or what it returns is no network.
    """
    check(name)
    path, function = split(name)
    content = path.read_bytes()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up; under a name that no import asks for.
    sys.modules[f"{__name__}:{path}"] = module
    module.__name__ = f"{__name__}:{path}"
    try:
        # The bytes that are hashed are those that run, and no .pyc is written beside a file that is not ours.
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
