"""What evaluate.py writes, never overwriting: its record and the text of it, adversarial images, figures."""

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiment import UserError
from experiment.data import as_float
from experiment.evaluation.accuracy import STEPS, attack_of
from experiment.evaluation.alignment import input_gradients
from experiment.evaluation.autoattack import autoattack_label
from experiment.evaluation.batches import device_of, measuring
from experiment.files import make_folder, read_json, write_atomically, write_json
from experiment.text import as_text, budget

if TYPE_CHECKING:  # a machine that only trains may lack pydantic
    from experiment.records import Config, Result

FOLDER = "evaluations"
"""Folder of the records, in a run folder or next to a checkpoint."""

FORMAT = 2


def check_outputs(folder: Path, out: Path | None, *others: Path) -> None:
    """Check, before the evaluation, that its files can be written and overwrite nothing; create their folders.

    Args:
        out: file of the record; None for one in `folder`.
    """
    for path in (*others, out or folder / FOLDER / "record"):
        if path.exists():
            raise UserError(f"{path} exists and is not overwritten. Use another name")
        make_folder(path.parent)
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"cannot write to {path.parent}. Use another folder, for the record with --out FILE.json")


def write_record(folder: Path, record: dict[str, Any], out: Path | None = None) -> Path:
    """Write a record to `out`, or under ``folder/evaluations``, named after its time and its measurements.

    Args:
        record: plain types, with ``measured``, the kinds of measurements; ``format`` and ``time`` are added.

    Returns:
        The file.
    """
    now = datetime.now(UTC)
    # Two evaluations may end in the same second.
    name = f"{now:%Y-%m-%dT%H-%M-%S.%fZ}_{'-'.join(record['measured'])}.json"
    path = out or folder / FOLDER / name
    make_folder(path.parent)
    write_json(path, {"format": FORMAT, "time": f"{now:%Y-%m-%dT%H:%M:%S.%fZ}", **record})
    return path


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a folder, oldest first, each with its ``file``; other files are ignored."""
    read = [{**read_json(path), "file": str(path)} for path in (folder / FOLDER).glob("*.json")]
    return sorted(
        (record for record in read if record.get("format") == FORMAT), key=lambda record: str(record.get("time"))
    )


NAMES = {"clean": "clean", "fgsm": "FGSM", "pgd": "PGD", "cw": "C&W", "autoattack": "AutoAttack"}


def attack_labels(accuracies: dict[str, list[dict[str, Any]]], restarts: int = 1) -> dict[str, str]:
    """Return printed names: PGD-20, "PGD-100, 5 starts" with restarts, AutoAttack with its version."""
    labels = {}
    for attack, points in accuracies.items():
        versions = [point["result"]["version"] for point in points if point.get("result")]
        labels[attack] = autoattack_label(versions[0]) if versions else NAMES[attack]
        if steps := points[0].get("steps"):
            labels[attack] += f"-{steps}" + (f", {restarts} starts" if restarts > 1 else "")
    return labels


def record_text(record: dict[str, Any]) -> str:
    """Format the figures of a record: accuracies in per cent with two decimals, with definitions where needed."""
    labels = attack_labels(record["accuracies"], record["settings"]["restarts"])
    parts = [
        _accuracies(record["accuracies"], labels) if labels else (),
        _per_class(record["per_class"], labels) if "per_class" in record else (),
        _torchattacks(record["torchattacks"]) if "torchattacks" in record else (),
        _gradients(record["gradients"]) if "gradients" in record else (),
    ]
    return "\n\n".join(filter(None, map("\n".join, parts)))


def _accuracies(accuracies: dict[str, list[dict[str, Any]]], labels: dict[str, str]) -> Iterator[str]:
    table = [["attack", "epsilon", "accuracy", "95 % interval", "images", "attacked"]]
    for attack, points in accuracies.items():
        for point in points:
            low, high = point["interval"]
            interval, attacked = f"{100 * low:.2f} to {100 * high:.2f} %", " + ".join(map(str, point["attacked"]))
            figures = [budget(point["epsilon"]), _per_cent(point), interval, str(point["examples"]), attacked]
            table.append([labels[attack], *figures])
    yield as_text(table)


def _per_class(per_class: dict[str, Any], labels: dict[str, str]) -> Iterator[str]:
    by_attack = {attack: {row["class"]: row for row in rows} for attack, rows in per_class["attacks"].items()}
    strongest = list(by_attack)[-1]
    yield f"by class at epsilon {budget(per_class['epsilon'])}, the worst under {labels[strongest]} first"
    table = [["class", f"images ({labels[strongest]})", *(labels[attack] for attack in by_attack)]]
    for name, row in by_attack[strongest].items():
        table.append([name, str(row["examples"]), *(_per_cent(rows[name]) for rows in by_attack.values())])
    yield as_text(table)


def _torchattacks(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "comparison with torchattacks: same images, epsilon, step size and steps (without C&W, an L2 attack there)"
    table = [["attack", "ours", "torchattacks", "misclassified only by ours", "only by theirs", "McNemar p", "at 5 %"]]
    for row in rows:
        (label,) = attack_labels({row["attack"]: [row]}).values()
        shares = [f"{100 * row[name]:.2f} %" for name in ("ours", "torchattacks")]
        counts = [str(row["only_ours"]), str(row["only_theirs"]), f"{row['p']:.2f}"]
        table.append([label, *shares, *counts, "DIFFERENCE" if row["p"] < 0.05 else "no difference"])
    yield as_text(table)


def _gradients(report: dict[str, Any]) -> Iterator[str]:
    yield "input gradients of student and teacher, for each scalar f"
    columns = ("gd", "gc", "remainder_student", "remainder_teacher")
    rows = [[name, *(f"{row[column]:.4f}" for column in columns)] for name, row in report["scalars"].items()]
    yield as_text([["f", "GD", "GC", "remainder: student", "teacher"], *rows])
    for name, row in report["scalars"].items():
        yield f"{name}: f = {row['definition']}"
    yield report["alignment_definition"]
    yield f"{report['remainder_definition']}; at epsilon {budget(report['epsilon'])}"


def _per_cent(point: dict[str, Any]) -> str:
    return f"{100 * point['accuracy']:.2f} %"


def differences(record: dict[str, Any], config: "Config", result: "Result | None") -> list[str]:
    """Describe other data, another teacher, and accuracies that differ although the settings are equal.

    Args:
        record: the evaluation's record, as ``evaluate.py`` writes it.
        config, result: of the run; None for an unfinished run.
    """
    found = []
    for name in ("dataset", "teacher"):
        own, of_run = record[f"{name}_sha256"], getattr(config, f"{name}_sha256")
        if own and of_run and own != of_run:
            found.append(f"the {name} differs from the run's: SHA-256 {own[:12]}..., in config.json {of_run[:12]}...")
    if result is None:
        return found
    settings, accuracies, pairs = record["settings"], record["accuracies"], {}
    if record["test_examples"] == result.test_examples:
        if "clean" in accuracies:
            pairs["clean"] = (accuracies["clean"][0]["accuracy"], result.clean)
        usual = settings["steps"] in (None, STEPS["pgd"]) and settings["restarts"] == 1 and settings["start_seed"] == 0
        if "pgd" in accuracies and usual and settings["epsilons"] == [config.settings["epsilon"]]:
            pairs["PGD-20"] = (accuracies["pgd"][0]["accuracy"], result.pgd20)
    attack, of_run = accuracies.get("autoattack", [{}])[0].get("result"), result.autoattack
    keys = ("examples", "epsilon", "seed", "batch")
    if attack and of_run and all(attack[key] == getattr(of_run, key) for key in keys):
        pairs["AutoAttack"] = (attack["accuracy"], of_run.accuracy)
    for name, (own, of_run) in pairs.items():
        if own != of_run:
            found.append(f"{name} is {100 * own:.2f} % now and {100 * of_run:.2f} % in result.json")
    return found


# Files of other formats -----------------------------------------------------------------------------------------------


def save_adversarial(path: Path, x: Tensor, y: Tensor, predictions: Tensor, x_adv: Tensor) -> None:
    """Write an .npz with x and x_adv, (N, C, H, W) float32 in [0, 1], and y and predictions, (N,) int64."""
    import numpy as np

    tensors = {"x": as_float(x).float(), "x_adv": x_adv, "y": y, "predictions": predictions}
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


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
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.removeprefix("."), dpi=150))


def alignment_figure(
    path: Path,
    teacher: nn.Module,
    students: Sequence[tuple[str, nn.Module]],
    x: Tensor,
    y: Tensor,
    epsilon: float,
    class_names: Sequence[str],
) -> None:
    """Plot images in rows: x, the sign of the first student's PGD-20 perturbation δ, and each network's input gradient.

    δ is summed over colours and drawn on the image in grey: red makes a pixel brighter, blue darker. Gradients are of
    the true class's probability, summed over colours, each scaled to its largest value. They show directions, not
    lengths. Each student's gradient is labelled with its cosine to the teacher's.

    Args:
        students: title of the column, and network.
        x: the images, (N, 3, H, W); y: their classes.
    """
    from matplotlib.figure import Figure

    titles, networks = zip(("teacher", teacher), *students, strict=True)
    device = device_of(teacher, x)
    clean, labels = as_float(x.to(device)).float(), y.to(device)
    with measuring(device, *networks):
        torch.manual_seed(0)
        delta = (attack_of("pgd", epsilon)(networks[1], clean, labels) - clean).cpu()
        gradients = [input_gradients(network, clean, labels)[1][0].cpu() for network in networks]
    columns = ["x", "sign of δ", *titles]
    figure = Figure(figsize=(1.7 * len(columns), 1.8 * len(x) + 0.6), layout="constrained")
    grid = figure.subplots(len(x), len(columns), squeeze=False)
    for i, row in enumerate(grid):
        row[0].imshow(clean[i].cpu().permute(1, 2, 0).numpy(), interpolation="nearest")
        row[0].set_ylabel(class_names[int(y[i])], fontsize=8)
        row[1].imshow(clean[i].cpu().mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        signs = delta[i].sum(dim=0).sign().numpy()
        row[1].imshow(signs, cmap="bwr", vmin=-1, vmax=1, alpha=0.5 * abs(signs), interpolation="nearest")
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
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.removeprefix("."), dpi=150))
