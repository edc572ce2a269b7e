"""Figures for the page alone: loss terms, AutoAttack by attack, gradients, and what evaluate.py measured."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from experiment.report import figures
from experiment.report.groups import SeedGroup
from experiment.report.run_record import FIRST_BROKEN_BY


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
    """Accuracy against epsilon, a panel per attack: the newest record of each run that has several epsilons."""
    curves: dict[str, list[tuple[int, list[float], list[float]]]] = {}
    for index, group in enumerate(groups):
        for attack in dict.fromkeys(name for run in group.runs for name in _accuracies(run)):
            by_run = [found for run in group.runs if len(found := _accuracies(run).get(attack, {})) > 1]
            if by_run:
                epsilons = sorted(set.intersection(*map(set, by_run)))
                means = [100 * fmean(found[epsilon] for found in by_run) for epsilon in epsilons]
                curves.setdefault(attack, []).append((index, epsilons, means))
    if not curves:
        return None
    figure = figures.new_figure(5.5 * len(curves), 4.2)
    labels, styles = figures.plot_labels(groups), figures.styles_of(groups)
    for axes, (attack, lines) in zip(figure.subplots(1, len(curves), squeeze=False).flat, curves.items(), strict=True):
        for index, epsilons, means in lines:
            axes.plot([255 * value for value in epsilons], means, **styles[index], label=labels[index])
        axes.set_title(attack, loc="left", fontsize=10)
        axes.set_xlabel("epsilon (of 255)")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)
        figures.tidy(axes)
    return figure


def _accuracies(run: Any) -> dict[str, dict[float, float]]:
    """By attack: accuracy by epsilon, of the newest record that has it."""
    found: dict[str, dict[float, float]] = {}
    for record in run.evaluations:
        for attack, points in (record.get("accuracies") or {}).items():
            found[attack] = {point["epsilon"]: point["accuracy"] for point in points}
    return found


def classes_figure(groups: Sequence[SeedGroup]) -> Any:
    """Accuracy by class under the strongest attack that was measured by class, the mean over seeds."""
    shown, values, classes = [], [], []
    for group, label in _labelled(groups):
        by_run = [tables[-1] for run in group.runs if (tables := _by_class(run))]
        if by_run:
            classes = classes or sorted(by_run[0])
            shown.append((group, label))
            values.append([[found.get(name, 0.0) for found in by_run] for name in classes])
    return _grouped_bars(shown, classes, values, "accuracy (%)", 100) if shown else None


def _by_class(run: Any) -> list[dict[str, float]]:
    """Accuracy by class name, one table per record and attack, in the order in which they were measured."""
    tables = [list(((record.get("per_class") or {}).get("attacks") or {}).values()) for record in run.evaluations]
    return [{row["class"]: row["accuracy"] for row in rows} for attacks in tables for rows in attacks]


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
