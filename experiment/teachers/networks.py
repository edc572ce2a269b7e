"""Trained networks by name or path: run folders, checkpoints, RobustBench names, bare weights; frozen, as teachers."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar100_models import build_model, check_model_name
from experiment import UserError, files
from experiment.teachers.zoo import CLASSES, robustbench_name, source_of, unknown_network, zoo_of

_HOW = "--arch NAME with FILE (evaluate.py), or --teacher NAME --teacher_path FILE; NAME: RES-18, ..., FILE.py:function"

# Entries that a file may lack: normalisation constants that the architecture sets itself (files older than
# RobustBench's conversion), and counters that eval mode does not use.
_OPTIONAL = ("mu", "sigma", "mean", "std", "num_batches_tracked")


@dataclass(frozen=True)
class Network:
    """A trained network and where it comes from.

    Attributes:
        model: in eval mode; maps (N, 3, H, W) in [0, 1] to logits (N, num_classes), with any normalisation inside.
        name: the name or path that the user gave.
        architecture: a name that ``build_model`` knows, or RobustBench's.
        path: the file of its weights.
        sha256: SHA-256 of that file. torch's old file format has no checksums: only this shows a flipped byte.
        info: ``info``, ``epoch`` and ``step`` of a checkpoint of this project; {} otherwise.
    """

    model: nn.Module
    num_classes: int
    name: str
    architecture: str
    path: Path
    sha256: str
    info: dict[str, Any] = field(default_factory=dict)


class FrozenTeacher(nn.Module):
    """A network without trainable parameters that stays in eval mode, also after ``train()``.

    Attributes:
        model: the network; maps (N, 3, H, W) in [0, 1] to logits (N, num_classes).
        num_classes, name, sha256: as ``Network``'s.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.model = network.model.requires_grad_(False)
        self.num_classes = network.num_classes
        self.name = network.name
        self.sha256 = network.sha256
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def load_network(
    what: str | Path,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    dataset: str = "cifar100",
    weights: str | Path | None = None,
    model_dir: str | Path = "models",
    device: str | torch.device = "cpu",
    weights_flag: str = "--weights",
    unfinished: bool = True,
) -> Network:
    """Load a network in eval mode and float32; the global random generators do not change.

    Args:
        what: a run folder; a checkpoint of this project; BDM, DEC, LTD or a RobustBench Linf name for the data set,
            read from ``<model_dir>/<dataset>/Linf/<name>.pt`` or downloaded there; or, with `arch`, bare weights.
        arch: architecture of bare weights (a state dict in a .pt, or .safetensors): what ``build_model`` takes, or a
            RobustBench name.
        num_classes: that of the data; None accepts any.
        weights: the file of a name: RobustBench's, downloaded by hand, or bare weights of an architecture.
        weights_flag: the flag of weights, for messages.
        unfinished: whether a run's last.pt is accepted.

    Raises:
        UserError: none of these; another number of classes; a file that is missing and cannot be downloaded, damaged,
            unsafe, or does not fit the architecture. Files of the user are never changed or deleted.
    """
    what = os.fspath(what)
    name = robustbench_name(what if arch is None else arch)
    if arch is not None and name is not None:
        what, weights = arch, what
    elif name is None and weights is not None:
        what, arch = os.fspath(weights), what
    info = {}
    # Building draws initial weights, of which the run's own random numbers must not depend.
    with torch.random.fork_rng(devices=[]):
        if name is not None:
            zoo = zoo_of(what, dataset, num_classes)
            classes, architecture = CLASSES[zoo], name
            _check_classes(what, classes, num_classes)
            model, path = _robustbench(what, name, zoo, weights, weights_flag, Path(model_dir))
        elif arch is not None:
            path, classes, architecture = Path(what), num_classes or CLASSES.get(dataset, 10), arch
            model = _bare_weights(path, arch, classes)
        else:
            model, entries = _own(Path(what), unfinished)
            path, classes, architecture = entries["path"], entries["num_classes"], entries["architecture"]
            info = {key: entries.get(key) for key in ("info", "epoch", "step")}
            _check_classes(what, classes, num_classes)
    return Network(model.eval().to(device), classes, what, architecture, path, files.file_sha256(path), info)


def load_teacher(
    name_or_path: str | Path,
    num_classes: int | None = None,
    teacher_path: str | Path | None = None,
    dataset: str = "cifar100",
    *,
    model_dir: str | Path = "models",
    device: str | torch.device = "cpu",
) -> FrozenTeacher:
    """Load a teacher, frozen, in eval mode and float32; the global random generators do not change.

    Args:
        name_or_path: a RobustBench name for the data set (BDM, DEC, LTD for short), a checkpoint or finished run folder
            of this project, or an architecture (what ``build_model`` takes) with its weights in teacher_path.
        num_classes: that of the data; None accepts any.
        teacher_path: the weights of a name: RobustBench's file, a state dict, or .safetensors.
        dataset: the data set, which has its own RobustBench networks.

    Raises:
        UserError: as ``load_network``.
    """
    check_teacher_name(name_or_path, teacher_path)
    place = {"num_classes": num_classes, "dataset": dataset, "model_dir": model_dir, "device": device}
    options = {"weights": teacher_path, "weights_flag": "--teacher_path", "unfinished": False}
    return FrozenTeacher(load_network(name_or_path, **options, **place))


def check_teacher_name(
    name_or_path: str | Path, teacher_path: str | Path | None = None, path_flag: str = "--teacher_path"
) -> None:
    """Check that a name and a file can be a teacher, before anything heavy is imported; messages name `path_flag`."""
    name = os.fspath(name_or_path)
    if robustbench_name(name) is None:
        if _is_architecture(name):
            if teacher_path is None:
                raise UserError(f"{name!r} is an architecture: give its weights with {path_flag}")
        elif not os.path.lexists(name):
            raise unknown_network(name)
        elif teacher_path is not None:
            raise UserError(
                f"{path_flag} {teacher_path} needs the name of its architecture, such as BDM, not the path {name!r}"
            )
    if teacher_path is not None and not os.path.isfile(teacher_path):
        raise UserError(f"{path_flag} {teacher_path}: no such file")


def _is_architecture(name: str) -> bool:
    try:
        check_model_name(name)
    except ValueError:
        return False
    return True


def _check_classes(what: str, classes: int, num_classes: int | None) -> None:
    if num_classes is not None and num_classes != classes:
        raise UserError(f"{what!r} has {classes} classes but the data has {num_classes}")


def _own(path: Path, unfinished: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A checkpoint or run folder of this project, and its entries."""
    if not os.path.lexists(path):
        raise unknown_network(str(path))
    if path.suffix == ".safetensors":
        raise UserError(f"{path} holds weights without their architecture; use {_HOW}")
    try:
        entries = files.open_student(path, unfinished=unfinished)
        model = files.build_student(entries)
    except UserError as error:
        foreign = path.is_file() and "is not a student checkpoint" in str(error)
        hint = f"; for a RobustBench file use --teacher BDM --teacher_path {path}, for other weights {_HOW}"
        raise UserError(f"{error}{hint if foreign else ''}") from error
    check_finite(model, entries["path"])
    return model, entries


def _bare_weights(path: Path, arch: str, num_classes: int) -> nn.Module:
    """A network of a known architecture, from a state dict or a .safetensors file."""
    if not path.is_file():
        raise UserError(f"{str(path)!r}: no such file")
    try:
        check_model_name(arch)
        return read_weights(path, arch, lambda: build_model(arch, num_classes))
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


def _robustbench(
    what: str, name: str, zoo: str, weights: str | Path | None, flag: str, model_dir: Path
) -> tuple[nn.Module, Path]:
    """A RobustBench network and its file: `weights`, or the one in model_dir, downloaded if it is missing."""
    source, target = source_of(what, zoo), model_dir / zoo / "Linf" / f"{name}.pt"
    get = f"get {name} with a browser from {source.browser_url} and save it as {target} or pass it with {flag}"
    path = target if weights is None else Path(weights)
    if os.path.lexists(path):
        try:
            return read_weights(path, name, source.build), path
        except UserError as error:
            raise UserError(f"{error}; {get}") from error
    print(f"downloading {name} from {source.url} to {target}", flush=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        files.download(source.url, aside)
        model = read_weights(aside, name, source.build)
        os.replace(aside, target)
        return model, target
    except (UserError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).replace(str(aside), "the download")
        raise UserError(f"cannot download {name} to {target}: {reason}; {get}") from error
    finally:
        if target.parent.is_dir():
            aside.unlink(missing_ok=True)


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
