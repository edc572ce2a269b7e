"""Figures about the gain: seed by seed, against gradient alignment, and against what the teacher is ahead."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from experiment.compare import figures
from experiment.compare.groups import Gain, SeedGroup

CHARACTERS = 150
"""About so many stand side by side under the alignment figure."""


def gains_figure(gains: Sequence[Gain]) -> Any:
    """A dot per seed, the mean and its 95 % interval per pair; None without gains."""
    if not gains:
        return None
    labels = figures.plot_labels([gain.group for gain in gains])
    figure = figures.new_figure(7.5, 1.4 + 0.55 * len(gains))
    axes = figure.subplots()
    axes.axvline(0, color="0.2", linewidth=1)
    for row, gain in enumerate(gains):
        color = figures.method_color(gain.group.first.method)
        axes.plot([100 * end for end in gain.interval], [row, row], color=color, linewidth=3, solid_capstyle="butt")
        axes.plot([100 * gain.mean], [row], "|", color=color, markersize=18, markeredgewidth=3)
        values = [100 * value for value in gain.by_seed.values()]
        axes.plot(values, [row + 0.24] * len(values), "o", color=color, alpha=0.6, markersize=5, markeredgewidth=0)
    axes.set_yticks(range(len(gains)), labels)
    axes.set_ylim(len(gains) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("gain in AutoAttack accuracy (points): mean and 95 % interval,\nbelow them a dot per seed")
    figures.tidy(axes, grid="x")
    return figure


def alignment_figure(groups: Sequence[SeedGroup]) -> Any:
    """GC and GD (where measured the logit's too) against AutoAttack accuracy; None without.

    A point per run, the means of baseline and twin joined.
    """
    shown = [group for group in groups if group.values("gc") and group.values("autoattack")]
    if not shown:
        return None
    labels = dict(zip(map(id, groups), figures.plot_labels(groups), strict=True))
    styles = dict(zip(map(id, groups), figures.styles_of(groups), strict=True))
    columns = {"gc": "GC (cosine: higher is closer)", "gd": "GD (distance)"}
    if all(len(group.values("logit_gc")) == len(group.values("gc")) for group in shown):
        columns |= {"logit_gc": "logit GC", "logit_gd": "logit GD"}
    rows = len(columns) // 2
    figure = figures.new_figure(11.0, 1.0 + 4.0 * rows)
    panels = figure.subplots(rows, 2, sharey=True).flatten()
    for axes, (key, title) in zip(panels, columns.items(), strict=True):
        centres: dict[int, tuple[float, float]] = {}
        for group in shown:
            style = {name: value for name, value in styles[id(group)].items() if name != "linestyle"}
            runs = [run for run in group.runs if getattr(run, key) is not None and run.autoattack is not None]
            x, y = [getattr(run, key) for run in runs], [100 * run.autoattack for run in runs]
            axes.plot(x, y, linestyle="", **style, alpha=0.45, markersize=4)
            centres[id(group)] = (fmean(x), fmean(y))
        for group in shown:
            base = next((other for other in shown if other.pair == group.pair and other.is_baseline), None)
            if base is not None and not group.is_baseline:
                ends = (centres[id(base)], centres[id(group)])
                arrow = {"arrowstyle": "-|>", "color": styles[id(group)]["color"], "linewidth": 1.8}
                axes.annotate("", ends[1], ends[0], arrowprops=arrow)
            style = {**styles[id(group)], "linestyle": ""}
            axes.plot(*([value] for value in centres[id(group)]), **style, markersize=9, label=labels[id(group)])
        axes.set_xlabel(f"{title} between the input gradients of student and teacher", fontsize=9)
        figures.tidy(axes, grid="both")
    for axes in panels[::2]:
        axes.set_ylabel("AutoAttack accuracy (%)")
    handles = panels[0].get_legend_handles_labels()
    columns_that_fit = max(1, CHARACTERS // (max(len(labels[id(group)]) for group in shown) + 8))
    ncols = min(4, len(shown), columns_that_fit)
    title = "small marks are runs, large ones their means, arrows lead from a baseline to its twin"
    figure.legend(
        *handles, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9, title=title, title_fontsize=9
    )
    return figure


def headroom_figure(gains: Sequence[Gain], teachers: Mapping[str, Mapping[str, float]]) -> Any:
    """Gain against what the teacher is ahead of the baseline in AutoAttack accuracy; None where that is not known."""
    shown = [gain for gain in gains if "autoattack" in teachers.get(gain.group.first.teacher, {})]
    if not shown:
        return None
    figure = figures.new_figure(7.5, 5.0)
    axes = figure.subplots()
    axes.axhline(0, color="0.2", linewidth=1)
    groups = [gain.group for gain in shown]
    for gain, label, style in zip(shown, figures.plot_labels(groups), figures.styles_of(groups), strict=True):
        teacher = teachers[gain.group.first.teacher]["autoattack"]
        base = {run.seed: run.autoattack for run in gain.baseline.runs}
        ahead = [100 * (teacher - base[seed]) for seed in gain.by_seed]
        # No dot per seed: a seed whose baseline is unlucky has more headroom and more gain, without any cause but that.
        low, high = gain.interval
        ends = [[100 * (gain.mean - low)], [100 * (high - gain.mean)]]
        style |= {"linestyle": "", "markersize": 8, "capsize": 4, "label": label}
        axes.errorbar([fmean(ahead)], [100 * gain.mean], yerr=ends, **style)
    axes.set_xlabel("headroom: AutoAttack accuracy of the teacher minus the baseline's (points)")
    axes.set_ylabel("gain in AutoAttack accuracy (points)\nwith its 95 % interval")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figures.tidy(axes, grid="both")
    return figure
