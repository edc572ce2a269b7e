"""What cannot end well is refused before the first step."""

import argparse
import shutil
from pathlib import Path

import torch
from torch import nn

from experiment import RunStopped, UserError, data, evaluation, files, teachers
from experiment.compat import import_autoattack
from experiment.run.health import fault_of


def check_names(args: argparse.Namespace) -> None:
    """Refuse a data set or a teacher that cannot be loaded, before a folder is made.

    Raises:
        UserError: the data set or the teacher does not exist; AutoAttack cannot be run.
    """
    data.check_dataset(args.dataset)
    if hasattr(args, "teacher"):
        teachers.check_teacher_name(args.teacher, args.teacher_path)
    if args.aa_examples:
        check_autoattack(args)


def check_autoattack(args: argparse.Namespace) -> None:
    """Refuse what AutoAttack would refuse after the training.

    Raises:
        UserError: its package is missing, or --epsilon is not above 0.
    """
    if not 0 < args.epsilon <= 1:
        raise UserError(f"--epsilon {args.epsilon:g} is not allowed with AutoAttack; above 0, or --aa_examples 0")
    try:
        import_autoattack()
    except UserError as error:
        raise UserError(f"{error}, or give --aa_examples 0") from error


def check_feasible(
    args: argparse.Namespace,
    images: data.Data,
    student: nn.Module,
    teacher: nn.Module | None,
    folder: Path,
    processes: int,
) -> None:
    """Refuse a run whose parts do not fit together.

    Raises:
        UserError: a network that makes no logits of these images, too few classes for AutoAttack, too few images in
            some step, or no room on the disk.
    """
    evaluation.check_network(args.student, student, images.x_test, images.num_classes)
    if teacher is not None:
        evaluation.check_network(args.teacher, teacher, images.x_test, images.num_classes)
    if args.aa_examples and images.num_classes < 2:
        raise UserError(f"AutoAttack needs at least 2 classes, {images.name} has {images.num_classes}")
    rest = len(images.x_train) % args.batch
    if images.steps(args.batch) < 1 or min(args.batch, rest if rest > 1 else args.batch) < 2 * processes:
        raise UserError(
            f"--batch {args.batch} leaves fewer than 2 of {len(images.x_train)} images to a process in some step; "
            "choose another --batch"
        )
    # Weights and momentum, with --holdout the best weights too, in three checkpoints, one of them being written.
    copies = 3 * (3 if args.holdout else 2)
    need = copies * sum(p.numel() * p.element_size() for p in student.parameters())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"{folder} needs {need / 2**20:.0f} MiB for checkpoints, the disk has {free / 2**20:.0f} MiB left"
        )


def check_teacher(name: str, teacher: nn.Module, images: data.Data) -> None:
    """Refuse a teacher that has nothing to teach.

    Raises:
        RunStopped: its logits are not finite, or the same for every image.
    """
    with torch.no_grad():
        fault = fault_of(teacher(data.as_float(images.x_test[:64])))
    if fault:
        raise RunStopped(f"teacher {name}: its logits are {fault} on {images.name}", RunStopped.DIVERGED)


def check_finished_student(folder: Path, student: nn.Module, *, trained: bool) -> None:
    """A finished run that is attacked now: what was restored must be the student of its result.json.

    Raises:
        UserError: it is not.
    """
    path = folder / "result.json"
    if not path.exists():
        return
    if not trained or files.state_sha256(student) != files.read_json(path).get("student_sha256"):
        raise UserError(
            f"{folder} is finished, but its last.pt does not hold the student of its result.json; attack its "
            "student.pt with evaluate.py --attacks autoattack"
        )
