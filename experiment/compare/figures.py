"""The figures: accuracies by epoch and AutoAttack, gains seed by seed, and alignment against AutoAttack."""

import textwrap
import tomllib
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiment.compare.comparison import Comparison, Gain, SeedGroup
from experiment.compare.published import teacher_figures
from experiment.files import write_atomically
from experiment.text import escaped

FORMATS = ("png", "pdf", "svg")
TEACHER = {"color": "0.35", "linestyle": ":", "linewidth": 1.6}
CHARACTERS = 150
"""What fits side by side under the alignment figure."""

Styles = Mapping[SeedGroup, dict[str, Any]]
"""Line colour and style per group; "label" is its name in figures."""


def all_figures(comparison: Comparison) -> dict[str, Any]:
    """The figures by name; those that would show nothing are left out."""
    if not comparison.groups:
        return {}
    styles = styles_of(comparison)
    drawn = {
        "comparison": _comparison_figure(comparison.groups, styles),
        "gains": _gains_figure(comparison.gains, styles),
        "alignment": _alignment_figure(comparison.groups, styles),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def write_figures(figures: Mapping[str, Any], out: Path) -> list[Path]:
    """Write each figure as PNG, PDF and SVG; equal figures are equal files."""
    paths = []
    for name, figure in figures.items():
        for kind in FORMATS:
            paths.append(out / f"{name}.{kind}")
            write_atomically(paths[-1], _saver(figure, kind))
    return paths


def svg(figure: Any) -> str:
    """A figure as SVG text, for a page or document: text stays text."""
    output = BytesIO()
    _saver(figure, "svg")(output)
    text = output.getvalue().decode()
    return text[text.index("<svg") :]


def _saver(figure: Any, kind: str) -> Callable[[Any], None]:
    import matplotlib

    def save(file: Any) -> None:
        dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
        with matplotlib.rc_context({"svg.hashsalt": "figure", "svg.fonttype": "none"}):
            figure.savefig(file, format=kind, metadata=dated)

    return save


def styles_of(comparison: Comparison) -> Styles:
    """A baseline is dashed with hollow markers, the version with an addition solid with full ones.

    A method keeps its colour whatever else is shown. A marker stands for a teacher, student and dataset; further
    variants of one method (another alpha) have other ones.
    """
    colors = tomllib.loads(resources.files("experiment.compare").joinpath("method_colors.toml").read_text())
    others = colors.pop("others")
    counts: Counter[tuple[str, ...]] = Counter()
    markers: dict[tuple[str, ...], int] = {("",): 0}  # a teacher's
    styles = {}
    for group in comparison.groups:
        run = group.first
        key = (run.name, *group.setting)
        place = (*group.setting, str(counts[key])) if group.is_student else ("",)
        counts[key] += 1
        color = colors.get(run.method) or others[zlib.crc32(run.method.encode()) % len(others)]
        names = [getattr(run, f"{name}_name") for name in comparison.varying if group.is_student]
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


def _comparison_figure(groups: Sequence[SeedGroup], styles: Styles) -> Any:
    """PGD-20 and clean accuracy by epoch, and AutoAttack bars; the teacher as a reference line."""
    wrapped = [textwrap.fill(styles[group]["label"], 30) for group in groups]
    lines = sum(label.count("\n") + 1 for label in wrapped)
    figure = _new_figure(15.0, max(4.6, 1.6 + 0.3 * lines + 0.12 * len(groups)))
    robust, clean, bars = figure.subplots(1, 3, width_ratios=[1, 1, 1.15])
    teacher = _teacher_of(groups)
    for axes, key, title in ((robust, "pgd20", "PGD-20"), (clean, "clean", "clean")):
        _draw_curves(axes, groups, styles, key)
        if key in teacher:
            axes.axhline(100 * teacher[key], **TEACHER)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("epoch")
        _tidy(axes)
    robust.set_ylabel("test accuracy (%)")
    _draw_bars(bars, groups, wrapped, styles)
    if "autoattack" in teacher:
        bars.axvline(100 * teacher["autoattack"], **TEACHER)
    if teacher:
        from matplotlib.lines import Line2D

        figure.legend([Line2D([], [], **TEACHER)], ["teacher"], loc="outside lower right", frameon=False)
    return figure


def _teacher_of(groups: Sequence[SeedGroup]) -> dict[str, float]:
    """Accuracies of the students' one teacher: a run that is listed, or as RobustBench publishes them; may be {}."""
    students = [group.first for group in groups if group.is_student and group.first.teacher != "-"]
    if len({run.teacher for run in students}) != 1:
        return {}
    own = {weights: run for group in groups for run in group.runs if (weights := run.hashes.get("weights"))}
    found = [own.get(run.hashes.get("teacher", "")) for run in students]
    if trained := next(filter(None, found), None):
        return {key: value for key, value in trained.values.items() if key in ("clean", "pgd20", "autoattack")}
    return next(filter(None, (teacher_figures(run.teacher, run.dataset) for run in students)), {})


def _draw_curves(axes: Any, groups: Sequence[SeedGroup], styles: Styles, key: str) -> None:
    """Means over seeds, with a band of one standard deviation."""
    from matplotlib.ticker import MaxNLocator

    evaluated = {epoch for group in groups for run in group.runs for epoch in run.curves[key]}
    for group in groups:
        by_seed = [run.curves[key] for run in group.runs]
        epochs = sorted(set.intersection(*map(set, by_seed)))
        values = [[100 * curve[epoch] for curve in by_seed] for epoch in epochs]
        means = [fmean(at_epoch) for at_epoch in values]
        # Many markers hide the line; a single point would not show without one.
        style = styles[group] if len(evaluated) <= 25 or len(epochs) == 1 else styles[group] | {"marker": ""}
        axes.plot(epochs, means, **style, markersize=4, linewidth=1.7)
        if len(by_seed) > 1:
            spreads = [stdev(at_epoch) for at_epoch in values]
            low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
            high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.12, linewidth=0)
    if len(evaluated) == 1:
        axes.set_xticks(sorted(evaluated))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_bars(axes: Any, groups: Sequence[SeedGroup], labels: Sequence[str], styles: Styles) -> None:
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
    basis: dict[str, None] = {}
    for group, position in zip(groups, positions, strict=True):
        values, style, hollow = group.values("autoattack"), styles[group], group.is_baseline
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
            basis["mean ± std over seeds"] = None
        else:
            examples = group.first.attack["examples"]
            ends = wilson_interval(round(mean * examples), examples)
            low, high = mean - ends[0], ends[1] - mean
            basis["one seed: 95 % interval"] = None
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
    notes = [*basis, *([f"{images.pop()} images"] if len(images) == 1 else [])]
    axes.set_title("AutoAttack", loc="left", fontsize=11)
    axes.set_xlabel("\n".join(filter(None, ["accuracy (%)", ", ".join(notes)])))
    _tidy(axes, grid="x")


def _gains_figure(gains: Sequence[Gain], styles: Styles) -> Any:
    """A dot per seed, the mean and its 95 % interval per pair; None without gains."""
    if not gains:
        return None
    figure = _new_figure(7.5, 1.4 + 0.55 * len(gains))
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
    axes.set_xlabel("gain in AutoAttack accuracy (points): mean and 95 % interval,\nbelow them a dot per seed")
    _tidy(axes, grid="x")
    return figure


def _alignment_figure(groups: Sequence[SeedGroup], styles: Styles) -> Any:
    """GC and GD (where measured the logit's too) against AutoAttack accuracy; None without.

    A point per run; an arrow from the mean of a baseline to that of the version with an addition.
    """
    shown = [group for group in groups if group.values("gc") and group.values("autoattack")]
    if not shown:
        return None
    columns = {"gc": "GC (cosine: higher is closer)", "gd": "GD (distance)"}
    if all(len(group.values("logit_gc")) == len(group.values("gc")) for group in shown):
        columns |= {"logit_gc": "logit GC", "logit_gd": "logit GD"}
    rows = len(columns) // 2
    figure = _new_figure(11.0, 1.0 + 4.0 * rows)
    panels = figure.subplots(rows, 2, sharey=True).flatten()
    for axes, (key, title) in zip(panels, columns.items(), strict=True):
        centres: dict[SeedGroup, tuple[float, float]] = {}
        for group in shown:
            runs = [run.values for run in group.runs if {key, "autoattack"} <= run.values.keys()]
            x, y = [values[key] for values in runs], [100 * values["autoattack"] for values in runs]
            style = styles[group] | {"linestyle": "", "label": None}
            axes.plot(x, y, **style, alpha=0.45, markersize=4)
            centres[group] = (fmean(x), fmean(y))
        for group in shown:
            base = next((other for other in shown if other.pair == group.pair and other.is_baseline), None)
            if base is not None and not group.is_baseline:
                arrow = {"arrowstyle": "-|>", "color": styles[group]["color"], "linewidth": 1.8}
                axes.annotate("", centres[group], centres[base], arrowprops=arrow)
            axes.plot(*([value] for value in centres[group]), **styles[group] | {"linestyle": ""}, markersize=9)
        axes.set_xlabel(f"{title} between the input gradients of student and teacher", fontsize=9)
        _tidy(axes, grid="both")
    for axes in panels[::2]:
        axes.set_ylabel("AutoAttack accuracy (%)")
    columns_that_fit = max(1, CHARACTERS // (max(len(styles[group]["label"]) for group in shown) + 8))
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(shown), columns_that_fit),
        frameon=False,
        fontsize=9,
        title="small marks are runs, large ones means, arrows lead from a baseline to the version with an addition",
        title_fontsize=9,
    )
    return figure
