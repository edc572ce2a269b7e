"""Do gradient alignment and robustness move together? What the runs at hand say, in sentences."""

from collections.abc import Sequence
from statistics import fmean

from experiment.compare.groups import Gain, SeedGroup
from experiment.compare.run_record import RunRecord
from experiment.compare.text import comma_list
from experiment.text import short_name

MEASURES = {"GC": ("gc", 1), "GD": ("gd", -1), "logit GC": ("logit_gc", 1), "logit GD": ("logit_gd", -1)}
"""By name: the attribute of a run, and the sign of a change that brings the student closer to the teacher."""
FEWEST = 6
"""Of fewer students or pairs nothing is told."""
DIGITS = 9
"""Decimals of a value before it is ranked: far more than is printed, far fewer than a float has."""


def alignment_notes(groups: Sequence[SeedGroup], gains: Sequence[Gain]) -> list[str]:
    """Per teacher, student and dataset: rank correlations over students, and in how many pairs what moved."""
    notes = []
    for setting in dict.fromkeys(map(_setting, groups)):
        students = [list(filter(_is_measured, group.runs)) for group in groups if _setting(group) == setting]
        runs = [run for same in students for run in same]
        pairs = [pair for gain in gains if _setting(gain.group) == setting for pair in _pairs(gain)]
        teacher, *rest = setting
        where = f"Alignment and robustness ({comma_list([short_name(teacher), *rest])})"
        if len(runs) >= FEWEST and len({run.name for run in runs}) > 1:
            found = _correlations(students)
            aside = ", and in brackets with the mean of each method taken off" if "(" in found else ""
            notes.append(
                f"{where}, rank correlation with AutoAttack accuracy over {len(runs)} students{aside}: {found}. (It "
                "describes and does not test: students of one method, or of one seed, are not independent.)"
            )
        if len(pairs) >= FEWEST:
            rose = sum(base.autoattack < twin.autoattack for base, twin in pairs)
            moved = [
                f"{name} {'rose' if sign > 0 else 'fell'} in {sum(sign * change > 0 for change in changes)}"
                for name, (key, sign) in MEASURES.items()
                if None not in (changes := [_change(pair, key) for pair in pairs])
            ]
            notes.append(f"{where}, of {len(pairs)} pairs of one seed: AutoAttack rose in {rose}, {comma_list(moved)}.")
    return notes


def _pairs(gain: Gain) -> list[tuple[RunRecord, RunRecord]]:
    by_seed = [{run.seed: run for run in side.runs} for side in (gain.baseline, gain.group)]
    pairs = [(by_seed[0][seed], by_seed[1][seed]) for seed in gain.by_seed]
    return [pair for pair in pairs if all(map(_is_measured, pair))]


def _is_measured(run: RunRecord) -> bool:
    return run.autoattack is not None and run.gc is not None


def _setting(group: SeedGroup) -> tuple[str, str, str]:
    return group.first.teacher, group.first.student, group.first.dataset


def _change(pair: tuple[RunRecord, RunRecord], key: str) -> float | None:
    before, after = (getattr(run, key) for run in pair)
    return None if before is None or after is None else after - before


def _correlations(groups: Sequence[Sequence[RunRecord]]) -> str:
    """Spearman's, of each measure that all runs have, with AutoAttack accuracy; and that of what is left of both when
    each group's mean is taken off, which no difference between methods can bring about.
    """
    from scipy.stats import spearmanr

    found = []
    for name, (key, _) in MEASURES.items():
        tables = [[(getattr(run, key), run.autoattack) for run in runs] for runs in groups]
        points = [point for table in tables for point in table]
        if None in (value for value, _ in points) or 1 in map(len, map(set, zip(*points, strict=True))):
            continue
        text = f"{name} {spearmanr(*zip(*points, strict=True)).statistic:+.2f}"
        within = [point for table in tables if len(table) > 1 for point in _centred(table)]
        if len(within) >= FEWEST:
            text += f" ({spearmanr(*zip(*within, strict=True)).statistic:+.2f})"
        found.append(text)
    return comma_list(found) or "none to be told"


def _centred(table: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value minus the mean of its column, rounded so that float error does not break ties."""
    means = [fmean(values) for values in zip(*table, strict=True)]
    return [(round(x - means[0], DIGITS), round(y - means[1], DIGITS)) for x, y in table]
