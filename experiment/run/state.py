"""Progress of a run and its checkpoints, last.pt and previous.pt."""

import argparse
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from experiment import UserError, files
from experiment.engine import Engine
from experiment.run.folder import FORMAT


@dataclass
class State:
    """Progress of a run. Every field is saved and restored under its name."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    seen: int = 0  # training images of the current epoch, over all ranks
    sums: dict[str, Any] = field(default_factory=dict)  # of the loss terms over these; on the device during training
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "evaluation": 0.0})
    epoch_seconds: float = 0.0  # training time of the current epoch
    changed: list[str] = field(default_factory=list)  # between the start of the run and its resumptions
    best: dict[str, Any] | None = None  # epoch and held-out accuracy of the best epoch
    # Its state dict, of which best.pt is a copy: a kill may lose the epoch of a separate file, and the repeated epoch
    # may differ.
    best_weights: dict[str, Tensor] | None = None

    def begin_epoch(self) -> None:
        """Count the current epoch as finished."""
        self.epoch += 1
        self.step, self.seen, self.sums, self.epoch_seconds = 0, 0, {}, 0.0

    def position(self, epochs: int, steps: int) -> str:
        """Describe the position of the run."""
        if self.step:
            return f"in epoch {self.epoch + 1} after step {self.step} of {steps}"
        return f"after epoch {self.epoch} of {epochs}" if self.epoch else "before the first step"

    def means(self) -> dict[str, float]:
        """Return means over the images seen: the loss, its terms, and the speed."""
        terms = {f"loss_{name}": float(value) / max(self.seen, 1) for name, value in self.sums.items()}
        speed = self.seen / max(self.epoch_seconds, 1e-9)
        return {"loss": sum(terms.values()), **terms, "images_per_second": speed}


@dataclass
class Networks:
    """Student, optimizer, teacher, and with --swa_after the averaged weights."""

    student: nn.Module
    optimizer: torch.optim.Optimizer
    teacher: nn.Module | None = None
    averaged: AveragedModel | None = None


def generators(device: torch.device) -> dict[str, Tensor | None]:
    """Return the states of the global random generators."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"rng": torch.get_rng_state(), "rng_cuda": cuda}


class Checkpoints:
    """Writes (on rank 0) and reads last.pt: tensors and plain types that restore a run bit for bit."""

    def __init__(self, folder: Path, identity: str, args: argparse.Namespace, engine: Engine) -> None:
        self._last, self._previous = folder / "last.pt", folder / "previous.pt"
        self._identity, self._args, self._engine = identity, args, engine

    def save(self, state: State, networks: Networks, num_classes: int, random: dict[str, Tensor | None]) -> None:
        """Write last.pt and keep the one before as previous.pt."""
        if not self._engine.main:
            return
        content = {
            "format": FORMAT,
            "id": self._identity,
            "architecture": self._args.student,
            "num_classes": num_classes,
            "source_file": getattr(networks.student, "source_file", None),
            # The learning rate of an epoch follows from these; the schedule has no other state.
            "schedule": {"lr": self._args.lr, "lr_milestones": self._args.lr_milestones},
            "model": networks.student.state_dict(),
            "optimizer": networks.optimizer.state_dict(),
            **random,
            **{item.name: getattr(state, item.name) for item in fields(State)},
            "sums": {name: float(value) for name, value in state.sums.items()},
        }
        if networks.averaged is not None:
            count = int(networks.averaged.n_averaged)
            content["averaged"] = {"model": networks.averaged.module.state_dict(), "count": count}
        files.save(self._last, content, previous=self._previous)

    def restore(self, networks: Networks) -> tuple[State | None, str]:
        """Load last.pt, or previous.pt if a rank cannot use last.pt; return the state and a note about a damaged file.

        The state is None if there is no checkpoint.
        """
        engine, faults = self._engine, []
        for path in engine.from_main([path for path in (self._last, self._previous) if path.exists()]):
            try:
                state = engine.on_all_ranks(lambda path=path: self._load(path, networks))
                break
            except UserError as error:
                faults.append(str(error))
        else:
            if faults:
                folder = self._last.parent
                raise UserError(f"{'; '.join(faults)}; no other checkpoint is left: delete {folder} to start again")
            return None, ""
        if faults and engine.main:
            os.replace(self._last, self._last.with_name("last.damaged.pt"))
        if not engine.main:  # the sums are over all ranks, so rank 0 keeps them
            state.sums = {name: torch.zeros_like(value) for name, value in state.sums.items()}
        return state, f" of {path.name} ({faults[0]}; renamed to last.damaged.pt)" if faults else ""

    def _load(self, path: Path, networks: Networks) -> State:
        content = files.load(path)
        try:
            if content["id"] != self._identity:
                raise ValueError(f"it belongs to a run with id {content['id']!r:.40}")
            return self._restored(content, networks)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{path} does not fit this run: {reason}") from error

    def _restored(self, content: dict[str, Any], networks: Networks) -> State:
        """Restore networks, optimizer and generators; return the state."""
        device = self._engine.device
        # A checkpoint of an earlier version may lack a field.
        state = State(**{item.name: content[item.name] for item in fields(State) if item.name in content})
        source = getattr(networks.student, "source_file", None)  # of a network from the user's own file
        if source and source["sha256"] != content["source_file"]["sha256"]:
            raise ValueError(f"{source['path']} has changed since: restore its content")
        networks.student.load_state_dict(content["model"])
        networks.optimizer.load_state_dict(content["optimizer"])
        if networks.averaged is not None:
            networks.averaged.module.load_state_dict(content["averaged"]["model"])
            networks.averaged.n_averaged.fill_(content["averaged"]["count"])
        torch.set_rng_state(content["rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(content["rng_cuda"], device)
        for name, value in state.sums.items():
            state.sums[name] = torch.tensor(value, dtype=torch.float64, device=device)
        return state
