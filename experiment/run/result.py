"""Save and measure the networks of a run: the content of result.json."""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from experiment import UserError, data, files
from experiment.engine import Engine
from experiment.evaluation import GRADIENT_DEFINITION, gradient_alignment, monitor
from experiment.run.folder import FORMAT
from experiment.run.state import Networks, State

AutoAttack = Callable[..., dict[str, Any]]


class StudentWriter:
    """Writes networks of a run to its folder, each loadable without the run."""

    def __init__(self, folder: Path, args: argparse.Namespace, method: str, num_classes: int) -> None:
        self.folder = folder
        settings = json.loads(json.dumps(vars(args)))  # plain types only
        self._info = {"method": method, "run": folder.name, "settings": settings}
        self._architecture, self._num_classes = args.student, num_classes

    def write(self, name: str, model: nn.Module, more: dict[str, Any]) -> None:
        """Write a network as `name`, with `more` in addition to method, run and settings."""
        info = {**self._info, **more}
        files.save_student(self.folder / name, model, self._architecture, self._num_classes, info)


def measure(
    args: argparse.Namespace,
    config: dict[str, Any],
    images: data.Data,
    networks: Networks,
    state: State,
    engine: Engine,
    writer: StudentWriter,
    autoattack: AutoAttack,
) -> dict[str, Any]:
    """Save the student, compare its gradients with the teacher's, and attack it; also the best and the averaged one.

    Every rank measures; rank 0 writes.

    Returns:
        The content of result.json.
    """
    began = time.monotonic()
    # Keep the file of a run that is attacked later: other runs record its hash as their teacher's.
    if engine.main and not _holds(writer.folder / "student.pt", networks.student):
        writer.write("student.pt", networks.student, {})
    engine.barrier()
    gradients = _gradients(networks, images)
    attacked = _Attacks(args, images, writer.folder, autoattack)
    attack = attacked("autoattack", networks.student) if args.aa_examples else None
    last = {**state.rows[-1], "autoattack": attack}
    best = _best(args, images, networks.student, state, last, attacked, engine, writer)
    mean = _averaged(args, images, networks.averaged, engine, attacked, writer)
    evaluation = state.seconds["evaluation"] + time.monotonic() - began - attacked.waited
    return {
        "format": FORMAT,
        **{name: config[name] for name in ("script", "method", "adds")},
        **{name: getattr(args, name, None) for name in ("teacher", "student", "dataset", "seed", "epochs")},
        "clean": last["clean"],
        "pgd20": last["pgd20"],
        "test_examples": len(images.x_test),
        "autoattack": attack,
        "gradients": gradients,
        **({"best": best} if best else {}),
        **({"swa": mean} if mean else {}),
        "seconds": {"train": state.seconds["train"], "evaluation": evaluation, "autoattack": attacked.seconds},
        "student_sha256": files.state_sha256(networks.student),
        "hardware": config["device"],
        "processes": config["processes"],
        "command": config["command"],
        "changed": state.changed,  # differences between the start and the resumptions
    }


class _Attacks:
    """AutoAttack on the first --aa_examples test images, for several networks."""

    def __init__(self, args: argparse.Namespace, images: data.Data, folder: Path, autoattack: AutoAttack) -> None:
        self._x, self._y = images.x_test[: args.aa_examples], images.y_test[: args.aa_examples]
        self._args, self._folder, self._autoattack = args, folder, autoattack
        self.seconds = 0.0
        """Attack time, over all ranks and resumptions."""
        self.waited = 0.0
        """Time that this process has spent on attacks."""

    def __call__(self, name: str, model: nn.Module) -> dict[str, Any]:
        args, began = self._args, time.monotonic()
        where = {"folder": self._folder / name, "batch": args.aa_batch}
        found = self._autoattack(model, self._x, self._y, args.epsilon, seed=args.seed, **where)
        self.seconds += found["seconds"]
        self.waited += time.monotonic() - began
        return found


def _gradients(networks: Networks, images: data.Data) -> dict[str, Any] | None:
    """GD and GC of student and teacher on all test images; None for a run without a teacher."""
    if networks.teacher is None:
        return None
    alignment = gradient_alignment(networks.student, networks.teacher, images.x_test, images.y_test)
    return {**alignment, "examples": len(images.x_test), "definition": GRADIENT_DEFINITION}


def _best(
    args: argparse.Namespace,
    images: data.Data,
    student: nn.Module,
    state: State,
    last: dict[str, Any],
    attacked: _Attacks,
    engine: Engine,
    writer: StudentWriter,
) -> dict[str, Any] | None:
    """Test accuracies of best.pt, the best epoch on the held-out images."""
    if state.best is None:
        return None
    best = copy.deepcopy(student)
    # Runs of earlier versions have the weights only in the file.
    best.load_state_dict(state.best_weights or files.load(writer.folder / "best.pt")["state_dict"])
    if engine.main and state.best_weights:
        writer.write("best.pt", best, state.best)
    attack = bool(args.aa_best and args.aa_examples)
    if state.best["epoch"] == last["epoch"]:
        found = {name: last[name] for name in ("clean", "pgd20")}
        return {**state.best, **found, "autoattack": last["autoattack"] if attack else None}
    return {**state.best, **_accuracies(best, args, images, attacked, "autoattack_best" if attack else None)}


def _averaged(
    args: argparse.Namespace,
    images: data.Data,
    averaged: AveragedModel | None,
    engine: Engine,
    attacked: _Attacks,
    writer: StudentWriter,
) -> dict[str, Any] | None:
    """Test accuracies of swa.pt: the mean of the weights after the epochs that follow --swa_after.

    Its BatchNorm statistics are re-estimated on one epoch of augmented training images without an attack.

    Source: Izmailov et al., UAI 2018.
    """
    if averaged is None:
        return None

    def inputs() -> Iterator[Tensor]:
        # An epoch that was not used for training.
        yield from (x for x, *_ in images.batches(args.batch, args.seed, args.epochs + 1))

    model, path = averaged.module, writer.folder / "swa.pt"
    # Estimated once and read by all ranks. On a GPU another estimate, on another rank or after a kill, may differ in
    # the last bit, and AutoAttack's chunks would then belong to different networks.
    if engine.main and not _is_of(path, model):
        update_bn(inputs(), model)
        writer.write(path.name, model, {"averaged_epochs": int(averaged.n_averaged)})
    engine.barrier()
    model.load_state_dict(files.load(path)["state_dict"])
    attack = "autoattack_swa" if args.aa_best and args.aa_examples else None
    return {"epochs": int(averaged.n_averaged), **_accuracies(model, args, images, attacked, attack)}


def _holds(path: Path, model: nn.Module) -> bool:
    """Whether the file contains the model's weights and statistics."""
    try:
        return path.exists() and files.state_sha256(files.load_student(path)) == files.state_sha256(model)
    except UserError:
        return False


def _is_of(path: Path, model: nn.Module) -> bool:
    """Whether the file contains the model's parameters, apart from BatchNorm statistics."""
    if not path.exists():
        return False
    there = files.load(path)["state_dict"]
    return all(torch.equal(there[name], value.cpu()) for name, value in model.named_parameters())


def _accuracies(
    model: nn.Module, args: argparse.Namespace, images: data.Data, attacked: _Attacks, attack: str | None
) -> dict[str, Any]:
    accuracies = monitor(model, images, args.epsilon)
    found = {name: accuracies[name] for name in ("clean", "pgd20")}
    return {**found, "autoattack": attacked(attack, model) if attack else None}
