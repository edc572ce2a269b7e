"""Rows of runs, the gains of methods over their baselines, and how sure these are."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from experiment import UserError
from experiment.report.results import ABSENT, FinishedRun, listed, shown


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seed, in the order of their seeds."""

    runs: tuple[FinishedRun, ...]

    @property
    def first(self) -> FinishedRun:
        """Any of the runs, for what they share."""
        return self.runs[0]

    @property
    def name(self) -> str:
        """The method, with what it adds."""
        return "+".join(part for part in (self.first.method, self.first.adds) if part)

    @property
    def pair(self) -> tuple[str, ...]:
        """What a baseline and its twin have in common."""
        return (self.first.method, self.first.family, self.first.teacher, self.first.student, self.first.dataset)

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return [run.seed for run in self.runs]

    def values(self, figure: str) -> list[float]:
        """One accuracy per seed; empty if it was not measured."""
        return [value for run in self.runs if (value := getattr(run, figure)) is not None]


@dataclass(frozen=True)
class Gain:
    """AutoAttack accuracy of a row minus that of its baseline, one difference per seed, in fractions."""

    row: Row
    baseline: Row
    by_seed: tuple[float, ...]


def rows_of(runs: Sequence[FinishedRun]) -> list[Row]:
    """Gather runs that differ in nothing but their seed into rows; pairs together, the baseline first.

    Raises:
        UserError: two runs have the same settings and the same seed: they would not be independent repetitions.
    """
    same: dict[str, dict[int, FinishedRun]] = {}
    for run in runs:
        identity = [run.method, run.adds, run.family, run.teacher, run.student, run.dataset, run.conditions]
        seeds = same.setdefault(json.dumps(identity, sort_keys=True), {})
        if run.seed in seeds:
            raise UserError(
                f"{seeds[run.seed].folder} and {run.folder} are the same experiment with the same seed {run.seed}; "
                "give one of them"
            )
        seeds[run.seed] = run
    rows = [Row(tuple(seeds[seed] for seed in sorted(seeds))) for seeds in same.values()]
    order = list(dict.fromkeys(row.pair for row in rows))
    return sorted(rows, key=lambda row: (order.index(row.pair), row.first.adds is not None))


def differences(run: FinishedRun, baseline: FinishedRun) -> list[str]:
    """Name every condition in which the runs differ, with both values, but those that the method itself brings."""
    found = []
    for key in dict.fromkeys([*baseline.conditions, *run.conditions]):
        ours, theirs = run.conditions.get(key, ABSENT), baseline.conditions.get(key, ABSENT)
        if key not in run.added_settings and ours != theirs:
            found.append(f"{key} {shown(theirs)} and {shown(ours)}")
    return found


def gains_of(rows: Sequence[Row]) -> tuple[list[Gain], list[str]]:
    """Subtract its baseline from every row that has one; rows of different methods are never subtracted.

    Returns:
        The gains, and for each row that was made under other conditions or with other seeds than its baseline a
        sentence that names each of them with both values.
    """
    gains, refusals = [], []
    for row in rows:
        baselines = [other for other in rows if other.pair == row.pair and other.first.adds is None]
        if row.first.adds is None or not baselines:
            continue
        # Several baselines (another learning rate, say) may be listed: the one that fits is the one subtracted.
        baseline = min(baselines, key=lambda other: len(differences(row.first, other.first)))
        subtraction = f"cannot subtract {baseline.first.folder} ({baseline.name}) from {row.first.folder} ({row.name})"
        if found := differences(row.first, baseline.first):
            allowed = ", ".join(row.first.added_settings) or "nothing"
            refusals.append(
                f"{subtraction}, they differ in {'; '.join(found)}; only {allowed} may differ: rerun one of them"
            )
            continue
        if row.seeds != baseline.seeds:
            refusals.append(
                f"{subtraction}, their seeds differ: {listed(baseline.seeds)} and {listed(row.seeds)}; "
                "give runs with the same seeds"
            )
            continue
        attack_seeds, theirs = ([run.attack.get("seed") for run in each.runs] for each in (row, baseline))
        if attack_seeds != theirs:
            refusals.append(
                f"{subtraction}, they differ in AutoAttack seed {listed(theirs)} and {listed(attack_seeds)}; "
                "rerun one of them"
            )
            continue
        ours, theirs = row.values("autoattack"), baseline.values("autoattack")
        if ours:
            by_seed = tuple(a - b for a, b in zip(ours, theirs, strict=True))
            gains.append(Gain(row, baseline, by_seed))
    return gains, refusals


def half_width(accuracy: float, examples: int) -> float:
    """Half of the 95 % binomial interval of an accuracy measured on `examples` images, as a fraction.

    Wilson's interval, which unlike the textbook one does not shrink to nothing at 0 and 1.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    z = 1.959964
    spread = accuracy * (1 - accuracy) / examples + z**2 / (4 * examples**2)
    return z * math.sqrt(spread) / (1 + z**2 / examples)


def gain_uncertainty(gain: Gain) -> float:
    """Half-width of the 95 % interval of the mean gain, as a fraction.

    The binomial half-widths of the two accuracies, unpaired, and with several seeds Student's t interval of the mean
    over seeds, added in quadrature. Every seed is measured on the same images, so more seeds do not narrow the former.
    """
    examples = gain.row.first.attack["examples"]
    parts = [half_width(fmean(row.values("autoattack")), examples) for row in (gain.row, gain.baseline)]
    n = len(gain.by_seed)
    if n > 1:
        from scipy.stats import t  # takes a second to import

        parts.append(float(t.ppf(0.975, n - 1)) * stdev(gain.by_seed) / math.sqrt(n))
    return math.hypot(*parts)
