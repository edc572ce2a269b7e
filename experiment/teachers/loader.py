"""Loading a teacher, frozen: by RobustBench name, or from a network of our own."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from experiment import UserError, files
from experiment.cli import ALIASES
from experiment.teachers.download import download
from experiment.teachers.weights import check_finite, read_weights
from experiment.teachers.zoo import NAME_PATTERN, ROBUSTBENCH_CLASSES, source_of, unknown_name


class FrozenTeacher(nn.Module):
    """A network that stays as it is: eval mode whatever ``train()`` is told, no parameter requires a gradient.

    Attributes:
        model: the network; maps (N, 3, H, W) in [0, 1] to logits (N, num_classes), normalising inside if it must.
        num_classes: number of classes.
        name: what the user called it.
        path: the file it was read from.
        sha256: SHA-256 of that file. A single flipped byte in a file of torch's old format loads without a complaint;
            the hash tells such files apart.
    """

    def __init__(self, model: nn.Module, num_classes: int, name: str, path: Path) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.num_classes = num_classes
        self.name = name
        self.path = path
        self.sha256 = files.file_sha256(path)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def check_teacher_name(name_or_path: str | Path, teacher_path: str | Path | None = None) -> str | None:
    """Refuse what cannot be a teacher, without importing anything heavy; cheap enough for the flag parser.

    Returns:
        The RobustBench name that is meant, or None if name_or_path is the path of a network of our own.

    Raises:
        UserError: neither a possible name nor an existing path; or teacher_path does not go with it or does not exist.
    """
    name_or_path = os.fspath(name_or_path)
    name = ALIASES.get(name_or_path, name_or_path)
    is_name = NAME_PATTERN.fullmatch(name) is not None
    if not is_name and not os.path.lexists(name_or_path):
        if os.sep in name_or_path or name_or_path.endswith((".pt", ".pth")):
            raise UserError(f"teacher {name_or_path!r}: no such file or folder")
        raise unknown_name(name_or_path)
    if teacher_path is not None:
        if not is_name:
            raise UserError(
                f"--teacher_path {teacher_path} needs the name of its architecture, such as --teacher BDM; "
                f"--teacher is the path {name_or_path!r}"
            )
        if not os.path.isfile(teacher_path):
            raise UserError(f"--teacher_path {teacher_path}: no such file")
    return name if is_name else None


def load_teacher(
    name_or_path: str | Path,
    num_classes: int | None = None,
    *,
    teacher_path: str | Path | None = None,
    model_dir: str | Path = "models",
    device: str | torch.device = "cpu",
) -> FrozenTeacher:
    """Load a teacher, frozen and in eval mode, in float32. The global random generators are left as they were.

    Args:
        name_or_path: BDM, DEC, LTD, any RobustBench CIFAR-100 Linf name (read from
            ``<model_dir>/cifar100/Linf/<name>.pt``, downloaded if that is absent), or the path of a checkpoint or run
            folder of this project, which carries its own architecture and number of classes.
        num_classes: that of the data; None accepts any.
        teacher_path: a file that was downloaded by hand, for a RobustBench name.

    Raises:
        UserError: unknown name; another number of classes; a file that is missing and cannot be downloaded, is an HTML
            page, damaged, unsafe, or does not fit the architecture. One line; says what to download from where, and
            where to put it. Files that this call did not download itself are never changed or deleted.
    """
    name_or_path = os.fspath(name_or_path)
    name = check_teacher_name(name_or_path, teacher_path)
    # Building draws initial weights that are thrown away: the run's own random stream must not depend on the teacher.
    with torch.random.fork_rng(devices=[]):
        if name is None:
            teacher = _own(Path(name_or_path), num_classes)
        else:
            _check_classes(name_or_path, ROBUSTBENCH_CLASSES, num_classes)
            teacher = _robustbench(name_or_path, name, teacher_path, Path(model_dir))
    return teacher.to(device)


def _check_classes(teacher: str, teacher_classes: int, num_classes: int | None) -> None:
    if num_classes is not None and num_classes != teacher_classes:
        raise UserError(f"teacher {teacher!r} has {teacher_classes} classes but the data has {num_classes}")


def _own(path: Path, num_classes: int | None) -> FrozenTeacher:
    """A student checkpoint, or the student.pt of a run folder."""
    file = path / "student.pt" if path.is_dir() else path
    try:
        model, entries = files.load_student(path), files.read_student(path)
    except UserError as error:
        hint = f"; a file from RobustBench goes with its name: --teacher BDM --teacher_path {path}"
        raise UserError(f"{error}{hint if path.is_file() else ''}") from error
    check_finite(model, file)
    _check_classes(str(path), entries["num_classes"], num_classes)
    return FrozenTeacher(model, entries["num_classes"], str(path), file)


def _robustbench(called: str, name: str, teacher_path: str | Path | None, model_dir: Path) -> FrozenTeacher:
    """A RobustBench model, from teacher_path, from model_dir, or downloaded to model_dir."""
    source = source_of(called, name)
    target = model_dir / "cifar100" / "Linf" / f"{name}.pt"
    get = f"get {name} with a browser from {source.browser_url} and save it as {target} or pass it with --teacher_path"
    path = target if teacher_path is None else Path(teacher_path)
    if os.path.lexists(path):
        try:
            model = read_weights(path, name, source.build)
        except UserError as error:
            raise UserError(f"{error}; {get}") from error
    else:
        try:
            model = download(source, name, target)
        except UserError as error:
            raise UserError(f"cannot download {name} to {target}: {error}; {get}") from error
    return FrozenTeacher(model, ROBUSTBENCH_CLASSES, called, path)
