"""Sentences below the tables: units, attacks, gains with their intervals, alignment, and what differs between rows."""

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev

from experiment.compare.comparison import Comparison, Gain, SeedGroup
from experiment.compare.runs import RunRecord, published
from experiment.compare.statistics import mcnemar, seeds_needed
from experiment.evaluation import wilson_interval
from experiment.text import ABSENT, budget, comma_list, points, short_text

GAINS_TO_FIND = (0.01, 0.02, 0.03)
"""Gains, in fractions, for which the number of seeds is given."""
MEASURES = {"GC": ("gc", 1), "GD": ("gd", -1), "logit GC": ("logit_gc", 1), "logit GD": ("logit_gd", -1)}
"""By name: the key in a run's values, and the sign of a change that brings the student closer to the teacher."""
FEWEST = 6
"""Students or pairs needed for a note on alignment and robustness."""
DIGITS = 9
"""Decimals of a value before it is ranked: far more than is printed, far fewer than a float has."""


def notes_of(comparison: Comparison, columns: Sequence[str] = ()) -> list[str]:
    """All sentences; with `columns`, without those on gradients or the best epoch if no such column is among them."""
    gradients = not columns or any(key in columns for key, _ in MEASURES.values())
    return [
        *_notes_on_accuracies(comparison.groups),
        *(_notes_on_gradients(comparison.groups) if gradients else ()),
        *(_notes_on_overfitting(comparison.groups) if not columns or "best_minus_last" in columns else ()),
        *(note for gain in (*comparison.gains, *comparison.ablations) for note in _notes_on_gain(gain)),
        *(_note_on_best(best, more) for best, more in comparison.gains_at_best),
        *(_notes_on_alignment(comparison) if gradients else ()),
        *_notes_on_settings(comparison.groups),
        *_notes_on_published_figures(comparison.groups),
        *_notes_on_missing(comparison),
        *(f"No gain: {reason}." for reason in comparison.not_subtracted),
    ]


def verdict(gain: Gain) -> str:
    """A gain in one line, without a full stop."""
    low, high = (100 * end for end in gain.interval)
    return (
        f"{gain.group.label} minus {gain.baseline.label} ({gain.group.first.where}): "
        f"{100 * gain.mean:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
    )


def _notes_on_accuracies(groups: Sequence[SeedGroup]) -> Iterator[str]:
    runs = [run for group in groups for run in group.runs]
    if groups:
        tested = comma_list(sorted({run.result.test_examples for run in runs}))
        yield f"Accuracies in per cent; clean and PGD-20 on all {tested} test images, gains in points of AutoAttack."
    if any(len(group.runs) > 1 for group in groups):
        yield "Mean ± sample standard deviation (n - 1) over seeds where n seeds is above 1."
    attacked = [group for group in groups if group.first.attack]
    kinds: dict[tuple[str, float], list[str]] = {}
    widths: dict[int, list[float]] = {}
    for group in attacked:
        attack = group.first.attack
        kinds.setdefault((attack.version, attack.epsilon), []).append(group.label)
        low, high = wilson_interval(round(fmean(group.values("autoattack")) * attack.examples), attack.examples)
        widths.setdefault(attack.examples, []).append(50 * (high - low))
    for (version, epsilon), users in kinds.items():
        whose = "" if len(kinds) == 1 else f" ({comma_list(dict.fromkeys(users))})"
        name = "AutoAttack: standard" if version == "standard" else version
        yield f"{name}, epsilon {budget(epsilon)}{whose}."
    for examples, halves in widths.items():
        ends = " to ".join(dict.fromkeys((f"{min(halves):.1f}", f"{max(halves):.1f}")))
        yield f"Uncertainty of an AutoAttack accuracy: ± {ends} points on {examples} images (95 %, binomial)."
    for group in groups:
        for run in group.runs:
            warnings = (run.attack and run.attack.warnings) or ()
            yield from (f"{group.label}, seed {run.seed}, AutoAttack warned: {text}." for text in warnings)


def _notes_on_gradients(groups: Sequence[SeedGroup]) -> Iterator[str]:
    gradients = [run.result.gradients for group in groups for run in group.runs if run.result.gradients]
    for text in dict.fromkeys(measured.definition for measured in gradients):
        yield f"GD (lower is closer to the teacher), GC (higher is closer): {text}."
    if images := sorted({measured.scalars_examples for measured in gradients if measured.scalars}):
        yield (
            "Logit GD and logit GC: the same with g = gradient of logits[true class] "
            f"(evaluate.py, the first {comma_list(images)} test images)."
        )


def _notes_on_overfitting(groups: Sequence[SeedGroup]) -> Iterator[str]:
    if any(group.values("best_minus_last") for group in groups):
        yield "best - last: PGD-20 of the checkpoint chosen on held-out training images minus that of the last."
    if peaks := [group for group in groups if group.is_student and group.values("peak_minus_last")]:
        each = comma_list(f"{group.label} {points(group.values('peak_minus_last'))}" for group in peaks)
        yield (
            "Robust overfitting, upper bound: PGD-20 of the epoch that is best on the test images minus that of the "
            f"last: {each}."
        )


def _notes_on_gain(gain: Gain) -> Iterator[str]:
    seeds, (low, high) = list(gain.by_seed), gain.interval
    how = "bootstrap over images"
    if len(seeds) > 1:
        how = "the wider of Student's t over seeds and the bootstrap over seeds and images"
    rows = zip(gain.by_seed.values(), gain.differences, strict=True)
    values = (f"{100 * value:+.2f} (p {_p_value(mcnemar(row))})" for value, row in rows)
    yield (
        f"{verdict(gain)} ({how}). The interval {'includes' if low <= 0 <= high else 'excludes'} 0. "
        f"By seed, with McNemar's exact p: {comma_list(values)}."
    )
    if len(seeds) > 1:
        deviation = stdev(gain.by_seed.values())
        needed = (f"{100 * size:g}: {seeds_needed(size, deviation) or 'over 1000'}" for size in GAINS_TO_FIND)
        yield (
            f"The standard deviation of this gain over seeds is {100 * deviation:.2f} points. Seeds needed to detect a "
            f"gain, by its size in points (paired t test at 5 %, power 80 %): {comma_list(needed)}."
        )
    else:
        yield "One seed: the interval does not cover the variation between seeds."
    if unpaired := sorted({*gain.group.seeds, *gain.baseline.seeds} - set(seeds)):
        yield f"Only seeds that both have are subtracted. Seeds of one alone: {comma_list(unpaired)}."
    runs = (*gain.baseline.runs, *gain.group.runs)
    changed = []
    for key in dict.fromkeys(key for run in runs for key in run.environment):
        found = dict.fromkeys(short_text(run.environment.get(key, ABSENT)) for run in runs)
        changed += [f"{key} {' and '.join(found)}"] if len(found) > 1 else []
    if changed:
        yield f"The environments of these runs differ: {'; '.join(changed)}."


def _note_on_best(best: Gain, more: Gain) -> str:
    low, high = (100 * end for end in more.interval)
    return (
        f"At the best epochs (chosen by PGD-10 on held-out images), {verdict(best)}. The last epoch's gain minus this "
        f"gain: {100 * more.mean:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}."
    )


def _p_value(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else "< 0.001"


def _notes_on_alignment(comparison: Comparison) -> Iterator[str]:
    """Per teacher, student and dataset: rank correlations over students, and how often which measure changed."""
    for setting, where in {group.first.setting: group.first.where for group in comparison.groups}.items():
        of_setting = [group for group in comparison.groups if group.first.setting == setting]
        groups = [list(filter(_is_measured, group.runs)) for group in of_setting]
        runs = [run for group in groups for run in group]
        pairs = [pair for gain in comparison.gains if gain.group.first.setting == setting for pair in gain.pairs]
        pairs = [pair for pair in pairs if all(map(_is_measured, pair))]
        begin = f"Alignment and robustness ({where})"
        if len(runs) >= FEWEST and len({run.name for run in runs}) > 1:
            found = _correlations(groups)
            aside = ", in brackets within methods (each method's mean subtracted)" if "(" in found else ""
            yield (
                f"{begin}, rank correlation with AutoAttack accuracy over {len(runs)} students{aside}: {found}. "
                "This is no test: students of one method or of one seed are not independent."
            )
        if len(pairs) >= FEWEST:
            counts = [f"AutoAttack rose in {sum(_change(pair, 'autoattack') > 0 for pair in pairs)}"]
            for name, (key, sign) in MEASURES.items():
                if all(key in run.values for pair in pairs for run in pair):
                    closer = sum(sign * _change(pair, key) > 0 for pair in pairs)
                    counts.append(f"{name} {'rose' if sign > 0 else 'fell'} in {closer}")
            yield f"{begin}, of {len(pairs)} pairs of one seed: {comma_list(counts)}."


def _is_measured(run: RunRecord) -> bool:
    return {"autoattack", "gc"} <= run.values.keys()


def _change(pair: tuple[RunRecord, RunRecord], key: str) -> float:
    return pair[1].values[key] - pair[0].values[key]


def _correlations(groups: Sequence[Sequence[RunRecord]]) -> str:
    """Spearman's correlation of each measure that all runs have with AutoAttack accuracy; in brackets the correlation
    after each group's mean is subtracted from both, which differences between methods do not affect.
    """
    from pandas import DataFrame

    rows = [{"group": number, **run.values} for number, runs in enumerate(groups) for run in runs]
    table = DataFrame(rows).set_index("group").dropna(axis="columns")
    several = table[table.groupby("group").transform("size") > 1]
    # Rounded, so that float error does not break ties.
    within = (several - several.groupby("group").transform("mean")).round(DIGITS)
    overall, inside = (frame.corr("spearman")["autoattack"] for frame in (table, within))
    found = []
    for name, (key, _) in MEASURES.items():
        if key in overall.dropna():  # no correlation of a constant
            found.append(f"{name} {overall[key]:+.2f}" + f" ({inside[key]:+.2f})" * (len(within) >= FEWEST))
    return comma_list(found) or "not available"


def _notes_on_settings(groups: Sequence[SeedGroup]) -> Iterator[str]:
    """Per dataset every setting in which rows differ, though it is not their method's own.

    A difference between methods counts too: methods trained for different numbers of epochs are not comparable.
    """
    for dataset in dict.fromkeys(group.first.settings.dataset for group in groups):
        rows = [group.first for group in groups if group.first.settings.dataset == dataset]
        own = {key for run in rows for key in (*run.config.added_settings, *run.config.outer_settings)}
        own |= {"teacher", "student"}  # the table's columns show them
        rows = [group.first for group in groups if group.first.settings.dataset == dataset and group.is_student]
        found = []
        for key in dict.fromkeys(key for run in rows for key in run.conditions if key not in own):
            users_by_scope: dict[str | None, dict[str, dict[str, None]]] = {}
            for run in rows:
                # Compared only among the rows of one teacher, or of one method.
                scope = {"teacher_sha256": run.settings.teacher, "attack": run.method}.get(key)
                value = short_text(run.conditions.get(key, ABSENT))
                users_by_scope.setdefault(scope, {}).setdefault(value, {})[run.name] = None
            for users in users_by_scope.values():
                if len(users) > 1:
                    found.append(f"{key} " + ", ".join(f"{value} ({comma_list(who)})" for value, who in users.items()))
        if found:
            yield f"These rows differ in settings that are not their method's own: {'; '.join(found)}."


def _notes_on_published_figures(groups: Sequence[SeedGroup]) -> Iterator[str]:
    source = published()["source"]
    if any(group.first.published for group in groups):
        yield (
            f"Published figures are those of the {source['name']}: {source['about']}. Differences below 0.4 points "
            "carry no information."
        )


def _notes_on_missing(comparison: Comparison) -> Iterator[str]:
    baselines = {group.first.pair for group in comparison.groups if group.is_baseline}
    alone = [group.first for group in comparison.groups if group.first.pair not in baselines]
    for run in {(run.name, run.where): run for run in alone}.values():  # once for all variants
        yield f"{run.name} ({run.where}): no gain, because its baseline {run.method} is not among the runs."
    if comparison.pending:
        yield f"Not finished: {len(comparison.pending)} of the runs. They are listed and not compared."
    if deeper := comparison.deeper:
        yield f"Runs in deeper folders are left out ({len(deeper)}), such as {deeper[0]}."
