"""Runs that differ in their seed only as one group, each group beside its baseline, and its gain over it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from experiment import UserError
from experiment.compare.run_record import RunRecord
from experiment.compare.statistics import bootstrap_interval, mcnemar, t_half_width, unpaired_half_width
from experiment.compare.text import ABSENT, comma_list, short_text


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in nothing but their seed, in the order of their seeds."""

    runs: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        """Any of the runs, for what they share."""
        return self.runs[0]

    @property
    def name(self) -> str:
        """The method, with what it adds."""
        return self.first.name

    @property
    def pair(self) -> tuple[str, ...]:
        """What a baseline and its twin have in common."""
        first = self.first
        teacher = first.teacher if "teacher" not in first.added_settings else "-"  # added: the baseline has none
        return (first.method, first.base_script, teacher, first.student, first.dataset)

    @property
    def is_baseline(self) -> bool:
        """Whether it adds nothing to its method."""
        return self.first.added is None

    @property
    def numbers(self) -> list[float]:
        """The settings that are numbers, to list alpha 2 before alpha 10."""
        return [value for _, value in sorted(self.first.settings.items()) if isinstance(value, int | float)]

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return [run.seed for run in self.runs]

    def values(self, figure: str) -> list[float]:
        """One value of an attribute of the runs per seed; those that were not measured are left out."""
        return [value for run in self.runs if (value := getattr(run, figure)) is not None]

    def all_values(self, figure: str) -> list[float]:
        """As `values`, but none unless every seed has one."""
        values = self.values(figure)
        return values if len(values) == len(self.runs) else []


@dataclass(frozen=True)
class Gain:
    """AutoAttack accuracy of a group minus its baseline's, over the seeds that both have; fractions."""

    group: SeedGroup
    baseline: SeedGroup
    by_seed: dict[int, float]
    p_values: dict[int, float]
    """McNemar's, by seed; empty if it is not known which images fell."""
    interval: tuple[float, float]
    """95 %, of the mean: with several seeds the wider of Student's t over seeds and the bootstrap or unpaired one."""
    paired: bool
    """Whether the interval is of the bootstrap over seeds and images; else it is of unpaired accuracies."""

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return fmean(self.by_seed.values())

    @property
    def verdict(self) -> str:
        """Whether the interval includes 0."""
        low, high = self.interval
        return "it includes 0" if low <= 0 <= high else "it excludes 0"


def group_by_seed(runs: Sequence[RunRecord]) -> list[SeedGroup]:
    """Gather runs that differ in nothing but their seed; pairs together, the baseline first, variants by their numbers.

    Raises:
        UserError: two runs have the same settings and the same seed: they would not be independent repetitions.
    """
    same: dict[str, dict[int, RunRecord]] = {}
    for run in runs:
        identity = [run.method, run.added, run.base_script, run.teacher, run.student, run.dataset, run.settings]
        seeds = same.setdefault(json.dumps(identity, sort_keys=True), {})
        if run.seed in seeds:
            raise UserError(
                f"{seeds[run.seed].folder} and {run.folder} are the same experiment with the same seed {run.seed}; "
                "give one of them"
            )
        seeds[run.seed] = run
    groups = [SeedGroup(tuple(seeds[seed] for seed in sorted(seeds))) for seeds in same.values()]
    order = list(dict.fromkeys(group.pair for group in groups))
    return sorted(groups, key=lambda group: (order.index(group.pair), not group.is_baseline, group.numbers))


def differences(run: RunRecord, baseline: RunRecord) -> list[str]:
    """Name every setting in which the runs differ, with both values, but those that the method itself brings."""
    found = []
    for key in dict.fromkeys([*baseline.settings, *run.settings]):
        ours, theirs = run.settings.get(key, ABSENT), baseline.settings.get(key, ABSENT)
        if key.removesuffix("_sha256") not in run.added_settings and ours != theirs:
            found.append(f"{key} {short_text(theirs)} and {short_text(ours)}")
    return found


def gains_of(groups: Sequence[SeedGroup]) -> tuple[list[Gain], list[str]]:
    """Subtract its baseline from every group that has one; different methods are never subtracted.

    Returns:
        The gains, and for each group that was made under other conditions than its baseline, or shares no seed with
        it, a sentence that names each of them with both values.
    """
    gains, refusals = [], []
    for group in groups:
        baselines = [other for other in groups if other.pair == group.pair and other.is_baseline]
        if group.is_baseline or not baselines:
            continue
        # Several baselines (another learning rate, say) may be listed: the one that fits is the one subtracted.
        baseline = min(baselines, key=lambda other: len(differences(group.first, other.first)))
        what = f"cannot subtract {baseline.first.folder} ({baseline.name}) from {group.first.folder} ({group.name})"
        if found := differences(group.first, baseline.first):
            allowed = ", ".join(group.first.added_settings) or "nothing"
            refusals.append(f"{what}, they differ in {'; '.join(found)}; only {allowed} may differ: rerun one of them")
            continue
        pairs = _pairs(group, baseline)
        if not pairs:
            refusals.append(
                f"{what}, their seeds differ: {comma_list(baseline.seeds)} and {comma_list(group.seeds)}; "
                "give runs with the same seeds"
            )
            continue
        attack_seeds = _attack_seeds(pairs)
        if attack_seeds[0] != attack_seeds[1]:
            refusals.append(
                f"{what}, they differ in AutoAttack seed {comma_list(attack_seeds[0])} and "
                f"{comma_list(attack_seeds[1])}; rerun one of them"
            )
            continue
        if _attacked(pairs):
            gains.append(_gain(group, baseline, pairs))
    return gains, refusals


def contrasts_of(groups: Sequence[SeedGroup]) -> list[Gain]:
    """Where one method stands in two variants that differ in one setting only: the second's accuracy minus the first's.

    An ablation, such as one target of the teacher against another; of three variants or more none is subtracted.
    """
    found = []
    for first in groups:
        same = [group for group in groups if (group.pair, group.name) == (first.pair, first.name)]
        if len(same) != 2 or same[0] is not first:
            continue
        ours, theirs = same[1].first.settings, first.first.settings
        pairs = _pairs(same[1], first)
        differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        attack_seeds = _attack_seeds(pairs)
        one = len(differing) == 1 and differing != ["dataset_sha256"]  # other images cannot be paired
        if one and pairs and _attacked(pairs) and attack_seeds[0] == attack_seeds[1]:
            found.append(_gain(same[1], first, pairs))
    return found


def _pairs(group: SeedGroup, baseline: SeedGroup) -> list[tuple[RunRecord, RunRecord]]:
    """(run of the baseline, run of the group) for each seed that both have."""
    theirs = {run.seed: run for run in baseline.runs}
    return [(theirs[run.seed], run) for run in group.runs if run.seed in theirs]


def _attack_seeds(pairs: Sequence[tuple[RunRecord, RunRecord]]) -> tuple[list[object], list[object]]:
    return [base.attack.get("seed") for base, _ in pairs], [twin.attack.get("seed") for _, twin in pairs]


def _attacked(pairs: Sequence[tuple[RunRecord, RunRecord]]) -> bool:
    return all(run.autoattack is not None for pair in pairs for run in pair)


def _gain(group: SeedGroup, baseline: SeedGroup, pairs: Sequence[tuple[RunRecord, RunRecord]]) -> Gain:
    by_seed = {twin.seed: twin.autoattack - base.autoattack for base, twin in pairs}
    flags = [(base.withstood(), twin.withstood()) for base, twin in pairs]
    if all(base and twin for base, twin in flags):
        table = [[int(t) - int(b) for b, t in zip(base, twin, strict=True)] for base, twin in flags]
        p_values = {twin.seed: mcnemar(*both) for (_, twin), both in zip(pairs, flags, strict=True)}
        interval = _wider(bootstrap_interval(table), by_seed)
        return Gain(group, baseline, by_seed, p_values, interval, paired=True)
    means = [fmean(run.autoattack for run in side) for side in zip(*pairs, strict=True)]
    half = unpaired_half_width(*means, group.first.attack["examples"])
    mean = fmean(by_seed.values())
    return Gain(group, baseline, by_seed, {}, _wider((mean - half, mean + half), by_seed), paired=False)


def _wider(interval: tuple[float, float], by_seed: dict[int, float]) -> tuple[float, float]:
    """`interval`, or with several seeds Student's over the seeds where that is wider."""
    if len(by_seed) == 1:
        return interval
    mean, half = fmean(by_seed.values()), t_half_width(list(by_seed.values()))
    return max(interval, (mean - half, mean + half), key=lambda ends: ends[1] - ends[0])


def unequal_settings(groups: Sequence[SeedGroup]) -> list[str]:
    """Every setting in which groups of runs, all with the same data, differ, though it is not their method's own.

    A difference between methods counts too: two methods trained for unequal epochs are no fair comparison.
    """
    own = {key for group in groups for key in (*group.first.added_settings, *group.first.method_settings)}
    # The inner maximisation is a method's own, so it is compared within a method; the columns of the table show theirs.
    shown = {"attack", "student", "teacher", "teacher_sha256", "dataset", "dataset_sha256", "num_classes"}
    students = [group for group in groups if group.first.teacher != "-"]
    found = []
    for key in dict.fromkeys(key for group in students for key in group.first.settings):
        if key in own | shown:
            continue
        names: dict[str, dict[str, None]] = {}
        for group in students:
            value = short_text(group.first.settings.get(key, ABSENT))
            names.setdefault(value, {})[group.name] = None
        if len(names) > 1:
            found.append(f"{key} " + ", ".join(f"{value} ({comma_list(users)})" for value, users in names.items()))
    for key, column in (("teacher_sha256", "teacher"), ("dataset_sha256", "dataset"), ("attack", "method")):
        by_column: dict[str, dict[str, None]] = {}
        for group in students:
            value = short_text(group.first.settings.get(key, ABSENT))
            by_column.setdefault(getattr(group.first, column), {})[value] = None
        found += [f"{key} {' and '.join(v)} ({name})" for name, v in by_column.items() if len(v) > 1]
    return found
