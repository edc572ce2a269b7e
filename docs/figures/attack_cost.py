"""Draw AutoAttack accuracy against the counted cost of training, as docs/figures/attack_cost.svg.

python docs/figures/attack_cost.py [FILE]

From the records of the studies digits_attack (AdaAD with a teacher that is evaluated less often), digits_attack_rslad
(with RSLAD's attack) and digits (all six methods, with another teacher that was trained alike). Means over seeds with
Student's 95 % interval. The cost is that of the networks of these studies, in multiply-accumulate operations of a
training step per image, counted like docs/performance.md.
"""

import json
import math
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from igdm import TEXT, save

ROOT = Path(__file__).resolve().parents[2]
SIDE = 8
"""Pixels of a digit."""
LABELS = {
    ("ARD", 1): (-9, -4, "right"),
    ("ARD+IGDM", 1): (-9, 18, "right"),
    ("RSLAD", 1): (-9, -12, "right"),
    ("RSLAD+IGDM", 1): (8, -12, "left"),
    ("AdaAD", 10): (10, -20, "left"),
    ("AdaAD+IGDM", 10): (-9, 6, "right"),
}
"""Where a label is placed (points), where it would hide another."""


def macs(method: str, settings: dict) -> float:
    """Operations of a training step per image, as experiment/study/costs.toml counts its passes."""
    from experiment.study import command

    forward, to_input, full, teacher_forward, teacher_backward = command.counted()["passes"][method]
    if settings.get("attack") == "rslad" and teacher_backward:  # T(x) once, and no gradient of the teacher
        teacher_forward, teacher_backward = teacher_forward - teacher_backward + 1, 0
    elif teacher_backward:
        evaluations = math.ceil(settings["steps"] / settings.get("teacher_every", 1))
        teacher_forward += evaluations - teacher_backward
        teacher_backward = evaluations
    student = (forward + to_input + 2 * full) * command.forward_macs(settings["student"], SIDE)
    return student + (teacher_forward + teacher_backward) * command.forward_macs("RES-20", SIDE)


def points(*studies: str) -> dict[tuple[str, int | str], tuple[float, float, float, int]]:
    """By method and K or attack: cost in MMAC, mean AutoAttack accuracy and half its interval (per cent), seeds."""
    from scipy.stats import sem, t

    from experiment.study import command

    found = defaultdict(list)
    files = [ROOT / f"docs/results/{study}.json" for study in studies]
    for run in (run for file in files for run in json.loads(file.read_text())["runs"]):
        config, result = run["config"], run["result"]
        method = "+".join(part for part in (config["method"], config["adds"]) if part)
        if method in command.counted()["passes"]:
            settings = config["settings"]
            other = config["method"] == "AdaAD" and settings["attack"] == "rslad"
            key = method, "RSLAD's attack" if other else settings.get("teacher_every", 1)
            found[key].append((macs(method, settings) / 1e6, 100 * result["autoattack"]["accuracy"]))
    table = {}
    for key, values in found.items():
        accuracies = [accuracy for _, accuracy in values]
        half = float(t.ppf(0.975, len(values) - 1) * sem(accuracies))
        table[key] = values[0][0], fmean(accuracies), half, len(values)
    return table


def draw(file: Path) -> None:
    """Write the figure; the ending of the file's name is the format (.svg or .png)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    colors = tomllib.loads((ROOT / "experiment/compare/method_colors.toml").read_text())
    plt.rcParams.update({"svg.hashsalt": "attack_cost", "font.size": 11, "text.color": TEXT})
    figure, axes = plt.subplots(figsize=(8, 4.2))
    kinds = ((["digits"], "s"), (["digits_attack", "digits_attack_rslad"], "o"))
    for studies, marker in kinds:
        found = points(*studies)
        for (method, every), (cost, mean, half, _) in found.items():
            base, _, added = method.partition("+")
            style = {"color": colors[base], "markerfacecolor": colors[base] if added else "none"}
            axes.errorbar(cost, mean, half, fmt=marker, markersize=8, capsize=3, linewidth=1.2, **style)
            if studies == ["digits"] and base == "AdaAD":
                continue  # labelled in the other study
            x, y, side = LABELS.get((method, every), (8, 4, "left"))
            label = method if base != "AdaAD" else f"{method}, {every if isinstance(every, str) else f'K = {every}'}"
            axes.annotate(label, (cost, mean), (x, y), textcoords="offset points", fontsize=9, ha=side)
        seeds = max(seeds for *_, seeds in found.values())
        axes.plot([], [], marker, color=TEXT, markerfacecolor="none", label=f"studies/{studies[0]}, {seeds} seeds")
    axes.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=TEXT)
    axes.set_xlim(0, 95)
    axes.set_xlabel("MMAC of a training step per image (RES-20 teacher, RES-8 student, digits)", color=TEXT)
    axes.set_ylabel("AutoAttack accuracy (%), 95 % interval", color=TEXT)
    save(figure, axes, file)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the project is not installed
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
