"""Sentences below the tables: units, attacks, gains with their intervals, alignment, and what differs between rows."""

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev

from experiment.compare.comparison import Comparison, Gain, GainAtBest, SeedGroup
from experiment.compare.runs import RunRecord, published
from experiment.compare.statistics import seeds_needed
from experiment.text import ABSENT, budget, comma_list, points, short_name, short_text

GAINS_TO_FIND = (0.01, 0.02, 0.03)
"""Gains, in fractions, for which the number of seeds is given."""
MEASURES = {"GC": ("gc", 1), "GD": ("gd", -1), "logit GC": ("logit_gc", 1), "logit GD": ("logit_gd", -1)}
"""By name: the key in a run's values, and the sign of a change that brings the student closer to the teacher."""
FEWEST = 6
"""Students or pairs needed for a note on alignment and robustness."""
COMPARED_WITHIN = {"teacher_sha256": "teacher", "attack": "method"}
"""Settings that are compared only among the rows of one teacher or method."""
DIGITS = 9
"""Decimals of a value before it is ranked: far more than is printed, far fewer than a float has."""


def notes_of(comparison: Comparison) -> list[str]:
    """All sentences."""
    return [
        *_notes_on_columns(comparison.groups),
        *(note for gain in (*comparison.gains, *comparison.ablations) for note in _notes_on_gain(gain)),
        *map(_note_on_best, comparison.gains_at_best),
        *_notes_on_alignment(comparison),
        *_notes_on_settings(comparison.groups),
        *_notes_on_published_figures(comparison.groups),
        *_notes_on_missing(comparison),
        *comparison.remeasure,
        *(f"No gain: {refusal}." for refusal in comparison.refusals),
    ]


def verdicts(comparison: Comparison) -> list[str]:
    """Each gain over a baseline in one sentence."""
    sentences = []
    for gain in comparison.gains:
        where = comma_list(gain.group.first.names[name] for name in comparison.varying)
        low, high = (100 * end for end in gain.interval)
        seeds = f"{len(gain.by_seed)} seed{'s' * (len(gain.by_seed) > 1)}"
        sentences.append(
            f"{gain.group.label} minus {gain.baseline.label}{f' ({where})' if where else ''}, AutoAttack: "
            f"{100 * gain.mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, {seeds}."
        )
    return sentences


def _notes_on_columns(groups: Sequence[SeedGroup]) -> Iterator[str]:
    from experiment.evaluation import wilson_interval

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
    gradients = [run.result.gradients for run in runs if run.result.gradients]
    for text in dict.fromkeys(measured.definition for measured in gradients):
        yield f"GD (lower is closer to the teacher), GC (higher is closer): {text}."
    if any(group.values("best_minus_last") for group in groups):
        yield "best - last: PGD-20 of the checkpoint chosen on held-out training images minus that of the last."
    if peaks := [group for group in groups if group.is_student and group.all_values("peak_minus_last")]:
        each = comma_list(f"{group.label} {points(group.values('peak_minus_last'))}" for group in peaks)
        yield (
            "Robust overfitting, upper bound: PGD-20 of the epoch that is best on the test images minus that of the "
            f"last: {each}."
        )
    if images := sorted({measured.scalars_examples for measured in gradients if measured.scalars}):
        yield (
            "Logit GD and logit GC: the same with g = gradient of logits[true class] "
            f"(evaluate.py, the first {comma_list(images)} test images)."
        )


def _notes_on_gain(gain: Gain) -> Iterator[str]:
    first, seeds = gain.group.first, list(gain.by_seed)
    where = (first.names["teacher"], first.student, first.dataset)
    low, high = (100 * end for end in gain.interval)
    how = "bootstrap over images"
    if len(seeds) > 1:
        how = "the wider of Student's t over seeds and the bootstrap over seeds and images"
    values = (f"{100 * gain.by_seed[seed]:+.2f} (p {_p_value(gain.p_values[seed])})" for seed in seeds)
    yield (
        f"{gain.group.label} minus {gain.baseline.label} ({comma_list(where)}): "
        f"{100 * gain.mean:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f} ({how}). The interval "
        f"{'includes' if gain.includes_0 else 'excludes'} 0. By seed, with McNemar's exact p: {comma_list(values)}."
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


def _note_on_best(at_best: GainAtBest) -> str:
    gain, more = at_best.gain, 100 * at_best.last_minus_best
    low, high, low_more, high_more = (100 * end for end in (*gain.interval, *at_best.interval))
    return (
        f"At the best epochs (chosen by PGD-10 on held-out images), {gain.group.label} minus {gain.baseline.label}: "
        f"{100 * gain.mean:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}. The last epoch's gain minus this "
        f"gain: {more:+.2f} points, 95 % interval {low_more:+.2f} to {high_more:+.2f}."
    )


def _p_value(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else "< 0.001"


def _notes_on_alignment(comparison: Comparison) -> Iterator[str]:
    """Per teacher, student and dataset: rank correlations over students, and how often which measure changed."""
    for setting in dict.fromkeys(group.setting for group in comparison.groups):
        groups = [list(filter(_is_measured, group.runs)) for group in comparison.groups if group.setting == setting]
        runs = [run for group in groups for run in group]
        pairs = [pair for gain in comparison.gains if gain.group.setting == setting for pair in gain.pairs]
        pairs = [pair for pair in pairs if all(map(_is_measured, pair))]
        where = f"Alignment and robustness ({comma_list([short_name(setting[0]), *setting[1:]])})"
        if len(runs) >= FEWEST and len({run.name for run in runs}) > 1:
            found = _correlations(groups)
            aside = ", in brackets within methods (each method's mean subtracted)" if "(" in found else ""
            yield (
                f"{where}, rank correlation with AutoAttack accuracy over {len(runs)} students{aside}: {found}. "
                "This is no test: students of one method or of one seed are not independent."
            )
        if len(pairs) >= FEWEST:
            counts = [f"AutoAttack rose in {sum(_change(pair, 'autoattack') > 0 for pair in pairs)}"]
            for name, (key, sign) in MEASURES.items():
                if all(key in run.values for pair in pairs for run in pair):
                    closer = sum(sign * _change(pair, key) > 0 for pair in pairs)
                    counts.append(f"{name} {'rose' if sign > 0 else 'fell'} in {closer}")
            yield f"{where}, of {len(pairs)} pairs of one seed: {comma_list(counts)}."


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
    found = []
    for name, (key, _) in MEASURES.items():
        if key not in table or 1 in (table[key].nunique(), table["autoattack"].nunique()):
            continue
        text = f"{name} {table[key].corr(table['autoattack'], 'spearman'):+.2f}"
        if len(within) >= FEWEST:
            text += f" ({within[key].corr(within['autoattack'], 'spearman'):+.2f})"
        found.append(text)
    return comma_list(found) or "not available"


def _notes_on_settings(groups: Sequence[SeedGroup]) -> Iterator[str]:
    """Per dataset every setting in which rows differ, though it is not their method's own.

    A difference between methods counts too: methods trained for different numbers of epochs are not comparable.
    """
    for dataset in dict.fromkeys(group.first.dataset for group in groups):
        rows = [group.first for group in groups if group.first.dataset == dataset]
        own = {key for run in rows for key in (*run.config.added_settings, *run.config.outer_settings)}
        own |= {"teacher", "student"}  # the table's columns show them
        rows = [group.first for group in groups if group.first.dataset == dataset and group.is_student]
        found = []
        for key in dict.fromkeys(key for run in rows for key in run.conditions if key not in own):
            users_by_scope: dict[str, dict[str, dict[str, None]]] = {}
            for run in rows:
                scope = getattr(run, COMPARED_WITHIN[key]) if key in COMPARED_WITHIN else ""
                value = short_text(run.conditions.get(key, ABSENT))
                users_by_scope.setdefault(scope, {}).setdefault(value, {})[run.name] = None
            for users in users_by_scope.values():
                if len(users) > 1:
                    found.append(f"{key} " + ", ".join(f"{value} ({comma_list(who)})" for value, who in users.items()))
        if found:
            yield f"These rows differ in settings that are not their method's own: {'; '.join(found)}."


def _notes_on_published_figures(groups: Sequence[SeedGroup]) -> Iterator[str]:
    shown = [group.first for group in groups if group.first.published]
    source = published()["source"]
    if not shown:
        return
    yield (
        f"Published figures are those of the {source['name']}: one run each. Differences below 0.4 points carry no "
        "information."
    )
    if images := sorted({run.attack.examples for run in shown if run.attack} - {source["images"]}):
        yield f"AutoAttack on {comma_list(images)} images here, on {source['images']} published."
    for method in dict.fromkeys(run.method for run in shown):
        theirs = source["epochs"].get(method)
        ours = sorted({run.settings["epochs"] for run in shown if run.method == method})
        if theirs and ours != [theirs]:
            yield f"{method}: {comma_list(ours)} epochs here, {theirs} published."


def _notes_on_missing(comparison: Comparison) -> Iterator[str]:
    baselines = {group.pair for group in comparison.groups if group.is_baseline}
    alone = {
        (run.name, run.names["teacher"], run.student, run.dataset): run
        for run in (group.first for group in comparison.groups if group.pair not in baselines)
    }
    for (name, *where), run in alone.items():  # once for all variants
        yield f"{name} ({comma_list(where)}): no gain, because its baseline {run.method} is not among the runs."
    if comparison.pending:
        yield f"Not finished: {len(comparison.pending)} of the runs. They are listed and not compared."
    if deeper := comparison.deeper:
        yield f"Runs in deeper folders are left out ({len(deeper)}), such as {deeper[0]}."
