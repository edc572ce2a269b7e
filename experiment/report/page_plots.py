"""Figures for the page alone: loss terms, AutoAttack by attack, gradients, and what evaluate.py measured."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from experiment.report import figures
from experiment.report.groups import SeedGroup
from experiment.report.run_record import FIRST_BROKEN_BY, RunRecord
from experiment.report.text import budget

CLASSES_SHOWN = 20
"""Bars of more classes could not be told apart on a page."""


def page_figures(groups: Sequence[SeedGroup]) -> dict[str, Any]:
    """The figures by name; those without anything to show are left out."""
    drawn = {
        "losses": losses_figure(groups),
        "attacks": attacks_figure(groups),
        "gradients": gradients_figure(groups),
        "epsilons": epsilons_figure(groups),
        "classes": classes_figure(groups),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def losses_figure(groups: Sequence[SeedGroup]) -> Any:
    """A panel per group: each loss term by epoch, the mean over seeds."""
    shown = [(group, label) for group, label in _labelled(groups) if any(_terms(group))]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = figures.new_figure(5.0 * columns, 3.0 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (group, label) in zip(panels, shown, strict=False):
        for style, term in zip(("-", "--", ":", "-."), _terms(group), strict=False):
            curves = [run.curves.get(term, {}) for run in group.runs]
            epochs = sorted(set.intersection(*map(set, curves)))
            means = [fmean(curve[epoch] for curve in curves) for epoch in epochs]
            name = term.removeprefix("loss_")
            axes.plot(epochs, means, style, color=figures.method_color(group.first.method), label=name)
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_xlabel("epoch")
        axes.legend(frameon=False, fontsize=9)
        figures.tidy(axes)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    return figure


def _terms(group: SeedGroup) -> list[str]:
    """The loss terms, or the loss where it is the only one."""
    names = [name for name in group.first.curves if name.startswith("loss")]
    return [name for name in names if name != "loss"] or names


def attacks_figure(groups: Sequence[SeedGroup]) -> Any:
    """Accuracy after each of AutoAttack's attacks, the mean over seeds."""
    shown = [(group, label) for group, label in _labelled(groups) if group.first.attack.get("attacks")]
    if not shown:
        return None
    steps = [step for step in FIRST_BROKEN_BY if step in shown[0][0].first.attack["attacks"]]
    values = [[[run.attack["attacks"].get(step, 0.0) for run in group.runs] for step in steps] for group, _ in shown]
    return _grouped_bars(shown, steps, values, "accuracy (%)", 100)


def gradients_figure(groups: Sequence[SeedGroup]) -> Any:
    """GD and GC per group, a panel each."""
    shown = [(group, label) for group, label in _labelled(groups) if group.values("gc")]
    if not shown:
        return None
    figure = figures.new_figure(12.0, 1.2 + 0.4 * len(shown))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(panels, ("gd", "gc"), ("GD (lower is closer)", "GC (higher is closer)"), strict=True):
        for row, (group, _) in enumerate(shown):
            mean = fmean(group.values(key))
            axes.barh(row, mean, **_fill(group))
            axes.annotate(f"{mean:.3f}", (mean, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_title(title, loc="left", fontsize=10)
        axes.margins(x=0.15)
        figures.tidy(axes, grid="x")
    panels[0].set_yticks(range(len(shown)), [label for _, label in shown])
    panels[0].invert_yaxis()
    return figure


def epsilons_figure(groups: Sequence[SeedGroup]) -> Any:
    """Accuracy against epsilon, a panel per attack and number of images: of each run the newest such curve."""
    curves: dict[str, list[tuple[int, list[float], list[float]]]] = {}
    for index, group in enumerate(groups):
        found = [_curves(run) for run in group.runs]
        for attack in dict.fromkeys(name for curves_of_run in found for name in curves_of_run):
            by_run = [curves_of_run[attack] for curves_of_run in found if attack in curves_of_run]
            epsilons = sorted(set.intersection(*map(set, by_run)))
            means = [100 * fmean(curve[epsilon] for curve in by_run) for epsilon in epsilons]
            curves.setdefault(attack, []).append((index, epsilons, means))
    if not curves:
        return None
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = figures.new_figure(5.5 * columns, 3.6 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    labels, styles = figures.plot_labels(groups), figures.styles_of(groups)
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    for axes, (attack, lines) in zip(panels, curves.items(), strict=False):
        for index, epsilons, means in lines:
            axes.plot([255 * value for value in epsilons], means, **styles[index], label=labels[index])
        axes.set_title(attack, loc="left", fontsize=10)
        axes.set_xlabel("epsilon (of 255)")
        axes.set_ylabel("accuracy (%)")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)
        figures.tidy(axes)
    return figure


def _curves(run: RunRecord) -> dict[str, dict[float, float]]:
    """By attack and number of images: accuracy by epsilon, of the newest record with several epsilons."""
    found: dict[str, dict[float, float]] = {}
    for record in run.evaluations:
        for attack, points in record["accuracies"].items():
            if len(points) > 1:
                name = f"{_label(record, attack)}, {points[0]['examples']} images"
                found[name] = {point["epsilon"]: point["accuracy"] for point in points}
    return found


def classes_figure(groups: Sequence[SeedGroup]) -> Any:
    """Accuracy by class, the mean over seeds, under the strongest of the attacks that most runs were measured with."""
    by_group = [[_by_class(run) for run in group.runs] for group in groups]
    names = [name for of_group in by_group for tables in of_group for name in tables]
    if not names:
        return None
    attack = max(reversed(names), key=names.count)  # an evaluation's last attack is its strongest
    shown, tables = [], []
    for labelled, of_group in zip(_labelled(groups), by_group, strict=True):
        if with_it := [found[attack] for found in of_group if attack in found]:
            shown.append(labelled)
            tables.append(with_it)
    common = set.intersection(*(set(table) for of_group in tables for table in of_group))
    mean = {name: fmean(table[name] for of_group in tables for table in of_group) for name in common}
    kept = sorted(common, key=lambda name: (mean[name], name))[:CLASSES_SHOWN]
    values = [[[table[name] for table in of_group] for name in kept] for of_group in tables]
    figure = _grouped_bars(shown, kept, values, "accuracy (%)", 100)
    which = f"the worst {len(kept)} of {len(common)} classes" if len(kept) < len(common) else "by class, worst first"
    figure.axes[0].set_title(f"{attack}, {which}", loc="left", fontsize=10)
    if sum(map(len, kept)) > 100:
        figure.axes[0].tick_params(axis="x", labelrotation=90)
    return figure


def _by_class(run: RunRecord) -> dict[str, dict[str, float]]:
    """By attack, budget and number of images: accuracy by class name; of the newest record that has it."""
    found: dict[str, dict[str, float]] = {}
    for record in run.evaluations:
        by_class = record.get("per_class", {"attacks": {}})
        for attack, rows in by_class["attacks"].items():
            at = "" if attack == "clean" else f", epsilon {budget(by_class['epsilon'])}"
            name = f"{_label(record, attack)}{at}, {sum(row['examples'] for row in rows)} images"
            found[name] = {row["class"]: row["accuracy"] for row in rows}
    return found


def _label(record: dict[str, Any], attack: str) -> str:
    from experiment.evaluation import attack_label  # with torch, which takes seconds

    return attack_label(attack, record["settings"]["steps"], record["settings"]["restarts"])


def _labelled(groups: Sequence[SeedGroup]) -> list[tuple[SeedGroup, str]]:
    return list(zip(groups, figures.plot_labels(groups), strict=True))


def _fill(group: SeedGroup) -> dict[str, Any]:
    """A baseline's bars are pale and hatched."""
    fill = {"color": figures.method_color(group.first.method), "edgecolor": "white"}
    return fill | ({"alpha": 0.4, "hatch": "///"} if group.is_baseline else {"alpha": 0.9})


def _grouped_bars(
    shown: Sequence[tuple[SeedGroup, str]],
    names: Sequence[str],
    values: Sequence[Sequence[Sequence[float]]],
    what: str,
    scale: float,
) -> Any:
    """Bars side by side for each name, one per group; values by group, name and run."""
    figure = figures.new_figure(max(8.0, 0.28 * len(names) * len(shown) + 3), 4.2)
    axes = figure.subplots()
    width = 0.84 / len(shown)
    for at, (group, label) in enumerate(shown):
        positions = [index + (at - (len(shown) - 1) / 2) * width for index in range(len(names))]
        means = [scale * fmean(by_run) for by_run in values[at]]
        axes.bar(positions, means, width=width, label=label, **_fill(group))
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(what)
    figure.legend(loc="outside lower center", ncols=min(3, len(shown)), frameon=False, fontsize=9)
    figures.tidy(axes)
    return figure
