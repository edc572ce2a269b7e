"""What must be known to read the tables: units, attacks, how sure the figures are, and what differs between rows."""

from collections.abc import Sequence
from statistics import fmean, stdev

from experiment.compare.alignment_notes import alignment_notes
from experiment.compare.groups import Gain, SeedGroup, unequal_settings
from experiment.compare.published import published_cell, published_epochs, source_name
from experiment.compare.run_record import PendingRun
from experiment.compare.statistics import seeds_needed
from experiment.compare.tables import labels_of
from experiment.compare.text import ABSENT, comma_list, p_value, points, short_text
from experiment.text import budget

GAINS_TO_FIND = (0.01, 0.02, 0.03)
"""Gains, in fractions, for which the number of seeds is told."""


PUBLISHED_IMAGES = 10_000
"""Under AutoAttack, in the published figures."""


def notes_of(groups: Sequence[SeedGroup], gains: Sequence[Gain], pending: Sequence[PendingRun] = ()) -> list[str]:
    """Sentences for below the table."""
    labels = {id(group): label for group, label in zip(groups, labels_of(groups), strict=True)}
    notes = []
    if groups:
        tested = comma_list(sorted({run.test_examples for group in groups for run in group.runs}))
        notes.append(
            f"Accuracies in per cent; clean and PGD-20 on all {tested} test images, gains in points of AutoAttack."
        )
    if any(len(group.runs) > 1 for group in groups):
        notes.append("Mean ± sample standard deviation (n - 1) over seeds where n seeds is above 1.")
    notes += _attack_notes(groups, labels)
    definitions = dict.fromkeys(group.first.gradients.get("definition") for group in groups if group.first.gradients)
    notes += [f"GD (lower is closer to the teacher), GC (higher is closer): {text}." for text in definitions if text]
    if any(group.values("best_minus_last") for group in groups):
        notes.append("best - last: PGD-20 of the checkpoint chosen on held-out training images minus that of the last.")
    students = [group for group in groups if group.first.teacher != "-"]
    if peaks := [group for group in students if group.all_values("peak_minus_last")]:
        each = (f"{labels[id(group)]} {points(group.values('peak_minus_last'))}" for group in peaks)
        notes.append(
            "Robust overfitting, at most: PGD-20 of the best epoch (which the test images choose) minus that of the "
            f"last: {comma_list(each)}."
        )
    of_logit = {run.gradients["scalars_examples"] for group in groups for run in group.runs if run.logit_gc is not None}
    if of_logit:
        images = comma_list(sorted(of_logit))
        notes.append(
            "Logit GD and logit GC: the same with g = gradient of logits[true class] "
            f"(evaluate.py, the first {images} test images)."
        )
    for gain in gains:
        notes += _gain_notes(gain, labels)
    notes += alignment_notes(groups, [gain for gain in gains if gain.group.name != gain.baseline.name])
    for dataset in dict.fromkeys(group.first.dataset for group in groups):
        if unequal := unequal_settings([group for group in groups if group.first.dataset == dataset]):
            notes.append(f"These rows are not trained and measured alike: {'; '.join(unequal)}.")
    notes += _published_notes(groups)
    alone = []
    for group in groups:
        if not group.is_baseline and not any(other.pair == group.pair and other.is_baseline for other in groups):
            first = group.first
            alone.append(
                f"{group.name} ({first.teacher_name}, {first.student}, {first.dataset}): no gain, as no "
                f"run of {first.method} alone with the same teacher, student and dataset is listed."
            )
    notes += dict.fromkeys(alone)  # once for all variants
    if pending:
        notes.append(f"{len(pending)} runs are not finished: they are listed and in no figure.")
    return notes


def _attack_notes(groups: Sequence[SeedGroup], labels: dict[int, str]) -> list[str]:
    from experiment.evaluation import wilson_interval

    kinds: dict[tuple[str, float], list[str]] = {}
    widths: dict[int, list[float]] = {}
    for group in groups:
        if not group.first.attack:
            continue
        kinds.setdefault((group.first.attack["version"], group.first.attack["epsilon"]), []).append(labels[id(group)])
        examples, accuracy = group.first.attack["examples"], fmean(group.values("autoattack"))
        low, high = wilson_interval(round(accuracy * examples), examples)
        widths.setdefault(examples, []).append(50 * (high - low))
    notes = []
    for (version, epsilon), users in kinds.items():
        whose = "" if len(kinds) == 1 else f" ({comma_list(dict.fromkeys(users))})"
        notes.append(f"AutoAttack: {version}, epsilon {budget(epsilon)}{whose}.")
    for examples, halves in widths.items():
        low, high = f"{min(halves):.1f}", f"{max(halves):.1f}"
        points = low if low == high else f"{low} to {high}"
        notes.append(f"Uncertainty of an AutoAttack accuracy: ± {points} points on {examples} images (95 %, binomial).")
    for group in groups:
        for run in group.runs:
            notes += [f"{labels[id(group)]}, seed {run.seed}, AutoAttack warned: {text}." for text in run.warnings]
    return notes


def _gain_notes(gain: Gain, labels: dict[int, str]) -> list[str]:
    first, seeds = gain.group.first, list(gain.by_seed)
    low, high = (100 * end for end in gain.interval)
    how = "bootstrap over images" if gain.paired else "unpaired, as it is not recorded which images fell"
    if len(seeds) > 1:
        what = "the bootstrap over seeds and images" if gain.paired else "the unpaired accuracies'"
        how = f"the wider of Student's t over seeds and {what}"
    text = (
        f"{labels[id(gain.group)]} minus {labels[id(gain.baseline)]} ({first.teacher_name}, {first.student}, "
        f"{first.dataset}): {100 * gain.mean:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f} ({how}"
    )
    text += f"): {gain.verdict}."
    if gain.p_values:
        values = (f"{100 * gain.by_seed[seed]:+.2f} (p {p_value(gain.p_values[seed])})" for seed in seeds)
        text += f" By seed, with McNemar's exact p: {comma_list(values)}."
    notes = [text]
    if len(seeds) > 1:
        deviation = stdev(gain.by_seed.values())
        needed = (f"{100 * size:g}: {seeds_needed(size, deviation) or 'over 1000'}" for size in GAINS_TO_FIND)
        notes.append(
            f"Its differences vary by {100 * deviation:.2f} points from seed to seed; if that is so, seeds that a gain "
            "of so many points needs to be found on these images (paired t test at 5 %, power 80 %): "
            f"{comma_list(needed)}."
        )
    else:
        notes.append("A single seed: the difference includes seed noise, which the interval does not cover.")
    left_out = sorted({*gain.group.seeds, *gain.baseline.seeds} - set(seeds))
    if left_out:
        notes.append(f"Only seeds that both have are subtracted; without a partner: {comma_list(left_out)}.")
    runs = (*gain.baseline.runs, *gain.group.runs)
    changed = []
    for key in dict.fromkeys(key for run in runs for key in run.environment):
        values = dict.fromkeys(short_text(run.environment.get(key, ABSENT)) for run in runs)
        changed += [f"{key} {' and '.join(values)}"] if len(values) > 1 else []
    if changed:
        notes.append(f"These runs were not made in the same place: {'; '.join(changed)}.")
    return notes


def _published_notes(groups: Sequence[SeedGroup]) -> list[str]:
    shown = [group for group in groups if published_cell(group.first)]
    if not shown:
        return []
    notes = [f"Published figures are the {source_name()}'s: one run each, no seeds; differences below 0.4 say nothing."]
    images = sorted({group.first.attack["examples"] for group in shown if group.first.attack} - {PUBLISHED_IMAGES})
    if images:
        notes.append(f"AutoAttack: ours on {comma_list(images)} images, the published on {PUBLISHED_IMAGES}.")
    for method in dict.fromkeys(group.first.method for group in shown):
        theirs = published_epochs(method)
        ours = {group.first.settings.get("epochs") for group in shown if group.first.method == method}
        if theirs and ours != {theirs}:
            epochs = comma_list(sorted(map(str, ours)))
            notes.append(f"{method}: ours were trained for {epochs} epochs, the published for {theirs}.")
    return notes
