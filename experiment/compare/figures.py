"""What all figures share: colours and line styles that a method keeps, and the three formats a figure is written in."""

import functools
import tomllib
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

from experiment.compare.groups import SeedGroup
from experiment.compare.tables import labels_of
from experiment.compare.text import escaped
from experiment.files import write_atomically

FORMATS = ("png", "pdf", "svg")


@functools.cache
def _colors() -> dict[str, Any]:
    return tomllib.loads(resources.files("experiment.compare").joinpath("method_colors.toml").read_text())


def method_color(method: str) -> str:
    """The colour of a base method and of all that is added to it; the same in every figure."""
    colors = _colors()
    others = colors["others"]
    return colors.get(method) or others[zlib.crc32(method.encode()) % len(others)]


def styles_of(groups: Sequence[SeedGroup]) -> list[dict[str, Any]]:
    """Line colour and style per group: a baseline dashed with hollow markers, its twin solid with full ones.

    A marker stands for a teacher, student and dataset; further variants of one method (another alpha) have other ones.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    markers: dict[tuple[str, ...], int] = {("",): 0}  # a teacher's
    styles = []
    for group in groups:
        setting = (group.first.teacher, group.first.student, group.first.dataset)
        key = (group.name, *setting)
        place = ("",) if group.first.teacher == "-" else (*setting, str(counts[key]))
        counts[key] += 1
        color = method_color(group.first.method)
        styles.append(
            {
                "color": color,
                "linestyle": "--" if group.is_baseline else "-",
                "marker": "*osD^vPX"[markers.setdefault(place, len(markers)) % 8],
                "markerfacecolor": "white" if group.is_baseline else color,
            }
        )
    return styles


def plot_labels(groups: Sequence[SeedGroup]) -> list[str]:
    """Labels with the teacher, student and dataset too, where these differ between groups; as matplotlib draws them."""
    fields = ("teacher_name", "student", "dataset")
    students = [group.first for group in groups if group.first.teacher != "-"]
    varying = [field for field in fields if len({getattr(run, field) for run in students}) > 1]
    labels = []
    for group, label in zip(groups, labels_of(groups), strict=True):
        parts = [label, *(Path(value).name for field in varying if (value := getattr(group.first, field)) != "-")]
        # Names are drawn as they are: a dollar sign would start a formula.
        labels.append(escaped(", ".join(parts)).replace("$", r"\$"))
    return labels


def new_figure(width: float, height: float) -> Any:
    """A figure that draws without a display and without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def tidy(axes: Any, grid: str = "y") -> None:
    """Grey grid behind, no frame at the top and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.9")
    axes.set_axisbelow(True)


def write(figure: Any, path: Path) -> list[Path]:
    """Write a figure as PNG, PDF and SVG beside each other; equal figures are equal files.

    Raises:
        UserError: a file cannot be written.
    """
    paths = [path.with_suffix(f".{kind}") for kind in FORMATS]
    for each in paths:
        write_atomically(each, _saver(figure, each.suffix[1:]))
    return paths


def svg(figure: Any) -> str:
    """A figure as SVG text, for a page: text stays text."""
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
