"""Runs grouped by seed, subtracted from their baselines, as tables and sentences.

A method that adds something to a base method (config.json's "adds") stands beside its baseline; its gain, the
AutoAttack accuracy minus the baseline's, is told only if the two were made under the same conditions.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from experiment import UserError
from experiment.report.exports import as_markdown, markdown_text
from experiment.report.groups import Gain, SeedGroup, contrasts_of, gains_of, group_by_seed
from experiment.report.notes import notes_of
from experiment.report.run_record import PendingRun
from experiment.report.sources import Runs
from experiment.report.tables import Table, pending_table, published_table, results_table


@dataclass(frozen=True)
class Comparison:
    """Groups of finished runs, their gains, what could not be subtracted, and runs that are not in it."""

    groups: list[SeedGroup]
    gains: list[Gain]
    refusals: list[str]
    pending: list[PendingRun]
    deeper: list[Path] = field(default_factory=list)

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
        return [*notes_of(self.groups, [*self.gains, *contrasts_of(self.groups)], self.pending), *refused, *deeper]

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
    groups = group_by_seed(runs.finished)
    return Comparison(groups, *gains_of(groups), runs.pending, runs.deeper)
