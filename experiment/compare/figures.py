"""The figures: accuracies by epoch and AutoAttack, gains seed by seed, and alignment against AutoAttack."""

import textwrap
import tomllib
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from experiment.compare.comparison import Comparison, Gain, SeedGroup
from experiment.evaluation import autoattack_label, wilson_interval
from experiment.files import write_atomically
from experiment.text import escaped

FORMATS = ("png", "pdf", "svg")
CHARACTERS = 13.6
"""Of small print, in a line of one inch."""

Styles = Mapping[SeedGroup, dict[str, Any]]
"""Line colour and style per group; "label" is its name in figures."""


def all_figures(comparison: Comparison, *, stacked: bool = False) -> dict[str, Any]:
    """The figures by name, `stacked` with all panels in one column; those that would show nothing are left out.

    One version of AutoAttack is shown, the standard one if any group has it, as versions are not comparable.
    """
    versions = {group.first.attack.version for group in comparison.groups if group.first.attack}
    version = "standard" if "standard" in versions else min(versions, default="standard")
    groups = [group for group in comparison.groups if not (attack := group.first.attack) or attack.version == version]
    if not groups:
        return {}
    styles, label = styles_of(comparison), autoattack_label(version)
    drawn = {
        "comparison": _comparison_figure(groups, styles, stacked, label),
        "gains": _gains_figure([gain for gain in comparison.gains if gain.group in groups], styles, stacked, label),
        "alignment": _alignment_figure(groups, styles, stacked, label),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def write_figures(figures: Mapping[str, Any], out: Path) -> None:
    """Write each figure as PNG, PDF and SVG; equal figures are equal files."""
    for name, figure in figures.items():
        for kind in FORMATS:
            content = rendered(figure, kind)
            write_atomically(out / f"{name}.{kind}", lambda file, content=content: file.write(content))


def rendered(figure: Any, kind: str) -> bytes:
    """A figure as a file of one of FORMATS, without a date; in SVG text stays text."""
    import matplotlib

    output = BytesIO()
    dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "figure", "svg.fonttype": "none"}):
        figure.savefig(output, format=kind, metadata=dated)
    return output.getvalue()


def styles_of(comparison: Comparison) -> Styles:
    """A baseline is dashed with hollow markers, the version with an addition solid with full ones.

    A method keeps its colour whatever else is shown. A marker denotes a teacher, student and dataset; further
    variants of one method (another alpha) have other ones.
    """
    colors = tomllib.loads(Path(__file__).with_name("method_colors.toml").read_text())
    others = colors.pop("others")
    counts: Counter[tuple[str, ...]] = Counter()
    markers: dict[tuple[str, ...], int] = {("",): 0}  # a teacher's
    styles = {}
    for group in comparison.groups:
        run = group.first
        key = (run.name, *run.setting)
        place = (*run.setting, str(counts[key])) if group.is_student else ("",)
        counts[key] += 1
        color = colors.get(run.method) or others[zlib.crc32(run.method.encode()) % len(others)]
        names = [run.names[name] for name in comparison.varying if group.is_student]
        styles[group] = {
            "color": color,
            "linestyle": "--" if group.is_baseline else "-",
            "marker": "*osD^vPX"[markers.setdefault(place, len(markers)) % 8],
            "markerfacecolor": "white" if group.is_baseline else color,
            # Names are drawn as they are: a dollar sign would start a formula.
            "label": escaped(", ".join([group.label, *(name for name in names if name != "-")])).replace("$", r"\$"),
        }
    return styles


def _new_figure(width: float, height: float) -> Any:
    """A figure that draws without a display and without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _tidy(axes: Any, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.9")
    axes.set_axisbelow(True)


def _comparison_figure(groups: Sequence[SeedGroup], styles: Styles, stacked: bool, attack: str) -> Any:
    """PGD-20 and clean accuracy by epoch, and AutoAttack bars."""
    height = max(5.0, 2.2 + 0.6 * len(groups))
    if stacked:
        figure = _new_figure(5.5, 7.0 + height)
        robust, clean, bars = figure.subplots(3, 1, height_ratios=[3.5, 3.5, height])
    else:
        figure = _new_figure(12.0, height)
        robust, clean, bars = figure.subplots(1, 3, width_ratios=[1, 1, 1.15])
    curves = [group for group in groups if group.is_student] or groups  # a teacher's many epochs would hide theirs
    for axes, key, title in ((robust, "pgd20", "PGD-20"), (clean, "clean", "clean")):
        _draw_curves(axes, curves, styles, key)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("epoch")
        if stacked or axes is robust:
            axes.set_ylabel("test accuracy (%)")
        _tidy(axes)
    _draw_bars(bars, groups, styles)
    bars.set_title(textwrap.fill(attack, 40), loc="left", fontsize=11)
    _legend(figure, robust, curves, styles)
    return figure


def _draw_curves(axes: Any, groups: Sequence[SeedGroup], styles: Styles, key: str) -> None:
    """Means over seeds, with a band of one standard deviation."""
    from matplotlib.ticker import MaxNLocator

    for group in groups:
        curves = [run.curve(key) for run in group.runs]
        epochs = sorted(set.intersection(*map(set, curves)))
        values = 100 * np.array([[curve[epoch] for epoch in epochs] for curve in curves])
        mean, few = values.mean(axis=0), max(1, len(epochs) // 10)  # many markers hide the line
        axes.plot(epochs, mean, **styles[group], markevery=few, markersize=4, linewidth=1.7)
        if len(curves) > 1:
            spread = values.std(axis=0, ddof=1)
            band = {"color": styles[group]["color"], "alpha": 0.12, "linewidth": 0}
            axes.fill_between(epochs, mean - spread, mean + spread, **band)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_bars(axes: Any, groups: Sequence[SeedGroup], styles: Styles) -> None:
    """A bar per group from the top.

    Error bars: one standard deviation over seeds, or for a single seed the 95 % binomial interval of its images.
    """
    for position, group in enumerate(groups):
        values = group.values("autoattack")
        if not values:
            continue
        mean, examples = fmean(values), group.first.attack.examples
        if len(values) > 1:
            low, high = mean - stdev(values), mean + stdev(values)
        else:
            low, high = wilson_interval(round(mean * examples), examples)
        fill = {"alpha": 0.35, "hatch": "///"} if group.is_baseline else {"alpha": 0.9}
        axes.barh(position, 100 * mean, height=0.8, edgecolor="white", color=styles[group]["color"], **fill)
        error = [[100 * (mean - low)], [100 * (high - mean)]]
        axes.errorbar(100 * mean, position, xerr=error, color="0.15", capsize=3, linewidth=1.3)
        place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axes.annotate(f"{100 * mean:.2f}", (100 * high, position), **place)
    axes.set_yticks(range(len(groups)), [textwrap.fill(styles[group]["label"], 30) for group in groups], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(len(groups), 4) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.14)
    axes.set_xlabel("accuracy (%) with one standard deviation over seeds,\nof one seed the 95 % interval of its images")
    _tidy(axes, grid="x")


def _legend(figure: Any, axes: Any, groups: Sequence[SeedGroup], styles: Styles, title: str | None = None) -> None:
    """The groups below the figure, in as many columns as fit."""
    characters = round(CHARACTERS * figure.get_figwidth())
    columns = max(1, characters // (max(len(styles[group]["label"]) for group in groups) + 8))
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(groups), columns),
        frameon=False,
        fontsize=9,
        title=title and textwrap.fill(title, characters),
        title_fontsize=9,
    )


def _gains_figure(gains: Sequence[Gain], styles: Styles, stacked: bool, attack: str) -> Any:
    """A dot per seed, the mean and its 95 % interval per pair; None without gains."""
    if not gains:
        return None
    figure = _new_figure(5.5 if stacked else 7.5, 1.4 + 0.55 * len(gains))
    axes = figure.subplots()
    axes.axvline(0, color="0.2", linewidth=1)
    for row, gain in enumerate(gains):
        color = styles[gain.group]["color"]
        axes.plot([100 * end for end in gain.interval], [row, row], color=color, linewidth=3, solid_capstyle="butt")
        axes.plot([100 * gain.mean], [row], "|", color=color, markersize=18, markeredgewidth=3)
        values = [100 * value for value in gain.by_seed.values()]
        axes.plot(values, [row + 0.24] * len(values), "o", color=color, alpha=0.6, markersize=5, markeredgewidth=0)
    axes.set_yticks(range(len(gains)), [styles[gain.group]["label"] for gain in gains])
    axes.set_ylim(len(gains) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    label = f"gain in {attack} accuracy (points): mean and 95 % interval, below them a dot per seed"
    axes.set_xlabel(textwrap.fill(label, 44 if stacked else 62))
    _tidy(axes, grid="x")
    return figure


def _alignment_figure(groups: Sequence[SeedGroup], styles: Styles, stacked: bool, attack: str) -> Any:
    """GC and GD (where measured the logit's too) against AutoAttack accuracy; None without.

    A point per run; an arrow from the mean of a baseline to that of the version with an addition.
    """
    shown = [group for group in groups if group.values("gc") and group.values("autoattack")]
    if not shown:
        return None
    columns = {"gc": "GC (cosine: higher is closer)", "gd": "GD (distance)"}
    if all(group.values("logit_gc") for group in shown):
        columns |= {"logit_gc": "logit GC", "logit_gd": "logit GD"}
    side_by_side = 1 if stacked else 2
    rows = len(columns) // side_by_side
    figure = _new_figure(5.5 * side_by_side, 1.0 + 4.0 * rows)
    panels = figure.subplots(rows, side_by_side, sharey=True).flatten()
    for axes, (key, title) in zip(panels, columns.items(), strict=True):
        centres: dict[SeedGroup, tuple[float, float]] = {}
        for group in shown:
            x, y = group.values(key), [100 * value for value in group.values("autoattack")]
            style = styles[group] | {"linestyle": "", "label": None}
            axes.plot(x, y, **style, alpha=0.45, markersize=4)
            centres[group] = (fmean(x), fmean(y))
        for group in shown:
            base = next((other for other in shown if other.first.pair == group.first.pair and other.is_baseline), None)
            if base is not None and not group.is_baseline:
                arrow = {"arrowstyle": "-|>", "color": styles[group]["color"], "linewidth": 1.8}
                axes.annotate("", centres[group], centres[base], arrowprops=arrow)
            axes.plot(*([value] for value in centres[group]), **styles[group] | {"linestyle": ""}, markersize=9)
        label = f"{title} between the input gradients of student and teacher"
        axes.set_xlabel(textwrap.fill(label, 70 if stacked else 100), fontsize=9)
        _tidy(axes, grid="both")
    for axes in panels[::side_by_side]:
        axes.set_ylabel(textwrap.fill(f"{attack} accuracy (%)", 30))
    title = "small marks are runs, large ones means, arrows lead from a baseline to the version with an addition"
    _legend(figure, panels[0], shown, styles, title)
    return figure
