"""Figures of an evaluation: accuracy over epsilon, and input gradients."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiment import UserError
from experiment.evaluation.accuracy import attack_of
from experiment.evaluation.alignment import input_gradients
from experiment.evaluation.batches import as_pixels, device_of, measuring

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curve_figure(path: Path, curves: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Plot accuracy over epsilon, one line per attack with its 95 % band.

    Args:
        curves: points as in ``accuracy_curve``, by the attack's name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        epsilons = [255 * point["epsilon"] for point in points]
        low, high = ([100 * point["interval"][end] for point in points] for end in (0, 1))
        label = f"{name}, {points[0]['examples']} images"
        (line,) = axes.plot(epsilons, [100 * point["accuracy"] for point in points], marker="o", ms=4, label=label)
        axes.fill_between(epsilons, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="epsilon × 255", ylabel="accuracy, %", title=title, ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(title="with 95 % intervals")
    _save(figure, path)


def alignment_figure(
    path: Path,
    teacher: nn.Module,
    students: dict[str, nn.Module],
    x: Tensor,
    y: Tensor,
    epsilon: float,
    class_names: Sequence[str],
) -> None:
    """Plot images in rows: x, the first student's PGD-20 perturbation, then the input gradient of each network.

    Gradients are of the true class's probability, summed over colours, each scaled to its largest value. They show
    directions, not lengths. Each student's gradient is labelled with its cosine to the teacher's.

    Args:
        students: networks by column title.
        x: the images, (N, 3, H, W); y: their classes.
    """
    from matplotlib.figure import Figure

    first = next(iter(students.values()))
    device = device_of(first, x)
    clean, labels = as_pixels(x.to(device)).float(), y.to(device)
    with measuring(device, teacher, *students.values()):
        torch.manual_seed(0)
        delta = (attack_of("pgd", first, epsilon)(clean, labels) - clean).cpu()
        gradients = {
            name: input_gradients(model, clean, labels)[1][0].cpu()
            for name, model in {"teacher": teacher, **students}.items()
        }
    columns = ["x", "δ", *gradients]
    figure = Figure(figsize=(1.7 * len(columns), 1.8 * len(x) + 0.6), layout="constrained")
    grid = figure.subplots(len(x), len(columns), squeeze=False)
    for i, row in enumerate(grid):
        row[0].imshow(clean[i].cpu().permute(1, 2, 0).numpy(), interpolation="nearest")
        row[0].set_ylabel(class_names[int(y[i])], fontsize=8)
        row[1].imshow((0.5 + delta[i] / (2 * epsilon)).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        for axes, (name, of_images) in zip(row[2:], gradients.items(), strict=True):
            gradient = of_images[i].sum(dim=0)
            largest = max(float(gradient.abs().max()), 1e-30)
            axes.imshow(gradient.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
            if name != "teacher":
                pair = (of_images[i].flatten(), gradients["teacher"][i].flatten())
                axes.set_xlabel(f"cos {torch.cosine_similarity(*pair, dim=0):.2f}", fontsize=8)
        for axes in row:
            axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name, fontsize=9, wrap=True)
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
