"""Weights & Biases: a mirror of the rows of metrics.jsonl and of the result, and of nothing else."""

import argparse
import os
from typing import Any

from experiment import UserError


class WandbMirror:
    """Weights & Biases: the rows of metrics.jsonl and the result, and nothing else."""

    def __init__(self, args: argparse.Namespace, identity: str, *, enabled: bool) -> None:
        """Log in and start the W&B run, or do nothing where --nowand is 1.

        Args:
            identity: stable id of the run, under which a resumed run goes on.

        Raises:
            UserError: wandb is missing, no one is logged in, or its server does not answer within 20 s.
        """
        self._run = None
        if args.nowand or not enabled:
            return
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "--nowand 0 needs the package wandb: pip install -r requirements.txt, or --nowand 1"
            ) from error
        # An explicit mode would beat WANDB_MODE, so it is left to the environment.
        online = os.environ.get("WANDB_MODE", "online") == "online"
        ways_out = "WANDB_MODE=offline keeps the log here, --nowand 1 does without"
        if online and not wandb.login(prompt=False, verify=False):
            # init() would prompt on a terminal, and a batch job would wait for ever.
            raise UserError(f"--nowand 0, but no one is logged in to Weights & Biases: run `wandb login`; {ways_out}")
        try:
            self._run = wandb.init(
                project=args.wandb_project,
                entity=args.wandb_entity,
                name=args.wandb_name or args.run_name,
                tags=args.wandb_tags,
                config=vars(args),
                id=identity,
                resume="allow" if online else None,
                settings=wandb.Settings(init_timeout=20, silent=True),
            )
        except (wandb.errors.Error, OSError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"Weights & Biases does not answer ({reason}); {ways_out}") from error

    def log(self, row: dict[str, Any]) -> None:
        """WandbMirror one row of metrics.jsonl."""
        if self._run:
            self._run.log(row, step=row["epoch"])

    def finish(self, result: dict[str, Any]) -> None:
        """WandbMirror result.json and close."""
        if self._run:
            self._run.summary.update(result)
            self._run.finish()
