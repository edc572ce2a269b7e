"""Figures of an evaluation: accuracy over epsilon, and input gradients."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiment.evaluation.accuracy import attack_of
from experiment.evaluation.alignment import input_gradients
from experiment.evaluation.batches import as_pixels, device_of, measuring
from experiment.evaluation.record import attack_labels
from experiment.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curve_figure(path: Path, curves: dict[str, list[dict[str, Any]]], restarts: int, title: str) -> None:
    """Plot accuracy over epsilon, one line per attack with its 95 % band; curves and restarts: `attack_labels`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    labels = attack_labels(curves, restarts)
    for attack, points in curves.items():
        epsilons = [255 * point["epsilon"] for point in points]
        low, high = ([100 * point["interval"][end] for point in points] for end in (0, 1))
        label = f"{labels[attack]}, {points[0]['examples']} images"
        (line,) = axes.plot(epsilons, [100 * point["accuracy"] for point in points], marker="o", ms=4, label=label)
        axes.fill_between(epsilons, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="epsilon × 255", ylabel="accuracy, %", title=title, ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(title="with 95 % intervals")
    _save(figure, path)


def alignment_figure(
    path: Path,
    teacher: nn.Module,
    students: Sequence[tuple[str, nn.Module]],
    x: Tensor,
    y: Tensor,
    epsilon: float,
    class_names: Sequence[str],
) -> None:
    """Plot images in rows: x, the first student's PGD-20 perturbation, then the input gradient of each network.

    Gradients are of the true class's probability, summed over colours, each scaled to its largest value. They show
    directions, not lengths. Each student's gradient is labelled with its cosine to the teacher's.

    Args:
        students: title of the column, and network.
        x: the images, (N, 3, H, W); y: their classes.
    """
    from matplotlib.figure import Figure

    titles, networks = zip(("teacher", teacher), *students, strict=True)
    device = device_of(teacher, x)
    clean, labels = as_pixels(x.to(device)).float(), y.to(device)
    with measuring(device, *networks):
        torch.manual_seed(0)
        delta = (attack_of("pgd", epsilon)(networks[1], clean, labels) - clean).cpu()
        gradients = [input_gradients(network, clean, labels)[1][0].cpu() for network in networks]
    columns = ["x", "δ", *titles]
    figure = Figure(figsize=(1.7 * len(columns), 1.8 * len(x) + 0.6), layout="constrained")
    grid = figure.subplots(len(x), len(columns), squeeze=False)
    for i, row in enumerate(grid):
        row[0].imshow(clean[i].cpu().permute(1, 2, 0).numpy(), interpolation="nearest")
        row[0].set_ylabel(class_names[int(y[i])], fontsize=8)
        row[1].imshow((0.5 + delta[i] / (2 * epsilon)).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        for axes, of_images in zip(row[2:], gradients, strict=True):
            gradient = of_images[i].sum(dim=0)
            largest = max(float(gradient.abs().max()), 1e-30)
            axes.imshow(gradient.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
            if of_images is not gradients[0]:
                cosine = torch.cosine_similarity(of_images[i].flatten(), gradients[0][i].flatten(), dim=0)
                axes.set_xlabel(f"cos {cosine:.2f}", fontsize=8)
        for axes in row:
            axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name, fontsize=9, wrap=True)
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.removeprefix("."), dpi=150))
