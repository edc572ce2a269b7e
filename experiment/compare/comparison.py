"""Runs grouped by seed, labelled, and subtracted from their baselines: made once, for tables, notes and figures.

A method that adds something to a base method (config.json's "adds") is compared with its baseline. Its gain, the
AutoAttack accuracy minus the baseline's, needs runs that were made under the same conditions.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from experiment import UserError
from experiment.compare.read import Runs
from experiment.compare.run_record import PendingRun, RunRecord
from experiment.compare.statistics import interval_of_gain, mcnemar
from experiment.text import ABSENT, comma_list, short_text


@dataclass(frozen=True, eq=False)
class SeedGroup:
    """Runs that differ in nothing but their seed, in the order of their seeds."""

    runs: tuple[RunRecord, ...]
    label: str
    """The method; where a comparison has variants of it, also the settings in which they differ ('lr 0.1')."""
    is_student: bool
    """False for a network without a teacher, such as a teacher, unless it is the baseline of one that has a teacher."""

    @property
    def first(self) -> RunRecord:
        """Any of the runs, for what they share."""
        return self.runs[0]

    @property
    def pair(self) -> tuple[str, ...]:
        """What a baseline and the version with an addition share."""
        return _pair(self.first)

    @property
    def setting(self) -> tuple[str, str, str]:
        """Teacher, student and dataset."""
        return self.first.teacher, self.first.student, self.first.dataset

    @property
    def is_baseline(self) -> bool:
        """Whether it adds nothing to its method."""
        return self.first.added is None

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return [run.seed for run in self.runs]

    def values(self, name: str) -> list[float]:
        """One of ``RunRecord.values`` per seed that has it."""
        return [run.values[name] for run in self.runs if name in run.values]

    def all_values(self, name: str) -> list[float]:
        """As `values`, but empty unless every seed has one."""
        values = self.values(name)
        return values if len(values) == len(self.runs) else []


@dataclass(frozen=True)
class Gain:
    """AutoAttack accuracy of a group minus another's, over the seeds that both have; fractions."""

    group: SeedGroup
    baseline: SeedGroup
    by_seed: dict[int, float]
    p_values: dict[int, float]
    """McNemar's, by seed."""
    interval: tuple[float, float]
    """95 %, of the mean."""

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return fmean(self.by_seed.values())

    @property
    def includes_0(self) -> bool:
        """Whether the interval includes 0."""
        return self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class GainAtBest:
    """A gain at the epochs that the held-out images chose, and how much larger it is at the last epoch."""

    gain: Gain
    last_minus_best: float
    interval: tuple[float, float]
    """95 %, of `last_minus_best`."""


@dataclass(frozen=True)
class Comparison:
    """Groups of finished runs, their gains, and runs that are not compared."""

    groups: list[SeedGroup]
    gains: list[Gain]
    """Of additions over their baselines."""
    gains_at_best: list[GainAtBest]
    """Of the same groups, where AutoAttack measured the best epochs too (--aa_best)."""
    ablations: list[Gain]
    """Of variants of one method that differ in one setting from the first: each minus the first."""
    refusals: list[str]
    """Why a group has no gain over its baseline, one sentence each."""
    pending: list[PendingRun]
    left_out: list[str]
    """What was read and is not shown, one sentence each."""

    @property
    def varying(self) -> list[str]:
        """Those of teacher, student and dataset in which students differ."""
        settings = [group.setting for group in self.groups if group.is_student]
        names = zip(("teacher", "student", "dataset"), zip(*settings, strict=True), strict=bool(settings))
        return [name for name, values in names if len(set(values)) > 1]


def comparison_of(runs: Runs) -> Comparison:
    """Group, label and subtract runs.

    Raises:
        UserError: there is no run; two runs have the same settings and the same seed, so that they are not independent.
    """
    if not runs.finished and not runs.pending:
        raise UserError("there are no runs to compare")
    finished, left_out = _on_the_same_images(runs.finished)
    if runs.deeper:
        left_out.append(f"Runs in deeper folders are left out ({len(runs.deeper)}), such as {runs.deeper[0]}.")
    groups = _grouped(finished)
    gains, refusals = _gains(groups)
    best = [
        _gain_at_best(gain) for gain in gains if all(run.best_flags for run in (*gain.group.runs, *gain.baseline.runs))
    ]
    return Comparison(groups, gains, best, _ablations(groups), refusals, runs.pending, left_out)


def _on_the_same_images(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """The runs with evaluate.py's gradients only where measured on as many images as any; what was left out."""
    most: dict[str, int] = defaultdict(int)
    for run in runs:
        most[run.dataset] = max(most[run.dataset], run.gradients.get("scalars_examples", 0))
    kept, left_out = [], []
    for run in runs:
        images = run.gradients.get("scalars_examples", most[run.dataset])
        if images == most[run.dataset]:
            kept.append(run)
        else:
            left_out.append(
                f"Logit GD and logit GC of {run.folder.name} are left out: measured on {images} images, others on "
                f"{most[run.dataset]}. Measure again with: python evaluate.py {run.folder} --attacks gradients "
                f"--examples {most[run.dataset]}"
            )
            values = {name: value for name, value in run.values.items() if not name.startswith("logit")}
            kept.append(replace(run, values=values))
    return kept, left_out


def _pair(run: RunRecord) -> tuple[str, ...]:
    teacher = run.teacher if "teacher" not in run.added_settings else "-"  # added: the baseline has none
    return run.method, run.base_script, teacher, run.student, run.dataset


def _grouped(runs: Sequence[RunRecord]) -> list[SeedGroup]:
    """Pairs together, the baseline first, variants in the order of their numbers (alpha 2 before alpha 10)."""
    by_identity: dict[str, dict[int, RunRecord]] = {}
    for run in runs:
        identity = json.dumps([*_pair(run), run.added, run.settings], sort_keys=True)
        seeds = by_identity.setdefault(identity, {})
        if run.seed in seeds:
            raise UserError(
                f"{seeds[run.seed].folder} and {run.folder} are the same experiment with the same seed {run.seed}; "
                "give one of them"
            )
        seeds[run.seed] = run

    def place(seeds: dict[int, RunRecord]) -> tuple:
        first = next(iter(seeds.values()))
        numbers = [value for _, value in sorted(first.settings.items()) if isinstance(value, int | float)]
        return order.index(_pair(first)), first.added is not None, numbers

    order = list(dict.fromkeys(map(_pair, runs)))
    groups = [tuple(seeds[seed] for seed in sorted(seeds)) for seeds in sorted(by_identity.values(), key=place)]
    firsts = [group[0] for group in groups]
    added = {_pair(run) for run in firsts if run.added}
    return [
        SeedGroup(group, _label(run, firsts), is_student=run.teacher != "-" or _pair(run) in added)
        for run, group in zip(firsts, groups, strict=True)
    ]


def _label(run: RunRecord, others: Sequence[RunRecord]) -> str:
    variants = [other.settings for other in others if _pair(other) == _pair(run) and other.name == run.name]
    varying = [
        f"{key} {short_text(run.settings.get(key, ABSENT))}"
        for key in dict.fromkeys(key for settings in variants for key in settings)
        if any(settings.get(key) != run.settings.get(key) for settings in variants)
    ]
    return f"{run.name} ({', '.join(varying)})" if varying else run.name


def _gains(groups: Sequence[SeedGroup]) -> tuple[list[Gain], list[str]]:
    """Subtract its baseline from every group that has one; a sentence for each group where that is not possible."""
    gains, refusals = [], []
    for group in groups:
        baselines = [other for other in groups if other.pair == group.pair and other.is_baseline]
        if group.is_baseline or not baselines:
            continue
        # Several baselines (another learning rate, say) may be listed: the one that fits is the one subtracted.
        baseline = min(baselines, key=lambda other: len(_differing_settings(group.first, other.first)))
        pairs = _pairs(group, baseline)
        if reason := _not_comparable(group, baseline, pairs):
            what = f"{baseline.first.folder} ({baseline.first.name}) from {group.first.folder} ({group.first.name})"
            refusals.append(f"cannot subtract {what}: {reason}")
        elif _attacked(pairs):
            gains.append(_gain(group, baseline, pairs))
    return gains, refusals


def _not_comparable(group: SeedGroup, baseline: SeedGroup, pairs: Sequence[tuple[RunRecord, RunRecord]]) -> str | None:
    if settings := _differing_settings(group.first, baseline.first):
        allowed = ", ".join(group.first.added_settings) or "nothing"
        return f"they differ in {'; '.join(settings)}. Only {allowed} may differ. Rerun one of them"
    if not pairs:
        return (
            f"their seeds differ: {comma_list(baseline.seeds)} and {comma_list(group.seeds)}. "
            "Give runs with the same seeds"
        )
    seeds = _attack_seeds(pairs)
    if seeds[0] != seeds[1]:
        return f"they differ in AutoAttack seed {comma_list(seeds[0])} and {comma_list(seeds[1])}. Rerun one of them"
    if any(run.attack and not run.flags for pair in pairs for run in pair):
        return "AutoAttack's result per image is missing. Rerun one of them"
    return None


def _differing_settings(run: RunRecord, baseline: RunRecord) -> list[str]:
    """Every setting in which the runs differ, with both values, except those that the addition brings."""
    found = []
    for key in dict.fromkeys([*baseline.settings, *run.settings]):
        of_run, of_baseline = run.settings.get(key, ABSENT), baseline.settings.get(key, ABSENT)
        if key.removesuffix("_sha256") not in run.added_settings and of_run != of_baseline:
            found.append(f"{key} {short_text(of_baseline)} and {short_text(of_run)}")
    return found


def _ablations(groups: Sequence[SeedGroup]) -> list[Gain]:
    """Each variant of a method minus the first one, where they differ in a single setting."""
    found = []
    firsts: dict[object, SeedGroup] = {}
    for group in groups:
        first = firsts.setdefault((group.pair, group.first.added), group)
        of_first, settings = first.first.settings, group.first.settings
        differing = [key for key in {**of_first, **settings} if of_first.get(key) != settings.get(key)]
        if len(differing) != 1 or differing == ["dataset_sha256"]:  # other images cannot be paired
            continue
        pairs = _pairs(group, first)
        attack_seeds = _attack_seeds(pairs)
        if pairs and _attacked(pairs) and attack_seeds[0] == attack_seeds[1]:
            found.append(_gain(group, first, pairs))
    return found


def _pairs(group: SeedGroup, baseline: SeedGroup) -> list[tuple[RunRecord, RunRecord]]:
    """(run of the baseline, run of the group) for each seed that both have."""
    by_seed = {run.seed: run for run in baseline.runs}
    return [(by_seed[run.seed], run) for run in group.runs if run.seed in by_seed]


def _attack_seeds(pairs: Sequence[tuple[RunRecord, RunRecord]]) -> tuple[list[object], list[object]]:
    return [base.attack.get("seed") for base, _ in pairs], [run.attack.get("seed") for _, run in pairs]


def _attacked(pairs: Sequence[tuple[RunRecord, RunRecord]]) -> bool:
    return all(run.flags for pair in pairs for run in pair)


def _gain_at_best(last: Gain) -> GainAtBest:
    pairs = _pairs(last.group, last.baseline)
    best = _gain(last.group, last.baseline, pairs, "best_")
    tables = zip(_differences(pairs), _differences(pairs, "best_"), strict=True)
    table = [[of_last - of_best for of_last, of_best in zip(*rows, strict=True)] for rows in tables]
    by_seed = [last.by_seed[seed] - best.by_seed[seed] for seed in last.by_seed]
    return GainAtBest(best, fmean(by_seed), interval_of_gain(table, by_seed))


def _differences(pairs: Sequence[tuple[RunRecord, RunRecord]], of: str = "") -> list[list[int]]:
    """Seeds x images, of the last epoch or of the best one."""
    flags = [(getattr(base, f"{of}flags"), getattr(run, f"{of}flags")) for base, run in pairs]
    return [[(flag == "-") - (of_base == "-") for of_base, flag in zip(*pair, strict=True)] for pair in flags]


def _gain(group: SeedGroup, baseline: SeedGroup, pairs: Sequence[tuple[RunRecord, RunRecord]], of: str = "") -> Gain:
    name = f"{of}autoattack"
    by_seed = {run.seed: run.values[name] - base.values[name] for base, run in pairs}
    differences = _differences(pairs, of)
    p_values = {run.seed: mcnemar(row) for (_, run), row in zip(pairs, differences, strict=True)}
    return Gain(group, baseline, by_seed, p_values, interval_of_gain(differences, list(by_seed.values())))
