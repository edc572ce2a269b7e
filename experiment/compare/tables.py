"""The tables: runs side by side with their gains, our figures beside published ones, runs that are not finished."""

from collections.abc import Sequence
from pathlib import Path

from experiment.compare.groups import Gain, SeedGroup
from experiment.compare.published import FIGURES, published_cell
from experiment.compare.run_record import PendingRun
from experiment.compare.text import ABSENT, points, short_text, spread
from experiment.text import Table, short_name

HEADS = {"clean": "clean", "pgd20": "PGD-20", "autoattack": "AutoAttack"}


def labels_of(groups: Sequence[SeedGroup]) -> list[str]:
    """Method names; groups of one name also get the settings in which they differ ('lr 0.1')."""
    labels = []
    for group in groups:
        twins = [other.first.settings for other in groups if other.pair == group.pair and other.name == group.name]
        varying = [
            f"{key} {short_text(group.first.settings.get(key, ABSENT))}"
            for key in dict.fromkeys(key for settings in twins for key in settings)
            if any(settings.get(key) != group.first.settings.get(key) for settings in twins)
        ]
        labels.append(f"{group.name} ({', '.join(varying)})" if varying else group.name)
    return labels


def results_table(groups: Sequence[SeedGroup], gains: Sequence[Gain]) -> Table:
    """Text cells, header first; accuracies in per cent, gains in points; columns that nothing was measured for go."""
    added = "/".join(dict.fromkeys(group.first.added for group in groups if group.first.added))
    by_group = {id(gain.group): list(gain.by_seed.values()) for gain in gains}
    columns: dict[str, list[str]] = {
        "method": labels_of(groups),
        "teacher": [group.first.teacher_name for group in groups],
        "student": [short_name(group.first.student) for group in groups],
        "dataset": [Path(group.first.dataset).name for group in groups],
    }
    for figure, head in HEADS.items():
        columns[head] = [points(group.values(figure)) for group in groups]
    if added:
        columns[f"{added} gain"] = [points(by_group.get(id(group), ()), "+") for group in groups]
    # Measured of some seeds only, it would stand beside "n seeds" as if of all.
    optional = {
        "GD": [spread(group.all_values("gd"), 4) for group in groups],
        "GC": [spread(group.all_values("gc"), 3) for group in groups],
        "logit GD": [spread(group.all_values("logit_gd"), 3) for group in groups],
        "logit GC": [spread(group.all_values("logit_gc"), 3) for group in groups],
        "best - last": [points(group.all_values("best_minus_last"), "+") for group in groups],
        "holdout PGD-10": [points(group.all_values("holdout_pgd10")) for group in groups],
        "SWA AutoAttack": [points(group.all_values("swa_autoattack")) for group in groups],
    }
    columns |= {head: cells for head, cells in optional.items() if set(cells) != {"-"}}
    columns["n seeds"] = [str(len(group.runs)) for group in groups]
    columns["AutoAttack images"] = [str(group.first.attack.get("examples", "-")) for group in groups]
    return _rows(columns)


def published_table(groups: Sequence[SeedGroup], pending: Sequence[PendingRun]) -> Table:
    """Our figures (per cent) beside the published ones and the difference (points); [] where nothing was published.

    Runs that are not finished stand with a dash for our figures.
    """
    table: Table = []
    finished = {(g.name, g.first.teacher, g.first.student, g.first.dataset) for g in groups}
    waiting = [
        run for run in _one_of_each(pending) if (run.name, run.teacher, run.student, run.dataset) not in finished
    ]
    names = [*labels_of(groups), *(run.name for run in waiting)]
    for name, figure_source in zip(names, (*groups, *waiting), strict=True):
        run = figure_source.first if isinstance(figure_source, SeedGroup) else figure_source
        cell = published_cell(run)
        if cell is None:
            continue
        row = [name, run.teacher_name, short_name(run.student)]
        for figure in FIGURES:
            ours = figure_source.values(figure) if isinstance(figure_source, SeedGroup) else []
            difference = [sum(ours) / len(ours) - cell[figure]] if ours else []
            row += [points(ours), points([cell[figure]]), points(difference, "+")]
        table.append(row)
    if not table:
        return []
    heads = [f"{HEADS[figure]}{part}" for figure in FIGURES for part in ("", ", published", ", difference")]
    return [["method", "teacher", "student", *heads], *table]


def _one_of_each(pending: Sequence[PendingRun]) -> list[PendingRun]:
    """Runs that differ in their seed only once."""
    return list({(run.name, run.teacher, run.student, run.dataset): run for run in pending}.values())


def pending_table(pending: Sequence[PendingRun]) -> Table:
    """Runs that are not finished, with their state; [] where there are none."""
    if not pending:
        return []
    rows = [
        [run.folder, run.name, run.teacher_name, short_name(run.student), str(run.seed), run.state] for run in pending
    ]
    return [["run", "method", "teacher", "student", "seed", "state"], *rows]


def _rows(columns: dict[str, list[str]]) -> Table:
    return [list(columns), *(list(cells) for cells in zip(*columns.values(), strict=True))]
