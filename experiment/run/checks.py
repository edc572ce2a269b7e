"""Checks before the first step, and signs during the training that a network is worthless."""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks import frozen
from experiment import RunStopped, UserError, data, evaluation, files, teachers
from experiment.compat import import_autoattack


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


SETTLED_STEPS = 200
"""Optimizer steps after which a student that predicts one class only has collapsed; before, its BatchNorm statistics
may simply not have settled."""

PROBE_IMAGES = 256
"""Images that a student is shown to see whether it has collapsed."""


def fault_of(logits: Tensor) -> str | None:
    """What makes logits (N, C) of different images worthless, or None."""
    if not logits.isfinite().all():
        return "not finite"
    # Equal up to some ten roundings: kernels may add up the first and the last rows of a batch in another order.
    spread = (logits.amax(dim=0) - logits.amin(dim=0)).max()
    return "the same for every image" if spread <= 1e-6 * logits.abs().max() else None


def predicts_one_class(logits: Tensor, y: Tensor) -> bool:
    """Whether logits (N, C) put every image into one class although their labels (N,) differ."""
    return len(y.unique()) > 1 and len(logits.argmax(dim=1).unique()) == 1


def collapse_of(student: nn.Module, images: data.Data, *, one_class: bool) -> str | None:
    """What says, on a sample of the test images, that the student tells no images apart any more, or None.

    Args:
        one_class: whether one class for all of them is such a sign.
    """
    sample = slice(None, None, -(-len(images.x_test) // PROBE_IMAGES))  # over the whole set
    with torch.no_grad(), frozen(student):
        logits = student(data.as_float(images.x_test[sample]))
    if fault := fault_of(logits):
        return f"the student's logits are {fault}"
    if one_class and predicts_one_class(logits, images.y_test[sample]):
        return (
            "the student predicts one class for every image (if the classes are so unequal that it may: "
            "--stop_on_collapse 0)"
        )
    return None


def earliest_bad_step(bad_step: Tensor, term: Tensor, step: int) -> Tensor:
    """`bad_step`, or `step` if that is earlier and the loss term is not finite; without waiting for the device."""
    return torch.minimum(bad_step, torch.where(term.isfinite(), torch.inf, float(step)))


def is_finite(model: nn.Module) -> bool:
    """Whether all weights and statistics are finite."""
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    # Sums hand on what is not finite; one transfer to the host.
    return bool(torch.stack([value.double().sum() for value in floats]).sum().isfinite())


def diverged(fact: str, means: dict[str, float], lr: float, saved: Path | None) -> RunStopped:
    """How a run ends that went wrong: what happened, the state of the losses, and what is left of it.

    Args:
        means: the epoch's means so far, loss terms as ``loss_<name>``.
        saved: the checkpoint from before it, if there is one.
    """
    terms = ", ".join(f"{name.removeprefix('loss_')} {value:g}" for name, value in means.items() if "loss_" in name)
    back = f"{saved} is from before it" if saved else "no checkpoint was written yet"
    return RunStopped(
        f"{fact} (means so far: {terms}; lr {lr:g}); nothing after it is saved, {back}; a smaller --lr, or --precision "
        "fp32, in a new run may help",
        RunStopped.DIVERGED,
    )
