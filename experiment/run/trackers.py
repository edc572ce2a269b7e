"""Weights & Biases and TensorBoard: copies of metrics.jsonl and result.json."""

import argparse
import importlib
import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from experiment import UserError
from experiment.text import short_name


def named_metrics(row: dict[str, Any]) -> dict[str, float]:
    """Rename a row of metrics.jsonl for trackers: train/..., test/..., holdout/...."""
    groups = {"clean": "test/clean", "pgd20": "test/pgd20", "holdout_pgd10": "holdout/pgd10"}
    return {groups.get(name, f"train/{name}"): value for name, value in row.items() if name != "epoch"}


def named_results(result: dict[str, Any]) -> dict[str, float]:
    """Rename the figures of result.json for trackers: result/..., best/..., swa/..., time/...."""
    found = {}
    for group, figures in (("result", result), ("best", result.get("best")), ("swa", result.get("swa"))):
        if figures:
            found |= {f"{group}/{name}": figures[name] for name in ("clean", "pgd20")}
            if figures["autoattack"]:
                found[f"{group}/autoattack"] = figures["autoattack"]["accuracy"]
    if result["gradients"]:
        found |= {f"result/{name}": result["gradients"][name] for name in ("gd", "gc")}
    return found | {f"time/{name}": seconds for name, seconds in result["seconds"].items()}


def _imported(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        ways_out = f"pip install -r requirements.txt, or --{package} 0"
        raise UserError(f"--{package} 1 needs the package {package}: {ways_out}") from error


class Wandb:
    """A run at Weights & Biases, or its local folder with WANDB_MODE=offline."""

    def __init__(self, args: argparse.Namespace, identity: str) -> None:
        """Log in and start the W&B run."""
        wandb = _imported("wandb", "wandb")
        # No explicit mode, which would override WANDB_MODE.
        self._online = os.environ.get("WANDB_MODE", "online") == "online"
        ways_out = "use WANDB_MODE=offline for a local log, or --wandb 0"
        if self._online and not wandb.login(prompt=False, verify=False):
            # init() would prompt, and a batch job would wait forever.
            raise UserError(f"--wandb 1: not logged in to Weights & Biases. Run `wandb login`, {ways_out}")
        teacher = getattr(args, "teacher", None)
        parts = [short_name(part) for part in (teacher, args.student, args.dataset) if part]
        try:
            self._run = wandb.init(
                project=args.wandb_project,
                entity=args.wandb_entity,
                name=args.wandb_name or args.run_name,
                group="/".join(parts),
                job_type="distillation" if teacher else "adversarial training",
                tags=args.wandb_tags,
                id=identity,
                resume="allow" if self._online else None,
                settings=wandb.Settings(init_timeout=20, silent=True),
            )
        except (wandb.errors.Error, OSError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"Weights & Biases does not answer ({reason}); {ways_out}") from error
        self._artifact = args.wandb_artifact
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")

    def start(self, config: dict[str, Any], rows: list[dict[str, Any]]) -> str:
        """Write config.json and the missing rows; return a line that names the run's address."""
        hashes = ("dataset_sha256", "teacher_sha256", "code_sha256")
        about = {name: config[name] for name in ("method", "adds", "commit", "command", "device", *hashes)}
        self._run.config.update({**config["settings"], **about}, allow_val_change=True)
        names = [config["method"], config["adds"], *self._run.group.split("/")]
        self._run.tags = tuple(dict.fromkeys([*(self._run.tags or ()), *(name[:64] for name in names if name)]))
        # A killed process loses its last rows. Offline, every start writes a new log with all rows.
        logged = self._run.summary.get("epoch", 0) if self._online else 0
        for row in rows[logged:]:
            self.log(row)
        if self._online:
            return f"Weights & Biases: {self._run.url}"
        return f"Weights & Biases, offline: wandb sync {Path(self._run.dir).parent}"

    def log(self, row: dict[str, Any]) -> None:
        """Write one row of metrics.jsonl."""
        self._run.log({"epoch": row["epoch"], **named_metrics(row)})

    def finish(self, result: dict[str, Any], student: Path) -> None:
        """Write the figures of result.json, and with --wandb_artifact 1 the student's file; close."""
        self._run.summary.update({**named_results(result), "student_sha256": result["student_sha256"]})
        if self._artifact:
            self._run.log_artifact(str(student), name=f"student-{self._run.id}", type="model")
        self._run.finish()


class TensorBoard:
    """Event files in the run folder, with the same names as in W&B."""

    def __init__(self, folder: Path) -> None:
        """Import TensorBoard."""
        self._folder, self._open = folder, _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter

    def start(self, config: dict[str, Any], rows: list[dict[str, Any]]) -> str:
        """Rewrite config.json and all rows, so that none is missing or repeated; return the command to view them."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._writer = self._open(str(self._folder))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")
        for row in rows:
            self.log(row)
        return f"TensorBoard: tensorboard --logdir {self._folder.parent}"

    def log(self, row: dict[str, Any]) -> None:
        """Write one row of metrics.jsonl."""
        for name, value in named_metrics(row).items():
            self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def finish(self, result: dict[str, Any], student: Path) -> None:
        """Write the figures of result.json at the last epoch; close."""
        for name, value in named_results(result).items():
            self._writer.add_scalar(name, value, result["epochs"])
        self._writer.close()


def open_trackers(args: argparse.Namespace, identity: str, folder: Path) -> list[Wandb | TensorBoard]:
    """Open the trackers of --wandb 1 and --tensorboard 1; a resumed run continues under its id, `identity`."""
    trackers: list[Wandb | TensorBoard] = [] if args.nowand else [Wandb(args, identity)]
    return [*trackers, TensorBoard(folder / "tensorboard")] if args.tensorboard else trackers
