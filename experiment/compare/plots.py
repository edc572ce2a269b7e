"""The figures of compare.py: accuracies by epoch and AutoAttack, gains by seed, and what goes with robustness."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiment.compare import figures
from experiment.compare.evidence_plots import alignment_figure, gains_figure, headroom_figure
from experiment.compare.groups import Gain, SeedGroup
from experiment.compare.published import teacher_figures

TEACHER = {"color": "0.35", "linestyle": ":", "linewidth": 1.6}


def draw_all(groups: Sequence[SeedGroup], gains: Sequence[Gain], out: Path) -> list[Path]:
    """Write every figure that there is something to show in, each as PNG, PDF and SVG; return the paths.

    Raises:
        UserError: a file cannot be written.
    """
    drawn = all_figures(groups, gains)
    return [path for name, figure in drawn.items() for path in figures.write(figure, out / f"{name}.png")]


def all_figures(groups: Sequence[SeedGroup], gains: Sequence[Gain]) -> dict[str, Any]:
    """The figures by name; those without anything to show are left out."""
    if not groups:
        return {}
    drawn = {"comparison": comparison_figure(groups)}
    drawn["gains"] = gains_figure(gains)
    drawn["alignment"] = alignment_figure(groups)
    drawn["headroom"] = headroom_figure(gains, teachers_of(groups))
    return {name: figure for name, figure in drawn.items() if figure is not None}


def teachers_of(groups: Sequence[SeedGroup]) -> dict[str, dict[str, float]]:
    """Clean, PGD-20 and AutoAttack accuracy of teachers, by the name the students give: own runs that are listed here,
    and RobustBench's as published; what is not known is absent.
    """
    own = {weights: run for group in groups for run in group.runs if (weights := run.hashes.get("weights"))}
    found = {}
    for group in groups:
        run = group.first
        known = teacher_figures(run.teacher, run.dataset)
        if teacher := own.get(run.hashes.get("teacher", "")):
            values = {"clean": teacher.clean, "pgd20": teacher.pgd20, "autoattack": teacher.autoattack}
            known = {key: value for key, value in values.items() if value is not None}
        if known:
            found[run.teacher] = known
    return found


def comparison_figure(groups: Sequence[SeedGroup]) -> Any:
    """PGD-20 and clean accuracy by epoch, and AutoAttack bars; the teacher as a reference line."""
    labels, styles = figures.plot_labels(groups), figures.styles_of(groups)
    wrapped = [textwrap.fill(label, 30) for label in labels]
    lines = sum(label.count("\n") + 1 for label in wrapped)
    figure = figures.new_figure(15.0, max(4.6, 1.6 + 0.3 * lines + 0.12 * len(groups)))
    robust, clean, bars = figure.subplots(1, 3, width_ratios=[1, 1, 1.15])
    students = [group for group in groups if group.first.teacher != "-"]
    references = teachers_of(groups) if len({group.first.teacher for group in students}) == 1 else {}
    reference = next(iter(references.values()), {})
    for axes, key, title in ((robust, "pgd20", "PGD-20"), (clean, "clean", "clean")):
        _draw_curves(axes, groups, styles, key)
        if key in reference:
            axes.axhline(100 * reference[key], **TEACHER)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("epoch")
        figures.tidy(axes)
    robust.set_ylabel("test accuracy (%)")
    _draw_bars(bars, groups, wrapped, styles)
    if "autoattack" in reference:
        bars.axvline(100 * reference["autoattack"], **TEACHER)
    if reference:
        from matplotlib.lines import Line2D

        figure.legend([Line2D([], [], **TEACHER)], ["teacher"], loc="outside lower right", frameon=False)
    return figure


def _draw_curves(axes: Any, groups: Sequence[SeedGroup], styles: Sequence[dict[str, Any]], key: str) -> None:
    """Means over seeds, with a band of one standard deviation."""
    from matplotlib.ticker import MaxNLocator

    evaluated = {epoch for group in groups for run in group.runs for epoch in run.curves[key]}
    for group, style in zip(groups, styles, strict=True):
        by_seed = [run.curves[key] for run in group.runs]
        epochs = sorted(set.intersection(*map(set, by_seed)))
        values = [[100 * curve[epoch] for curve in by_seed] for epoch in epochs]
        means = [fmean(at_epoch) for at_epoch in values]
        # Many markers hide the line; a single point would not show without one.
        shown = style if len(evaluated) <= 25 or len(epochs) == 1 else {**style, "marker": ""}
        axes.plot(epochs, means, **shown, markersize=4, linewidth=1.7)
        if len(by_seed) > 1:
            spreads = [stdev(at_epoch) for at_epoch in values]
            low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
            high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.12, linewidth=0)
    if len(evaluated) == 1:
        axes.set_xticks(sorted(evaluated))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_bars(axes: Any, groups: Sequence[SeedGroup], labels: Sequence[str], styles: Sequence[dict[str, Any]]) -> None:
    """A bar per group from the top, pairs close together; beside its label the line that it has in the curves.

    Error bars: one standard deviation over seeds, or for a single seed the 95 % binomial interval of its images.
    """
    from matplotlib.lines import Line2D

    from experiment.evaluation import wilson_interval

    positions, at = [], 0.0
    for index, (group, label) in enumerate(zip(groups, labels, strict=True)):
        gap = 0.0 if index == 0 else 1.0 if group.pair == groups[index - 1].pair else 1.5
        at += gap + 0.35 * label.count("\n")
        positions.append(at)
    several = single = False
    for group, style, position in zip(groups, styles, positions, strict=True):
        values = group.values("autoattack")
        hollow = group.is_baseline
        axes.add_artist(
            Line2D([-0.075, -0.015], [position] * 2, **style, markevery=[0], markersize=4, linewidth=1.7,
                   transform=axes.get_yaxis_transform(), clip_on=False)
        )  # fmt: skip
        if not values:
            axes.annotate("not run", (0, position), (3, 0), textcoords="offset points", va="center", fontsize=8)
            continue
        mean = fmean(values)
        if len(values) > 1:
            low = high = stdev(values)
            several = True
        else:
            examples = group.first.attack["examples"]
            ends = wilson_interval(round(mean * examples), examples)
            low, high = mean - ends[0], ends[1] - mean
            single = True
        fill = {"color": style["color"], "alpha": 0.35 if hollow else 0.9, "hatch": "///" if hollow else None}
        axes.barh(position, 100 * mean, height=0.8, edgecolor="white", **fill)
        axes.errorbar(100 * mean, position, xerr=[[100 * low], [100 * high]], color="0.15", capsize=3, linewidth=1.3)
        end = (100 * (mean + high), position)
        axes.annotate(f"{100 * mean:.2f}", end, (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(positions, labels, fontsize=9)
    axes.tick_params(axis="y", length=0, pad=32)
    # A few bars stay bars and do not fill the panel.
    margin = max(0.8, (4 - positions[-1]) / 2)
    axes.set_ylim(positions[-1] + margin, -margin)
    axes.set_xlim(left=0)
    axes.margins(x=0.14)
    images = {group.first.attack["examples"] for group in groups if group.first.attack}
    basis = ["mean ± std over seeds"] if several else []
    basis += ["one seed: 95 % interval" if several else "95 % interval"] if single else []
    basis += [f"{images.pop()} images"] if len(images) == 1 else []
    axes.set_title("AutoAttack", loc="left", fontsize=11)
    axes.set_xlabel("\n".join(filter(None, ["accuracy (%)", ", ".join(basis)])))
    figures.tidy(axes, grid="x")
