"""Draw AutoAttack accuracy against the counted cost of training, as docs/figures/attack_cost.svg.

python docs/figures/attack_cost.py [FILE]

From the records of the studies digits_attack and cifar10_16_attack (AdaAD with a teacher that is evaluated less often),
those of the same name with _rslad (RSLAD's attack), and digits (all six methods, with another teacher that was trained
alike). Means over seeds with Student's 95 % interval. The cost is that of the networks of these studies, in
multiply-accumulate operations of a training step per image, counted like docs/performance.md. The share of them that
remains at K = 10 is printed.
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
LABELS = {
    "digits": {
        ("ARD", 1): (-9, -4, "right"),
        ("ARD+IGDM", 1): (-9, 18, "right"),
        ("RSLAD", 1): (-9, -12, "right"),
        ("RSLAD+IGDM", 1): (8, -12, "left"),
        ("AdaAD", 10): (10, -20, "left"),
        ("AdaAD+IGDM", 10): (-9, 6, "right"),
    },
    "cifar10_16": {
        ("AdaAD+IGDM", "RSLAD's attack"): (8, -26, "left"),
        ("AdaAD+IGDM", 10): (-9, 6, "right"),
    },
}
"""Where a label is placed (points), where it would hide another."""
PANELS = (
    ("digits", 8, "RES-20", LABELS["digits"], (("digits", "s"), ("digits_attack", "o"))),
    ("CIFAR-10 at 16 × 16", 16, "WRN-10-2", LABELS["cifar10_16"], (("cifar10_16_attack", "o"),)),
)
"""Data set, its side in pixels, the teacher, labels, and studies with their markers."""


def macs(method: str, settings: dict, teacher: str, side: int) -> float:
    """Operations of a training step per image, as experiment/study/costs.toml counts its passes."""
    from experiment.study import command

    forward, to_input, full, teacher_forward, teacher_backward = command.counted()["passes"][method]
    if settings.get("attack") == "rslad" and teacher_backward:  # T(x) once, and no gradient of the teacher
        teacher_forward, teacher_backward = teacher_forward - teacher_backward + 1, 0
    elif teacher_backward:
        evaluations = math.ceil(settings["steps"] / settings.get("teacher_every", 1))
        teacher_forward += evaluations - teacher_backward
        teacher_backward = evaluations
    student = (forward + to_input + 2 * full) * command.forward_macs(settings["student"], side)
    return student + (teacher_forward + teacher_backward) * command.forward_macs(teacher, side)


def points(study: str, teacher: str, side: int) -> dict[tuple[str, int | str], tuple[float, float, float, int]]:
    """By method and K or attack: cost in MMAC, mean AutoAttack accuracy and half its interval (per cent), seeds."""
    from scipy.stats import sem, t

    from experiment.study import command

    found = defaultdict(list)
    files = [ROOT / f"docs/results/{name}.json" for name in (study, f"{study}_rslad")]
    for run in (run for file in files if file.exists() for run in json.loads(file.read_text())["runs"]):
        config, result = run["config"], run["result"]
        method = "+".join(part for part in (config["method"], config["adds"]) if part)
        if method in command.counted()["passes"]:
            settings = config["settings"]
            other = config["method"] == "AdaAD" and settings["attack"] == "rslad"
            key = method, "RSLAD's attack" if other else settings.get("teacher_every", 1)
            found[key].append((macs(method, settings, teacher, side) / 1e6, 100 * result["autoattack"]["accuracy"]))
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
    figure, panels = plt.subplots(len(PANELS), figsize=(8, 4.2 * len(PANELS)))
    for axes, (data, side, teacher, labels, studies) in zip(panels, PANELS, strict=True):
        for study, marker in studies:
            found = points(study, teacher, side)
            for (method, every), (cost, mean, half, _) in found.items():
                base, _, added = method.partition("+")
                style = {"color": colors[base], "markerfacecolor": colors[base] if added else "none"}
                axes.errorbar(cost, mean, half, fmt=marker, markersize=8, capsize=3, linewidth=1.2, **style)
                if study == "digits" and base == "AdaAD":
                    continue  # labelled in the other study
                x, y, align = labels.get((method, every), (8, 4, "left"))
                attack = every if isinstance(every, str) else f"K = {every}"
                label = f"{method}, {attack}" if base == "AdaAD" else method
                axes.annotate(label, (cost, mean), (x, y), textcoords="offset points", fontsize=9, ha=align)
            if (thinned := ("AdaAD+IGDM", 10)) in found:
                share = found[thinned][0] / found["AdaAD+IGDM", 1][0]
                print(f"{study}: a training step at K = 10 takes {share:.0%} of the operations at K = 1")
            seeds = max(seeds for *_, seeds in found.values())
            axes.plot([], [], marker, color=TEXT, markerfacecolor="none", label=f"studies/{study}, {seeds} seeds")
        axes.legend(loc="lower center", frameon=False, fontsize=9, labelcolor=TEXT)
        axes.set_xlim(0, 1.2 * axes.get_xlim()[1])  # room for the labels
        axes.set_xlabel(f"MMAC of a training step per image ({teacher} teacher, RES-8 student, {data})", color=TEXT)
        axes.set_ylabel("AutoAttack accuracy (%), 95 % interval", color=TEXT)
    save(figure, file)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the project is not installed
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
