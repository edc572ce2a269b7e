"""The plot of compare.py: PGD-20 and clean accuracy by epoch, and AutoAttack bars, a baseline beside its twin."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiment.files import write_atomically
from experiment.report.results import escaped
from experiment.report.statistics import Row, half_width
from experiment.report.tables import labels_of

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette without yellow (too pale for a line): told apart with any colour vision."""


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the PNG: accuracy by epoch on the left, AutoAttack bars on the right.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    # A Figure of its own draws with Agg and needs neither a display nor pyplot's global state.
    # Names are drawn as they are: a dollar sign would start a formula.
    labels = [escaped(label).replace("$", r"\$") for label in _plot_labels(rows)]
    colors = _colors(rows)
    columns = max(2, min(4, 140 // (max(map(len, labels)) + 8)))
    size = (max(11.0, 6.5 + 0.75 * len(rows)), 4.3 + 0.24 * math.ceil((len(rows) + 2) / columns))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=[5.5, max(4.5, 0.75 * len(rows))])
    handles = _draw_curves(curves, rows, colors)
    _draw_bars(bars, rows, labels, colors)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    figure.legend(handles, [*labels, "PGD-20", "clean"], loc="outside lower center", ncols=columns, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _plot_labels(rows: Sequence[Row]) -> list[str]:
    """Labels with the teacher, student and dataset too, where these differ between rows."""
    fields = ("teacher", "student", "dataset")
    varying = [field for field in fields if len({getattr(row.first, field) for row in rows}) > 1]
    return [
        ", ".join([label, *(Path(value).name for field in varying if (value := getattr(row.first, field)) != "-")])
        for row, label in zip(rows, labels_of(rows), strict=True)
    ]


def _colors(rows: Sequence[Row]) -> list[tuple[float, float, float]]:
    """One hue per pair: the baseline pale, what adds to it full, further variants darker."""
    import matplotlib
    from matplotlib.colors import to_rgb

    pairs = list(dict.fromkeys(row.pair for row in rows))
    hues = [to_rgb(color) for color in COLORS]
    if len(pairs) > len(hues):
        viridis = matplotlib.colormaps["viridis"]
        hues = [to_rgb(viridis(0.9 * index / len(pairs))) for index in range(len(pairs))]
    colors, variants = [], dict.fromkeys(((row.pair, row.first.adds is None) for row in rows), 0)
    for row in rows:
        hue, key = hues[pairs.index(row.pair)], (row.pair, row.first.adds is None)
        shade = 0.7 ** variants[key]
        variants[key] += 1
        # Half way to white is still three times as dark as the paper.
        pale = 0.5 if row.first.adds is None else 0.0
        colors.append(tuple(shade * (channel + pale * (1 - channel)) for channel in hue))
    return colors


def _draw_curves(axes: Any, rows: Sequence[Row], colors: Sequence[tuple[float, float, float]]) -> list[Any]:
    """Means over seeds, with a band of one standard deviation; returns the legend's handles."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    evaluated = {epoch for row in rows for run in row.runs for epoch in run.curves["pgd20"]}
    for row, color in zip(rows, colors, strict=True):
        for kind, style in (("pgd20", "-"), ("clean", "--")):
            by_seed = [run.curves[kind] for run in row.runs]
            epochs = sorted(set.intersection(*map(set, by_seed)))
            values = [[100 * curve[epoch] for curve in by_seed] for epoch in epochs]
            means = [fmean(at_epoch) for at_epoch in values]
            # A single point would not show as a line.
            few = len(evaluated) <= 25 or len(epochs) == 1
            marker = ("o" if row.first.adds is None else "s") if few else ""
            axes.plot(epochs, means, style, color=color, marker=marker, markersize=4, linewidth=1.8)
            if len(by_seed) > 1:
                spreads = [stdev(at_epoch) for at_epoch in values]
                low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
                high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
                axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
    if len(evaluated) == 1:
        axes.set_xticks(sorted(evaluated))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (%)")
    handles = [Line2D([], [], color=color, linewidth=5) for color in colors]
    return [*handles, *(Line2D([], [], color="0.25", linestyle=style, linewidth=1.8) for style in ("-", "--"))]


def _draw_bars(axes: Any, rows: Sequence[Row], labels: Sequence[str], colors: Sequence[Any]) -> None:
    """One bar per row, pairs close together.

    Error bars: one standard deviation over seeds, or for a single seed the 95 % binomial interval of its images.
    """
    positions, at = [], 0.0
    for index, row in enumerate(rows):
        at += 0.0 if index == 0 else 0.86 if row.pair == rows[index - 1].pair else 1.5
        positions.append(at)
    several = single = False
    for row, color, position in zip(rows, colors, positions, strict=True):
        values = row.values("autoattack")
        if not values:
            axes.annotate("not run", (position, 0), (0, 3), textcoords="offset points", ha="center", fontsize=7)
            continue
        mean = 100 * fmean(values)
        spread = 100 * (stdev(values) if len(values) > 1 else half_width(values[0], row.first.attack["examples"]))
        several, single = several or len(values) > 1, single or len(values) == 1
        axes.bar(position, mean, width=0.8, color=color)
        axes.errorbar(position, mean, spread, color="0.15", capsize=4, linewidth=1.4)
        top = (position, mean + spread)
        axes.annotate(f"{mean:.2f}", top, (0, 3), textcoords="offset points", ha="center", fontsize=9)
    stacked = [label.replace("+", "\n+", 1).replace(", ", "\n") for label in labels]
    axes.set_xticks(positions, stacked, fontsize=9)
    if max(len(line) for label in stacked for line in label.split("\n")) > 9:
        # Wider than the bars: slanted, they do not run into each other.
        axes.set_xticks(positions, labels, fontsize=9, rotation=30, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", length=0)
    # A few bars stay bars and do not fill the panel.
    margin = max(0.9, (4 - positions[-1]) / 2)
    axes.set_xlim(-margin, positions[-1] + margin)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    images = {row.first.attack["examples"] for row in rows if row.first.attack}
    basis = ["mean ± std over seeds"] if several else []
    basis += ["one seed: 95 % interval" if several else "95 % interval"] if single else []
    basis += [f"{images.pop()} images"] if len(images) == 1 else []
    axes.set_ylabel("\n".join(filter(None, ["AutoAttack accuracy (%)", ", ".join(basis)])))
