"""Groups of seeds, their labels and their gains over baselines: computed once for tables, notes and figures.

A method that adds something to a base method (config.json's "adds") is compared with its baseline. Its gain, the
AutoAttack accuracy minus the baseline's, needs runs that were made under the same conditions.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

import numpy as np

from experiment import UserError
from experiment.compare.read import Runs
from experiment.compare.runs import PendingRun, RunRecord
from experiment.compare.statistics import interval_of_gain
from experiment.text import ABSENT, comma_list, short_text


@dataclass(frozen=True, eq=False)
class SeedGroup:
    """Runs that differ only in their seed, in the order of their seeds."""

    runs: tuple[RunRecord, ...]
    label: str
    """The method; where a comparison has variants of it, also the settings in which they differ ('lr 0.1')."""
    is_student: bool
    """False for a network without a teacher, such as a teacher, unless it is the baseline of one that has a teacher."""

    @property
    def first(self) -> RunRecord:
        """The first run, for what all runs share."""
        return self.runs[0]

    @property
    def is_baseline(self) -> bool:
        """Whether it adds nothing to its method."""
        return self.first.added is None

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    def values(self, name: str) -> list[float]:
        """One of ``RunRecord.values`` per seed; none unless every seed has it."""
        return [run.values[name] for run in self.runs] if all(name in run.values for run in self.runs) else []


@dataclass(frozen=True, eq=False)
class Gain:
    """AutoAttack accuracy of a group minus another's, over the seeds that both have; fractions."""

    group: SeedGroup
    baseline: SeedGroup
    pairs: list[tuple[RunRecord, RunRecord]]
    """(run of the baseline, run of the group) of each seed."""
    by_seed: dict[int, float]
    differences: np.ndarray
    """Seeds x images: 1 where only the second run of a pair is correct under attack, -1 where only the first is."""

    @property
    def mean(self) -> float:
        return fmean(self.by_seed.values())

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 %, of the mean."""
        return interval_of_gain(self.differences, list(self.by_seed.values()))


@dataclass(frozen=True)
class Comparison:
    """Groups of finished runs, their gains, and runs that are not compared."""

    groups: list[SeedGroup]
    gains: list[Gain]
    """Of additions over their baselines."""
    gains_at_best: list[tuple[Gain, Gain]]
    """(gain at the best epochs, gain at the last ones minus it) of the same groups, where AutoAttack measured both."""
    ablations: list[Gain]
    """Of variants of one method that differ in one setting from the first: each minus the first."""
    not_subtracted: list[str]
    """Why a group has no gain over its baseline, one sentence each."""
    pending: list[PendingRun]
    deeper: list[Path]
    """Run folders further down, which are left out."""

    @property
    def runs(self) -> list[RunRecord]:
        """The finished runs, in the order of the groups."""
        return [run for group in self.groups for run in group.runs]

    @property
    def varying(self) -> list[str]:
        """Those of teacher, student and dataset in which students differ."""
        settings = [group.first.setting for group in self.groups if group.is_student]
        names = ("teacher", "student", "dataset")
        return [name for at, name in enumerate(names) if len({setting[at] for setting in settings}) > 1]


def comparison_of(runs: Runs) -> Comparison:
    """Group, label and subtract runs; UserError if two have all settings in common, and so are not independent."""
    if not runs.finished and not runs.pending:
        raise UserError("there are no runs to compare")
    groups = _grouped(runs.finished)
    gains, not_subtracted = _gains(groups)
    at_best = [
        (best, _minus(gain, best)) for gain in gains if (best := _gain(gain.group, gain.baseline, "best_attack"))
    ]
    return Comparison(groups, gains, at_best, _ablations(groups), not_subtracted, runs.pending, runs.deeper)


def _grouped(runs: Sequence[RunRecord]) -> list[SeedGroup]:
    """Pairs together, the baseline first, variants in the order of their numbers (alpha 2 before alpha 10)."""
    by_identity: dict[str, dict[int, RunRecord]] = {}
    for run in runs:
        identity = json.dumps([*run.pair, run.added, run.conditions], sort_keys=True)
        seeds = by_identity.setdefault(identity, {})
        if run.seed in seeds:
            raise UserError(
                f"{seeds[run.seed].folder} and {run.folder} are the same experiment with the same seed {run.seed}; "
                "give one of them"
            )
        seeds[run.seed] = run

    def place(seeds: dict[int, RunRecord]) -> tuple:
        first = next(iter(seeds.values()))
        numbers = [value for _, value in sorted(first.conditions.items()) if isinstance(value, int | float)]
        return order.index(first.pair), first.added is not None, numbers

    order = list(dict.fromkeys(run.pair for run in runs))
    groups = [tuple(seeds[seed] for seed in sorted(seeds)) for seeds in sorted(by_identity.values(), key=place)]
    firsts = [group[0] for group in groups]
    with_addition = {run.pair for run in firsts if run.added}
    return [
        SeedGroup(group, _label(run, firsts), is_student=bool(run.settings.teacher) or run.pair in with_addition)
        for run, group in zip(firsts, groups, strict=True)
    ]


def _label(run: RunRecord, others: Sequence[RunRecord]) -> str:
    variants = [other for other in others if other.pair == run.pair and other.name == run.name]
    varying = [f"{key} {short_text(run.conditions.get(key, ABSENT))}" for key in _differing(variants)]
    return f"{run.name} ({', '.join(varying)})" if varying else run.name


def _differing(runs: Sequence[RunRecord]) -> list[str]:
    """The conditions in which any of the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.conditions)
    values = {key: [run.conditions.get(key, ABSENT) for run in runs] for key in keys}
    return [key for key, of_runs in values.items() if any(value != of_runs[0] for value in of_runs)]


def _gains(groups: Sequence[SeedGroup]) -> tuple[list[Gain], list[str]]:
    """Subtract its baseline from every group that has one; a sentence for each group where that is not possible."""
    gains, not_subtracted = [], []
    for group in groups:
        baselines = [other for other in groups if other.first.pair == group.first.pair and other.is_baseline]
        if group.is_baseline or not baselines:
            continue
        # Several baselines (another learning rate, say) may be listed: the one that fits is the one subtracted.
        baseline = min(baselines, key=lambda other: len(_differing_settings(group.first, other.first)))
        if reason := _not_comparable(group, baseline):
            what = f"{baseline.first.folder} ({baseline.first.name}) from {group.first.folder} ({group.first.name})"
            not_subtracted.append(f"cannot subtract {what}: {reason}")
        elif gain := _gain(group, baseline):
            gains.append(gain)
    return gains, not_subtracted


def _not_comparable(group: SeedGroup, baseline: SeedGroup) -> str | None:
    if settings := _differing_settings(group.first, baseline.first):
        allowed = comma_list(group.first.config.added_settings) or "nothing"
        return f"they differ in {'; '.join(settings)}. Only {allowed} may differ. Rerun one of them"
    if set(group.seeds).isdisjoint(baseline.seeds):
        seeds = f"{comma_list(baseline.seeds)} and {comma_list(group.seeds)}"
        return f"their seeds differ: {seeds}. Give runs with the same seeds"
    return None


def _differing_settings(run: RunRecord, baseline: RunRecord) -> list[str]:
    """Every setting in which the runs differ, with both values, except those that the addition brings."""
    return [
        f"{key} {short_text(baseline.conditions.get(key, ABSENT))} and {short_text(run.conditions.get(key, ABSENT))}"
        for key in _differing([baseline, run])
        if key.removesuffix("_sha256") not in run.config.added_settings
    ]


def _ablations(groups: Sequence[SeedGroup]) -> list[Gain]:
    """Each variant of a method minus the first one, where they differ in a single setting."""
    found = []
    firsts: dict[object, SeedGroup] = {}
    for group in groups:
        first = firsts.setdefault((group.first.pair, group.first.added), group)
        differing = _differing([first.first, group.first])
        one = len(differing) == 1 and differing != ["dataset_sha256"]  # other images cannot be paired
        if one and (gain := _gain(group, first)):
            found.append(gain)
    return found


def _gain(group: SeedGroup, baseline: SeedGroup, attack: str = "attack") -> Gain | None:
    """`group` minus `baseline`; None unless both have common seeds with results per image, on the same images."""
    by_seed = {run.seed: run for run in baseline.runs}
    pairs = [(by_seed[run.seed], run) for run in group.runs if run.seed in by_seed]
    attacks = [[getattr(run, attack) for run in pair] for pair in pairs]
    images = {len(found.flags or "") if found else 0 for pair in attacks for found in pair}
    if len(images) != 1 or 0 in images:
        return None
    correct = (np.array([[list(found.flags) for found in pair] for pair in attacks]) == "-").astype(int)
    gains = {run.seed: own.accuracy - base.accuracy for (_, run), (base, own) in zip(pairs, attacks, strict=True)}
    return Gain(group, baseline, pairs, gains, correct[:, 1] - correct[:, 0])


def _minus(gain: Gain, other: Gain) -> Gain:
    by_seed = {seed: value - other.by_seed[seed] for seed, value in gain.by_seed.items()}
    return replace(gain, by_seed=by_seed, differences=gain.differences - other.differences)
