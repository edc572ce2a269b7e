"""last.pt and previous.pt: written by rank 0, read by every rank; an error on one rank is raised on all."""

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor

from experiment import UserError, files
from experiment.engine import Engine
from experiment.run.folder import FORMAT
from experiment.run.state import Networks, State, from_checkpoint, to_checkpoint


class Checkpoints:
    """The checkpoints in a run folder."""

    def __init__(self, folder: Path, identity: str, args: argparse.Namespace, engine: Engine) -> None:
        """Args:
        identity: the run's id, which its files contain.
        """
        self._last, self._previous = folder / "last.pt", folder / "previous.pt"
        self._identity, self._args, self._engine = identity, args, engine

    def exist(self) -> bool:
        """Whether a checkpoint exists."""
        return self._last.exists()

    def save(self, state: State, networks: Networks, num_classes: int, random: dict[str, Tensor | None]) -> None:
        """Write last.pt and keep the one before as previous.pt."""
        if not self._engine.main:
            return
        content = {
            "format": FORMAT,
            "id": self._identity,
            "architecture": self._args.student,
            "num_classes": num_classes,
            **files.source_file(networks.student),
            # The learning rate of an epoch follows from these; the schedule has no other state.
            "schedule": {"lr": self._args.lr, "lr_milestones": self._args.lr_milestones},
            **to_checkpoint(state, networks, random),
        }
        files.save(self._last, content, previous=self._previous)

    def restore(self, networks: Networks, steps: int) -> tuple[State | None, str]:
        """Load last.pt, or previous.pt if any rank cannot use last.pt.

        Args:
            steps: optimizer steps of an epoch.

        Returns:
            The state of the run, or None if there is no checkpoint; and a note about a damaged file.

        Raises:
            UserError: both are unusable.
        """
        names = [path.name for path in (self._last, self._previous) if path.exists()]
        found = [self._last.with_name(name) for name in self._engine.from_main(names)]
        faults: list[str] = []
        for path in found:
            state, fault = self._load(path, networks, steps)
            fault = self._engine.first_fault(fault)
            if fault is None:
                break
            faults.append(fault)
        else:
            if found:
                folder = self._last.parent
                raise UserError(f"{'; '.join(faults)}; no other checkpoint is left: delete {folder} to start again")
            return None, ""
        note = ""
        if faults:
            note = f" of {path.name} ({faults[0]}; renamed to last.damaged.pt)"
            if self._engine.main:
                os.replace(self._last, self._last.with_name("last.damaged.pt"))
        if not self._engine.main:  # the sums are over all ranks, so rank 0 keeps them
            state.sums = {name: torch.zeros_like(value) for name, value in state.sums.items()}
        return state, note

    def _load(self, path: Path, networks: Networks, steps: int) -> tuple[State | None, str | None]:
        try:
            content = files.load(path)
            if content["id"] != self._identity:
                raise ValueError(f"it belongs to a run with id {content['id']!r:.40}")
            return from_checkpoint(content, networks, self._engine.device, self._args.epochs, steps), None
        except UserError as error:
            return None, str(error)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            return None, f"{path} does not fit this run: {reason}"
