"""Save and measure the networks of a trained run: the content of result.json."""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from experiment import UserError, data, files
from experiment.engine import Engine
from experiment.evaluation import GRADIENT_DEFINITION, gradient_alignment, monitor
from experiment.run.folder import FORMAT
from experiment.run.state import Networks, State


@dataclass
class Measurement:
    """Final measurements of a run. Every rank measures; rank 0 writes."""

    args: argparse.Namespace
    config: dict[str, Any]
    images: data.Data
    networks: Networks
    state: State
    engine: Engine
    folder: Path
    autoattack: Callable[..., dict[str, Any]]
    attack_seconds: float = 0.0  # of AutoAttack, over all ranks and resumptions
    waited: float = 0.0  # in AutoAttack, of this process

    def result(self) -> dict[str, Any]:
        """Save, compare and attack the student, the best epoch and the mean; return the content of result.json."""
        args, config, state, student = self.args, self.config, self.state, self.networks.student
        began = time.monotonic()
        # Keep the file of a run that is attacked later: other runs record its hash as their teacher's.
        if not _holds(self.folder / "student.pt", student.state_dict()):
            self._write("student.pt", student)
        self.engine.barrier()
        gradients = self._gradients()
        last = state.rows[-1]
        attack = self._attack("autoattack", student) if args.aa_examples else None
        best = self._best(attack)
        mean = self._averaged()
        evaluation = state.seconds["evaluation"] + time.monotonic() - began - self.waited
        return {
            "format": FORMAT,
            **{name: config[name] for name in ("script", "method", "adds")},
            **{name: getattr(args, name, None) for name in ("teacher", "student", "dataset", "seed", "epochs")},
            "clean": last["clean"],
            "pgd20": last["pgd20"],
            "test_examples": len(self.images.x_test),
            "autoattack": attack,
            "gradients": gradients,
            **({"best": best} if best else {}),
            **({"swa": mean} if mean else {}),
            "seconds": {"train": state.seconds["train"], "evaluation": evaluation, "autoattack": self.attack_seconds},
            "student_sha256": files.state_sha256(student),
            "hardware": config["device"],
            "processes": config["processes"],
            "command": config["command"],
            "changed": state.changed,  # differences between the start and the resumptions
        }

    def _write(self, name: str, model: nn.Module, **more: Any) -> None:
        """Write a network to a file of the run folder that is loadable without the run."""
        if self.engine.main:
            settings = json.loads(json.dumps(vars(self.args)))  # plain types only
            info = {"method": self.config["method"], "run": self.folder.name, "settings": settings, **more}
            files.save_student(self.folder / name, model, self.args.student, self.images.num_classes, info)

    def _attack(self, name: str, model: nn.Module) -> dict[str, Any]:
        """Run AutoAttack on the first --aa_examples test images, with its chunks in the folder `name`."""
        args, began = self.args, time.monotonic()
        x, y = self.images.x_test[: args.aa_examples], self.images.y_test[: args.aa_examples]
        options = {"seed": args.seed, "folder": self.folder / name, "batch": args.aa_batch}
        found = self.autoattack(model, x, y, args.epsilon, **options)
        self.attack_seconds += found["seconds"]
        self.waited += time.monotonic() - began
        return found

    def _gradients(self) -> dict[str, Any] | None:
        """GD and GC of student and teacher on all test images; None for a run without a teacher."""
        if self.networks.teacher is None:
            return None
        x, y = self.images.x_test, self.images.y_test
        alignment = gradient_alignment(self.networks.student, self.networks.teacher, x, y)
        return {**alignment, "examples": len(x), "definition": GRADIENT_DEFINITION}

    def _best(self, last_attack: dict[str, Any] | None) -> dict[str, Any] | None:
        """Test accuracies of best.pt, the best epoch on the held-out images."""
        best = self.state.best
        if best is None:
            return None
        model = copy.deepcopy(self.networks.student)
        model.load_state_dict(self.state.best_weights)
        self._write("best.pt", model, **best)
        row, attack = self.state.rows[best["epoch"] - 1], None
        if self.args.aa_best and self.args.aa_examples:
            is_last = best["epoch"] == self.args.epochs
            attack = last_attack if is_last else self._attack("autoattack_best", model)
        return {**best, "clean": row["clean"], "pgd20": row["pgd20"], "autoattack": attack}

    def _averaged(self) -> dict[str, Any] | None:
        """Test accuracies of swa.pt: the mean of the weights after the epochs that follow --swa_after.

        Its BatchNorm statistics are re-estimated on one epoch of augmented training images without an attack.

        Source: Izmailov et al., UAI 2018.
        """
        if self.networks.averaged is None:
            return None
        args, images = self.args, self.images
        inputs = (x for x, *_ in images.batches(args.batch, args.seed, args.epochs + 1))  # not used for training
        model, epochs = self.networks.averaged.module, int(self.networks.averaged.n_averaged)
        path = self.folder / "swa.pt"
        # Estimated once and read by all ranks. On a GPU another estimate, on another rank or after a kill, may differ
        # in the last bit, and AutoAttack's chunks would then belong to different networks.
        if self.engine.main and not _holds(path, dict(model.named_parameters())):
            update_bn(inputs, model)
            self._write(path.name, model, averaged_epochs=epochs)
        self.engine.barrier()
        model.load_state_dict(files.load(path)["state_dict"])
        accuracies = monitor(model, images, args.epsilon)
        attack = self._attack("autoattack_swa", model) if args.aa_best and args.aa_examples else None
        return {"epochs": epochs, "clean": accuracies["clean"], "pgd20": accuracies["pgd20"], "autoattack": attack}


def _holds(path: Path, tensors: dict[str, Tensor]) -> bool:
    """Whether the file of a network contains these tensors."""
    try:
        saved = files.load(path)["state_dict"]
        return all(torch.equal(saved[name], tensor.cpu()) for name, tensor in tensors.items())
    except (UserError, KeyError):
        return False
