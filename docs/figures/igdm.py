"""Draw what IGDM matches, schematically, as docs/figures/igdm.svg: python docs/figures/igdm.py [FILE]."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

TEACHER, STUDENT, TEXT = "#2a8fbd", "#d9762b", "#808080"
"""Mid-tones, legible on a white and on a black page."""


def save(figure: Any, file: Path) -> None:
    """Write a figure with two visible spines per panel on a transparent page, the same bytes every time."""
    for axes in figure.axes:
        axes.tick_params(colors=TEXT)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(TEXT)
    metadata = {"Date": None} if file.suffix == ".svg" else None
    figure.savefig(file, transparent=True, bbox_inches="tight", dpi=100, metadata=metadata)


def draw(file: Path) -> None:
    """Write the picture; the ending of the file's name is the format (.svg or .png)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "igdm", "font.size": 12, "text.color": TEXT})
    figure, axes = plt.subplots(figsize=(8, 3.8))
    position = np.linspace(-1, 1, 100)  # in units of delta
    curves = (
        ("teacher T", "ΔT", TEACHER, 3.2 - 0.8 * position - 0.15 * position**2, 1.2),
        ("student S", "ΔS", STUDENT, 2.2 - 1.7 * position - 0.25 * position**2, 1.55),
    )
    for name, change, color, logit, arrow in curves:
        axes.plot(position, logit, color=color, linewidth=2.5)
        axes.plot([-1, 1], logit[[0, -1]], "o", color=color, markersize=9)
        axes.plot([-1, arrow], logit[[0, 0]], ":", color=color, linewidth=1.2)
        axes.plot([1, arrow], logit[[-1, -1]], ":", color=color, linewidth=1.2)
        ends = {"arrowstyle": "<|-|>", "color": color, "linewidth": 2}
        axes.annotate("", (arrow, logit[-1]), (arrow, logit[0]), arrowprops=ends)
        axes.text(arrow + 0.05, logit[[0, -1]].mean() - 0.2, change, color=color, fontweight="bold")
        axes.text(0, logit[50] + 0.25, name, color=color, fontweight="bold")
    axes.text(2.0, 2.3, "IGDM trains S so that\nsoftmax(ΔS) is close\nto softmax(ΔT)", va="center", fontsize=13)
    axes.set_xticks([-1, 0, 1], ["x − γδ", "x", "x + βδ"])
    axes.set_xlim(-1.1, 1.9)
    axes.set_ylabel("logit of one class", color=TEXT)
    axes.set_yticks([])
    save(figure, file)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
