"""Do gradient alignment and robustness move together? What the runs at hand say, in sentences."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TypeVar

from experiment.report.groups import Gain, SeedGroup
from experiment.report.run_record import RunRecord
from experiment.report.text import comma_list, p_value, short_name

MEASURES = {"GC": ("gc", 1), "GD": ("gd", -1), "logit GC": ("logit_gc", 1), "logit GD": ("logit_gd", -1)}
"""By name: the attribute of a run, and the sign of a change that brings the student closer to the teacher."""
Point = TypeVar("Point")
FEWEST = 6
"""Below so many points, a rank correlation of 1 is no evidence."""


def alignment_notes(groups: Sequence[SeedGroup], gains: Sequence[Gain]) -> list[str]:
    """Per teacher, student and dataset: rank correlations over students and over pairs, and how many pairs moved."""
    notes = []
    for setting in dict.fromkeys(map(_setting, groups)):
        runs = [run for group in groups if _setting(group) == setting for run in group.runs if _is_measured(run)]
        pairs = [pair for gain in gains if _setting(gain.group) == setting for pair in _pairs(gain)]
        teacher, *rest = setting
        where = f"Alignment and robustness ({comma_list([short_name(teacher), *rest])})"
        if len(runs) >= FEWEST and len({run.name for run in runs}) > 1:
            found = _correlations(runs, getattr)
            notes.append(f"{where}, rank correlation with AutoAttack accuracy over {len(runs)} students: {found}.")
        if len(pairs) >= FEWEST:
            rose = sum(base.autoattack < twin.autoattack for base, twin in pairs)
            moved = [
                f"{name} {'rose' if sign > 0 else 'fell'} in {sum(sign * change > 0 for change in changes)}"
                for name, (key, sign) in MEASURES.items()
                if None not in (changes := [_change(pair, key) for pair in pairs])
            ]
            notes.append(
                f"{where}, of {len(pairs)} pairs of one seed: AutoAttack rose in {rose}, {comma_list(moved)}; rank "
                f"correlation of these changes with AutoAttack's: {_correlations(pairs, _change)}."
            )
        notes += _remainder_notes(where, runs)
    return notes


def _remainder_notes(where: str, runs: Sequence[RunRecord]) -> list[str]:
    """How much the gradient, of which alignment speaks, says about what an attack does."""
    means = {}
    for scalar in ("probability", "logit"):
        for network in ("student", "teacher"):
            values = [run.of_scalar(scalar, f"remainder_{network}") for run in runs]
            if not values or None in values:
                return []
            means[scalar, network] = f"{fmean(values):.2f}"
    shares = (f"of the {scalar} {means[scalar, 'student']}" for scalar in ("probability", "logit"))
    return [
        f"{where}, share of the change under the student's PGD-20 that its gradient at the clean image does not "
        f"explain, mean over students: {comma_list(shares)}; of the teacher's {means['probability', 'teacher']} and "
        f"{means['logit', 'teacher']}."
    ]


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


def _correlations(points: Sequence[Point], value: Callable[[Point, str], float | None]) -> str:
    """Spearman's, of each measure that all points have, with AutoAttack accuracy."""
    from scipy.stats import spearmanr

    robust = [value(point, "autoattack") for point in points]
    found = []
    for name, (key, _) in MEASURES.items():
        values = [value(point, key) for point in points]
        if None in values or len(set(values)) == 1 or len(set(robust)) == 1:
            continue
        result = spearmanr(values, robust)
        found.append(f"{name} {result.statistic:+.2f} (p {p_value(result.pvalue)})")
    return comma_list(found) or "none to be told"
