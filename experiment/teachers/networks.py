"""Any network by what the user calls it: a run folder, a checkpoint, a RobustBench name, or bare weights."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifar100_models import build_model, check_model_name
from experiment import UserError, files
from experiment.cli import ALIASES
from experiment.teachers.download import download
from experiment.teachers.weights import check_finite, read_weights
from experiment.teachers.zoo import CLASSES, NAME_PATTERN, Source, source_of, unknown_name, zoo_of

WEIGHTS_SUFFIXES = (".pt", ".pth", ".safetensors")


_HOW = "--arch NAME with FILE (evaluate.py), or --teacher NAME --teacher_path FILE; NAME: RES-18, ..., FILE.py:function"


@dataclass(frozen=True)
class Network:
    """A network and where it comes from.

    Attributes:
        model: in eval mode; maps (N, 3, H, W) in [0, 1] to logits (N, num_classes), normalising inside if it must.
        name: what the user called it.
        path: the file that its weights were read from.
        sha256: SHA-256 of that file. A flipped byte in a file of torch's old format loads without a complaint; the
            hash tells such files apart.
        architecture: a name that ``build_model`` knows, or RobustBench's.
        info: what a checkpoint of this project says of itself (``info``, ``epoch``, ``step``); {} otherwise.
    """

    model: nn.Module
    num_classes: int
    name: str
    path: Path
    sha256: str
    architecture: str
    info: dict[str, Any]


def robustbench_name(name: str) -> str | None:
    """RobustBench's name of a network, which BDM, DEC and LTD are short for, or None if this is none."""
    name = ALIASES.get(name, name)
    return name if NAME_PATTERN.fullmatch(name) else None


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
    """Load a network in eval mode, in float32. The global random generators are left as they were.

    Args:
        what: a run folder; a checkpoint of this project; BDM, DEC, LTD or any RobustBench Linf name of the data's zoo
            (CIFAR-10's or CIFAR-100's), read from ``<model_dir>/<zoo>/Linf/<name>.pt`` or downloaded there; or, with
            `arch`, a file of bare weights.
        arch: architecture of bare weights (a state dict in a .pt, or .safetensors): what ``build_model`` takes, or a
            RobustBench name.
        num_classes: that of the data; None accepts any.
        dataset: the data's name, which tells the zoo.
        weights: the file of a name: one of RobustBench's downloaded by hand, or bare weights of an architecture.
        weights_flag: the user's flag for it, for messages.
        unfinished: whether a run's last.pt will do.

    Raises:
        UserError: none of these; a name of the other zoo; another number of classes; a file that is missing and cannot
            be downloaded, damaged, unsafe, or does not fit the architecture. Files that this call did not download
            itself are never changed or deleted.
    """
    what = os.fspath(what)
    name = robustbench_name(what if arch is None else arch)
    if arch is not None and name is not None:
        what, weights = arch, what
    elif name is None and weights is not None:
        what, arch = os.fspath(weights), what
    # Building draws initial weights that are thrown away: a run's own random stream must not depend on them.
    with torch.random.fork_rng(devices=[]):
        if name is not None:
            zoo = zoo_of(what, dataset, num_classes)
            classes, architecture, info = CLASSES[zoo], name, {}
            _check_classes(what, classes, num_classes)
            model, path = _robustbench(what, name, zoo, weights, weights_flag, Path(model_dir))
        elif arch is not None:
            path, classes, architecture, info = Path(what), num_classes or CLASSES.get(dataset, 10), arch, {}
            model = _bare_weights(path, arch, classes)
        else:
            model, entries = _own(Path(what), unfinished=unfinished)
            path, classes, architecture = entries["path"], entries["num_classes"], entries["architecture"]
            info = {key: entries[key] for key in ("info", "epoch", "step")}
            _check_classes(what, classes, num_classes)
    return Network(model.eval().to(device), classes, what, path, files.file_sha256(path), architecture, info)


def _check_classes(what: str, classes: int, num_classes: int | None) -> None:
    if num_classes is not None and num_classes != classes:
        raise UserError(f"{what!r} has {classes} classes but the data has {num_classes}")


def _own(path: Path, *, unfinished: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A checkpoint or run folder of this project, and what it says of itself."""
    if not os.path.lexists(path):
        if os.sep in str(path) or path.suffix in WEIGHTS_SUFFIXES:
            raise UserError(f"{str(path)!r}: no such file or folder")
        raise unknown_name(str(path))
    if path.suffix == ".safetensors":
        raise UserError(f"{path} holds weights without their architecture: give it, as {_HOW}")
    try:
        entries = files.read_student(path, unfinished=unfinished)
        model = files.load_student(path, unfinished=unfinished)
    except UserError as error:
        foreign = path.is_file() and "is not a student checkpoint" in str(error)
        hint = f"; RobustBench's go with their name, --teacher BDM --teacher_path {path}, others as {_HOW}"
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
    called: str, name: str, zoo: str, weights: str | Path | None, flag: str, model_dir: Path
) -> tuple[nn.Module, Path]:
    """A RobustBench model, from `weights`, from model_dir, or downloaded to model_dir."""
    source: Source = source_of(called, name, zoo)
    target = model_dir / zoo / "Linf" / f"{name}.pt"
    get = f"get {name} with a browser from {source.browser_url} and save it as {target} or pass it with {flag}"
    path = target if weights is None else Path(weights)
    if os.path.lexists(path):
        try:
            return read_weights(path, name, source.build), path
        except UserError as error:
            raise UserError(f"{error}; {get}") from error
    try:
        return download(source, name, target), path
    except UserError as error:
        raise UserError(f"cannot download {name} to {target}: {error}; {get}") from error
