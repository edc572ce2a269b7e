"""Runs grouped by seed, subtracted from their baselines, as tables and sentences.

A method that adds something to a base method (config.json's "adds") stands beside its baseline; its gain, the
AutoAttack accuracy minus the baseline's, is told only if the two were made under the same conditions.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from experiment import UserError
from experiment.compare.exports import as_markdown, markdown_text
from experiment.compare.groups import Gain, SeedGroup, contrasts_of, gains_of, group_by_seed
from experiment.compare.notes import notes_of
from experiment.compare.run_record import PendingRun, RunRecord
from experiment.compare.sources import Runs
from experiment.compare.tables import pending_table, published_table, results_table
from experiment.text import Table


@dataclass(frozen=True)
class Comparison:
    """Groups of finished runs, their gains, what could not be subtracted, and runs that are not in it."""

    groups: list[SeedGroup]
    gains: list[Gain]
    refusals: list[str]
    pending: list[PendingRun]
    deeper: list[Path] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    """Sentences about evaluate.py's gradients that are left out."""

    @cached_property
    def tables(self) -> list[Table]:
        """The results, ours beside published figures, and the runs that are not finished; those that have rows."""
        tables = [results_table(self.groups, self.gains)] if self.groups else []
        extra = (published_table(self.groups, self.pending), pending_table(self.pending))
        return tables + [table for table in extra if table]

    @cached_property
    def notes(self) -> list[str]:
        """Sentences for below the tables."""
        refused = [f"No gain: {refusal}." for refusal in self.refusals]
        deeper = [f"Left out: {len(self.deeper)} runs further down, such as {self.deeper[0]}."] if self.deeper else []
        return [
            *notes_of(self.groups, [*self.gains, *contrasts_of(self.groups)], self.pending),
            *self.unlike,
            *refused,
            *deeper,
        ]

    def markdown(self) -> str:
        """Tables and notes."""
        parts = [as_markdown(table) for table in self.tables]
        return "\n\n".join([*parts, "\n".join(f"- {markdown_text(note)}" for note in self.notes)]) + "\n"


def comparison_of(runs: Runs) -> Comparison:
    """Group and subtract runs.

    Raises:
        UserError: see ``group_by_seed``; there is neither a finished nor an unfinished run.
    """
    if not runs.finished and not runs.pending:
        raise UserError("there are no runs to compare")
    finished, unlike = _on_the_same_images(runs.finished)
    groups = group_by_seed(finished)
    return Comparison(groups, *gains_of(groups), runs.pending, runs.deeper, unlike)


def _on_the_same_images(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """The runs with evaluate.py's gradients only where measured on as many images as any; what was left out."""
    most: dict[str, int] = defaultdict(int)
    for run in runs:
        most[run.dataset] = max(most[run.dataset], run.gradients.get("scalars_examples", 0))
    kept, left_out = [], []
    for run in runs:
        images = run.gradients.get("scalars_examples")
        if images is None or images == most[run.dataset]:
            kept.append(run)
            continue
        gradients = {key: value for key, value in run.gradients.items() if not key.startswith("scalars")}
        kept.append(replace(run, gradients=gradients))
        left_out.append(
            f"Logit GD and logit GC of {run.folder.name} are left out: measured on {images} images, others on "
            f"{most[run.dataset]}. Measure again with: python evaluate.py {run.folder} --attacks gradients "
            f"--examples {most[run.dataset]}"
        )
    return kept, left_out
