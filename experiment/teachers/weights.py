"""An architecture filled from a weights file."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from experiment import UserError, files

# Entries that a file may lack: normalisation constants that the architecture sets itself (files older than
# RobustBench's conversion), and counters that eval mode does not use.
_OPTIONAL = ("mu", "sigma", "mean", "std", "num_batches_tracked")


def read_weights(path: Path, name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Build the architecture and load a .safetensors file or a .pt with a state dict, bare or under "state_dict"."""
    content = _read_safetensors(path) if path.suffix == ".safetensors" else files.load(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    last = state.get("last") if isinstance(state, dict) else None
    state = last if isinstance(last, dict) else state  # beside "best": RobustBench uses the last epoch, too
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict")
    model = build()
    expected = model.state_dict()
    state = {_expected_key(str(key), expected): value for key, value in state.items()}
    faults = {
        "missing": [key for key in expected if key not in state and key.rpartition(".")[2] not in _OPTIONAL],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [key for key in expected if key in state and state[key].shape != expected[key].shape],
    }
    found = [
        f"{len(keys)} {fault} ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})"
        for fault, keys in faults.items()
        if keys
    ]
    if found:
        raise UserError(f"{path} does not fit {name}: entries {', '.join(found)}")
    model.load_state_dict(state, strict=False)  # copies into float32 parameters, whatever the file's type
    check_finite(model, path)
    return model


def check_finite(model: nn.Module, path: Path) -> None:
    """Raise UserError if a weight or a statistic is not finite."""
    broken = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{path} holds values that are not finite, in {broken[0]} and {len(broken) - 1} other entries")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError  # few users need it
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged ({' '.join(str(error).split())[:120]})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _expected_key(key: str, expected: dict[str, Tensor]) -> str:
    """The architecture's name of a key: without wrappers' prefixes, or with the one of a normalising wrapper."""
    bare = key
    while bare not in expected and bare.startswith(("module.", "model.")):
        bare = bare.partition(".")[2]
    return f"model.{bare}" if bare not in expected and f"model.{bare}" in expected else bare
