"""Contents of last.pt: progress, networks and random generators."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


@dataclass
class State:
    """Progress of a run. Every field is saved and restored under its name.

    Attributes:
        epoch: number of finished epochs.
        step: finished steps of the current epoch.
        seen: training images of the current epoch, over all ranks.
        sums: sums of the loss terms over these images; on the device during training.
        rows: the rows of metrics.jsonl.
        seconds: of ``train`` and ``evaluation`` so far.
        epoch_seconds: training time of the current epoch.
        changed: differences between the start of the run and its resumptions.
        best: epoch and held-out accuracy of the best epoch.
        best_weights: its state dict, of which best.pt is a copy. A kill may lose the epoch of a separate file, and the
            repeated epoch may differ.
    """

    epoch: int = 0
    step: int = 0
    seen: int = 0
    sums: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "evaluation": 0.0})
    epoch_seconds: float = 0.0
    changed: list[str] = field(default_factory=list)
    best: dict[str, Any] | None = None
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


LATER_FIELDS = {"changed": [], "best": None, "best_weights": None}
"""Fields that a last.pt of an earlier version may lack, with their values."""


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


def to_checkpoint(state: State, networks: Networks, random: dict[str, Tensor | None]) -> dict[str, Any]:
    """Return tensors and plain types from which ``from_checkpoint`` restores the run bit for bit."""
    content = {item.name: getattr(state, item.name) for item in fields(State)}
    content["sums"] = {name: float(value) for name, value in state.sums.items()}
    if networks.averaged is not None:
        content["averaged"] = {
            "model": networks.averaged.module.state_dict(),
            "count": int(networks.averaged.n_averaged),
        }
    return {"model": networks.student.state_dict(), "optimizer": networks.optimizer.state_dict(), **random, **content}


def from_checkpoint(
    content: dict[str, Any], networks: Networks, device: torch.device, epochs: int, steps: int
) -> State:
    """Restore networks, optimizer and generators, and return the state of the run.

    Args:
        epochs, steps: epochs of the run and steps of one epoch, to check the position.

    Raises:
        KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError: the content does not fit.
    """
    state = State(**{item.name: {**LATER_FIELDS, **content}[item.name] for item in fields(State)})
    if not (0 <= state.epoch <= epochs and 0 <= state.step <= steps):
        raise ValueError(f"there is no epoch {state.epoch}, step {state.step}")
    if [row["epoch"] for row in state.rows] != list(range(1, state.epoch + 1)):
        raise ValueError("its rows are not those of its epochs")
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
    state.sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state.sums.items()}
    return state
