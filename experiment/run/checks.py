"""Checks before the first step, and checks for divergence and collapse during training."""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks import frozen
from experiment import RunStopped, UserError, data, evaluation, teachers
from experiment.compat import import_autoattack

SETTLED_STEPS = 200
"""Optimizer steps after which a student that predicts a single class counts as collapsed. Before, its BatchNorm
statistics may not have converged."""

PROBE_IMAGES = 256
"""Number of test images for the check of collapse."""


def check_names(args: argparse.Namespace) -> None:
    """Check that the data set and the teacher exist and that AutoAttack can run, before the folder is created."""
    data.check_dataset(args.dataset)
    if hasattr(args, "teacher"):
        teachers.check_teacher_name(args.teacher, args.teacher_path)
    if not args.aa_examples:
        return
    if not 0 < args.epsilon <= 1:
        raise UserError(
            f"--epsilon {args.epsilon:g} is out of range for AutoAttack (expected 0 < epsilon <= 1, or --aa_examples 0)"
        )
    try:
        import_autoattack()
    except UserError as error:
        raise UserError(f"{error}, or use --aa_examples 0") from error


def check_feasible(
    args: argparse.Namespace,
    images: data.Data,
    student: nn.Module,
    teacher: nn.Module | None,
    folder: Path,
    processes: int,
) -> None:
    """Check that the networks map the images to logits, and that batch, classes and disk space are large enough."""
    evaluation.check_network(args.student, student, images.x_test, images.num_classes)
    if teacher is not None:
        evaluation.check_network(args.teacher, teacher, images.x_test, images.num_classes)
    rest = len(images.x_train) % args.batch
    if images.steps(args.batch) < 1 or min(args.batch, rest if rest > 1 else args.batch) < 2 * processes:
        raise UserError(
            f"--batch {args.batch} gives a process fewer than 2 of {len(images.x_train)} images in some step. Use "
            "another --batch"
        )
    # last.pt and previous.pt are kept while a third is written. Each has the weights and their momentum, with --holdout
    # also the best weights, and with --swa_after their mean.
    files = 3 - sum((folder / name).exists() for name in ("last.pt", "previous.pt"))
    copies = files * (2 + bool(args.holdout) + bool(args.swa_after))
    need = copies * sum(p.numel() * p.element_size() for p in student.parameters())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"{folder} needs {need / 2**20:.0f} MiB for checkpoints, but the disk has {free / 2**20:.0f} MiB left"
        )


def sample_of(images: data.Data, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` test images (n, 3, H, W) in [0, 1] and their labels (n,), spread over the whole set."""
    sample = slice(None, None, -(-len(images.x_test) // most))
    return data.as_float(images.x_test[sample]), images.y_test[sample]


def check_teacher(name: str, teacher: nn.Module, images: data.Data) -> str:
    """Check that the teacher's logits are finite and differ between images; return how many images it gets right.

    A teacher of other data or of other class numbers gets few right.
    """
    x, y = sample_of(images, 64)
    with torch.no_grad():
        logits = teacher(x)
    if fault := _fault_of(logits):
        raise RunStopped(f"teacher {name}: its logits are {fault} on {images.name}", RunStopped.DIVERGED)
    return f"correct on {int((logits.argmax(dim=1) == y).sum())} of {len(y)} test images"


def _fault_of(logits: Tensor) -> str | None:
    """Return what is wrong with logits (N, C) of different images, or None."""
    if not logits.isfinite().all():
        return "not finite"
    # Equal up to rounding: kernels may sum the first and the last rows of a batch in a different order.
    spread = (logits.amax(dim=0) - logits.amin(dim=0)).max()
    return "the same for every image" if spread <= 1e-6 * logits.abs().max() else None


def collapse_of(student: nn.Module, x: Tensor, y: Tensor, *, one_class: bool) -> str | None:
    """Return how the student has collapsed on images x (n, 3, H, W) with labels y (n,), or None.

    `one_class` counts a single predicted class as collapse.
    """
    with torch.no_grad(), frozen(student):
        logits = student(x)
    if fault := _fault_of(logits):
        return f"the student's logits are {fault}"
    if one_class and len(y.unique()) > 1 and len(logits.argmax(dim=1).unique()) == 1:
        return (
            "the student predicts one class for every image (allowed with --stop_on_collapse 0, for very unequal "
            "classes)"
        )
    return None


def is_finite(model: nn.Module) -> bool:
    """Whether all weights and statistics are finite."""
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    # A sum is not finite if a value is not; one transfer to the host.
    return bool(torch.stack([value.double().sum() for value in floats]).sum().isfinite())
