"""``python -m experiment.teachers verify BDM``: a teacher's file against RobustBench's clean accuracy."""

import argparse
from collections.abc import Sequence

import torch

from experiment import UserError
from experiment.cli import ALIASES, guard
from experiment.data import as_float, load_data
from experiment.teachers.loader import load_teacher
from experiment.teachers.zoo import CLASSES, CLEAN_ACCURACY

VERIFY_IMAGES = 1_000

VERIFY_TOLERANCE = 0.03  # two standard errors of an accuracy near 0.7 measured on 1,000 images


def verify(
    name_or_path: str, teacher_path: str | None, model_dir: str, data_dir: str, device: str, dataset: str = "cifar100"
) -> None:
    """Print a teacher's hash, size and clean accuracy on the first 1,000 test images of its data.

    Raises:
        UserError: as load_teacher and load_data; or the accuracy is more than 3 points off RobustBench's.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use cpu")
    teacher = load_teacher(name_or_path, CLASSES[dataset], teacher_path, dataset, model_dir=model_dir, device=device)
    name = ALIASES.get(name_or_path, name_or_path)
    print(f"teacher         {name}")
    print(f"file            {teacher.path}")
    print(f"sha256          {teacher.sha256}")
    print(f"parameters      {sum(parameter.numel() for parameter in teacher.parameters()):,}", flush=True)
    data = load_data(dataset, data_dir, device)
    images, labels = data.x_test[:VERIFY_IMAGES], data.y_test[:VERIFY_IMAGES]
    with torch.no_grad():
        batches = zip(images.split(100), labels.split(100), strict=True)
        correct = sum((teacher(as_float(x)).argmax(dim=1) == y).sum().item() for x, y in batches)
    clean = correct / len(images)
    print(f"clean accuracy  {clean:.2%} on the first {len(images):,} test images of {dataset}")
    claimed = CLEAN_ACCURACY[dataset].get(name)
    if claimed is None:
        print("claimed         no figure known to compare with")
        return
    print(f"claimed         {claimed:.2%} by RobustBench, on all 10,000")
    if abs(clean - claimed) > VERIFY_TOLERANCE:
        raise UserError(
            f"clean accuracy {clean:.2%} is more than {100 * VERIFY_TOLERANCE:g} points off RobustBench's "
            f"{claimed:.2%}: {teacher.path} is not {name} as published"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this module: ``verify NAME_OR_PATH``."""
    parser = argparse.ArgumentParser(prog="python -m experiment.teachers", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="verify")
    command = commands.add_parser("verify", help="check a teacher's file against RobustBench", allow_abbrev=False)
    command.add_argument("teacher", help="BDM, DEC, LTD, another RobustBench name, or a path")
    command.add_argument("--teacher_path", help="a file downloaded by hand")
    command.add_argument("--model_dir", default="models", help="where RobustBench files lie or are downloaded to")
    command.add_argument("--data_dir", default="data", help="where CIFAR lies or is downloaded to")
    command.add_argument("--dataset", default="cifar100", choices=tuple(CLASSES), help="which zoo, and which images")
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(argv)
    verify(args.teacher, args.teacher_path, args.model_dir, args.data_dir, args.device, args.dataset)


if __name__ == "__main__":
    guard(main)
