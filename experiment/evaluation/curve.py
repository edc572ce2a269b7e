"""Accuracy under an attack over several epsilons and restarts, with one flag per image; accuracy by class."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiment.evaluation.accuracy import STEPS, Attacked, attack_of, attacked
from experiment.evaluation.autoattack import autoattack, data_sha256
from experiment.evaluation.batches import accuracy_of, device_of, flags_text
from experiment.files import state_sha256


def accuracy_curve(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: str,
    epsilons: Sequence[float],
    *,
    steps: int | None = None,
    restarts: int = 1,
    seed: int = 0,
    keep: bool = False,
) -> tuple[list[dict[str, Any]], Attacked]:
    """Accuracy under fgsm, pgd or cw, or on clean images, at each epsilon from the smallest to the largest.

    The smallest epsilon is measured on all images; each larger one on the images that are still robust.

    Args:
        steps: of pgd and cw; by default 20 and 30.
        restarts: random starts of pgd and cw; an image is robust if it is correctly classified under all of them. The
            first is that of ``pgd_accuracy`` with the same seed.
        keep: also keep the attacked images of the last epsilon, or the first misclassified ones.

    Returns:
        One point per epsilon (plain types): ``epsilon``, ``accuracy``, ``interval``, ``examples``, ``flags``,
        ``attacked`` (images in each restart), ``steps``, ``seconds``; and the state of all images at the last epsilon.
    """
    correct, predictions, x_adv = torch.ones(len(y), dtype=torch.bool), y.cpu().clone(), None
    points = []
    for epsilon in sorted(set(epsilons)):
        started, counts = time.perf_counter(), []
        for restart in range(restarts if attack in STEPS and epsilon > 0 else 1):
            index = correct.nonzero().squeeze(1)
            counts.append(len(index))
            if len(index) == 0:
                continue
            latest = attacked(
                model,
                x[index.to(x.device)],
                y[index.to(y.device)],
                attack_of(attack, model, epsilon, steps),
                seed=f"{seed} restart {restart}" if restart else seed,
                keep=keep,
                progress=f"{attack}, epsilon {epsilon:.4f}",
            )
            correct[index], predictions[index] = latest.correct, latest.predictions
            if x_adv is None:
                x_adv = latest.x_adv
            else:
                x_adv[index] = latest.x_adv
        points.append(
            {
                "epsilon": epsilon,
                **accuracy_of(flags_text(correct)),
                "attacked": counts,
                "steps": (steps or STEPS[attack]) if attack in STEPS else None,
                "seconds": time.perf_counter() - started,
            }
        )
    return points, Attacked(correct, predictions, x_adv)


def autoattack_curve(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilons: Sequence[float],
    *,
    folder: Path,
    batch: int = 250,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """AutoAttack at each epsilon from the smallest to the largest; see ``accuracy_curve`` and ``autoattack``.

    Args:
        folder: contains a folder of chunks for each epsilon, named after everything that its result depends on;
            existing chunks are read.

    Returns:
        Points as in ``accuracy_curve``; for an epsilon above 0 also ``result``, the return value of ``autoattack`` on
        the images that were still robust.
    """
    robust, points = torch.ones(len(y), dtype=torch.bool), []
    for epsilon in sorted(set(epsilons)):
        started, index, result = time.perf_counter(), robust.nonzero().squeeze(1), None
        if len(index):
            x_left, y_left = x[index.to(x.device)], y[index.to(y.device)]
            if epsilon == 0:
                robust[index] = attacked(model, x_left, y_left, attack_of("clean", model, 0)).correct
            else:
                chunks = folder / _chunks_name(model, x_left, y_left, epsilon, batch, seed)
                result = autoattack(model, x_left, y_left, epsilon, folder=chunks, batch=batch, seed=seed)
                robust[index] = torch.tensor([flag == "1" for flag in result["flags"]["square"]])
        points.append(
            {
                "epsilon": epsilon,
                **accuracy_of(flags_text(robust)),
                "attacked": [len(index)],
                "result": result,
                "seconds": result["seconds"] if result else time.perf_counter() - started,
            }
        )
    return points


def _chunks_name(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, batch: int, seed: int) -> str:
    network, images, device = state_sha256(model)[:8], data_sha256(x, y)[:8], device_of(model, x).type
    tf32 = torch.backends.cudnn.allow_tf32 and device == "cuda"
    arithmetic = "" if device == "cpu" else f"_{device}_{'tf32' if tf32 else 'fp32'}"
    return f"epsilon{epsilon:.6f}_seed{seed}_batch{batch}_network{network}_images{images}{arithmetic}"


def per_class(flags: str, y: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the accuracy of every class, worst first: ``class``, ``accuracy``, ``interval``, ``examples``.

    Args:
        flags: one character per image, as in ``accuracy_curve``.
        names: one per label.
    """
    by_class: dict[int, str] = {}
    for flag, label in zip(flags, y.tolist(), strict=True):
        by_class[label] = by_class.get(label, "") + flag
    rows = [{"class": names[label], **accuracy_of(each)} for label, each in sorted(by_class.items())]
    for row in rows:
        del row["flags"]
    return sorted(rows, key=lambda row: row["accuracy"])
