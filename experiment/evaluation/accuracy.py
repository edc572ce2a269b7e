"""Accuracy on clean images and under an attack, over several epsilons, and by class; torchattacks beside ours."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attacks
from experiment import UserError
from experiment.data import Data
from experiment.evaluation.autoattack import autoattack, data_sha256
from experiment.evaluation.batches import accuracy_of, device_of, flags_text, per_image
from experiment.files import state_sha256

STEPS = {"pgd": 20, "cw": 30}
"""The usual number of steps of an attack that has steps; a step is epsilon / 4 (2/255 at 8/255)."""

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, x, y) -> x_adv on one batch."""


def attack_of(name: str, epsilon: float, steps: int | None = None) -> Attack:
    """Return the attack called `name`: fgsm, pgd or cw, by default with `STEPS`; clean and epsilon 0 return x."""
    steps = steps or STEPS.get(name)
    if name == "clean" or epsilon == 0:
        return lambda model, x, y: x
    if name == "fgsm":
        return lambda model, x, y: attacks.fgsm(model, x, y, epsilon)
    with_steps = {"pgd": attacks.pgd, "cw": attacks.cw}[name]
    return lambda model, x, y: with_steps(model, x, y, epsilon, epsilon / 4, steps)


def attacked(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    batch: int = 512,
    seed: int | str = 0,
    keep: bool = False,
    progress: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return predictions under an attack, (N,), and with `keep` the attacked images in float32; both on the CPU."""

    def classify(x_batch: Tensor, y_batch: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
        x_adv = attack(model, x_batch, y_batch)
        logits = model(x_adv)
        kept = (x_adv.float().cpu(),) if keep else ()
        return logits.argmax(dim=1), logits.isfinite().all(dim=1), *kept

    predictions, finite, *x_adv = per_image(classify, x, y, batch, seed, model, progress=progress)
    if not finite.all():
        raise UserError(f"the network returns NaN or infinite logits on {(~finite).sum()} of {len(x)} images")
    return predictions, x_adv[0] if keep else None


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 512) -> float:
    """Compute the accuracy on clean images."""
    return pgd_accuracy(model, x, y, 0, batch=batch)


def pgd_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, steps: int = 20, batch: int = 512, seed: int = 0
) -> float:
    """Compute the accuracy under PGD: uniform start, step epsilon / 4 (2/255 at 8/255); PGD-20 by default.

    Source: Madry et al., ICLR 2018, with the settings of the IGDM paper, section 5.
    """
    predictions, _ = attacked(model, x, y, attack_of("pgd", epsilon, steps), batch=batch, seed=seed)
    return int((predictions == y.cpu()).sum()) / len(y)


MONITOR_PASSES = 42
"""Passes of `monitor` per image, a forward and a backward counted once each: 1 on clean images and 41 of PGD-20."""


def monitor(model: nn.Module, images: Data, epsilon: float) -> dict[str, float]:
    """Compute the accuracies that a run records after an epoch, with seed 0: the same random starts in every run.

    Returns:
        ``clean`` and ``pgd20`` on the test images; with held-out training images also ``holdout_pgd10``.
    """
    found = {
        "clean": accuracy(model, images.x_test, images.y_test),
        "pgd20": pgd_accuracy(model, images.x_test, images.y_test, epsilon),
    }
    if len(images.x_holdout):
        found["holdout_pgd10"] = pgd_accuracy(model, images.x_holdout, images.y_holdout, epsilon, steps=10)
    return found


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
) -> tuple[list[dict[str, Any]], Tensor, Tensor | None]:
    """Compute accuracy under fgsm, pgd or cw, or on clean images, at each epsilon from the smallest to the largest.

    The smallest epsilon is measured on all images; each larger one on the images that are still robust.

    Args:
        steps: of pgd and cw; by default 20 and 30.
        restarts: random starts of pgd and cw; an image is robust if it is correctly classified under all of them. The
            first is that of ``pgd_accuracy`` with the same seed.
        keep: also return the attacked images of the last epsilon, or the first misclassified ones.

    Returns:
        One point per epsilon (plain types): ``epsilon``, ``accuracy``, ``interval``, ``examples``, ``flags``,
        ``attacked`` (images in each restart), ``steps``; predictions and attacked images at the last epsilon, as from
        ``attacked``.
    """
    labels, predictions, x_adv, points = y.cpu(), y.cpu().clone(), None, []
    steps = (steps or STEPS[attack]) if attack in STEPS else None
    for epsilon in sorted(set(epsilons)):
        counts = []
        for restart in range(restarts if attack in STEPS and epsilon > 0 else 1):
            index = (predictions == labels).nonzero().squeeze(1)
            counts.append(len(index))
            if len(index) == 0:
                continue
            predictions[index], latest = attacked(
                model,
                x[index.to(x.device)],
                y[index.to(y.device)],
                attack_of(attack, epsilon, steps),
                seed=f"{seed} restart {restart}" if restart else seed,
                keep=keep,
                progress=f"{attack}, epsilon {epsilon:.4f}",
            )
            if x_adv is None:
                x_adv = latest
            else:
                x_adv[index] = latest
        flags = flags_text(predictions == labels)
        points.append({"epsilon": epsilon, **accuracy_of(flags), "flags": flags, "attacked": counts, "steps": steps})
    return points, predictions, x_adv


def autoattack_curve(
    model: nn.Module, x: Tensor, y: Tensor, epsilons: Sequence[float], *, folder: Path, batch: int = 250, seed: int = 0
) -> list[dict[str, Any]]:
    """Compute accuracy under AutoAttack at each epsilon, as ``accuracy_curve`` does; batch and seed: ``autoattack``.

    Args:
        folder: contains a folder of chunks for each epsilon, named after everything that its result depends on;
            existing chunks are read.

    Returns:
        Points as in ``accuracy_curve``; for an epsilon above 0 also ``result``, the return value of ``autoattack`` on
        the images that were still robust.
    """
    robust, points, device = torch.ones(len(y), dtype=torch.bool), [], device_of(model, x).type
    arithmetic = f"_{device}_{'tf32' if torch.backends.cudnn.allow_tf32 else 'fp32'}" if device != "cpu" else ""
    for epsilon in sorted(set(epsilons)):
        index, result = robust.nonzero().squeeze(1), None
        x_left, y_left = x[index.to(x.device)], y[index.to(y.device)]
        if len(index) and epsilon == 0:
            robust = attacked(model, x_left, y_left, attack_of("clean", 0))[0] == y_left.cpu()
        elif len(index):
            network, images = state_sha256(model)[:8], data_sha256(x_left, y_left)[:8]
            name = f"epsilon{epsilon:.6f}_seed{seed}_batch{batch}_network{network}_images{images}{arithmetic}"
            result = autoattack(model, x_left, y_left, epsilon, folder=folder / name, batch=batch, seed=seed)
            robust[index] = torch.tensor([flag == "1" for flag in result["flags"]["square"]])
        point = {"epsilon": epsilon, "flags": flags_text(robust), "attacked": [len(index)], "result": result}
        points.append({**point, **accuracy_of(point["flags"])})
    return points


def per_class(flags: str, y: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the accuracy of every class, worst first: ``class``, ``accuracy``, ``interval``, ``examples``.

    Args:
        flags: one character per image, as in ``accuracy_curve``.
        names: one per label.
    """
    rows, labels = [], y.tolist()
    for label in sorted(set(labels)):
        own = "".join(flag for flag, other in zip(flags, labels, strict=True) if other == label)
        rows.append({"class": names[label], **accuracy_of(own)})
    return sorted(rows, key=lambda row: row["accuracy"])


def beside_torchattacks(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, steps: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Compute accuracy under our FGSM and PGD and torchattacks', with equal budget, step size and steps.

    torchattacks' C&W minimises an L2 distance and has no L-infinity budget, and its AutoAttack is not the standard
    version, so neither is compared.

    Returns:
        A row per attack: ``attack``, ``steps`` (None for FGSM), ``epsilon``, ``ours``, ``torchattacks`` (fractions),
        ``only_ours`` and ``only_theirs`` (images misclassified under one of them only), and ``p`` (exact McNemar test
        of these two counts).
    """
    from scipy.stats import binomtest

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # requests 2.25.1, which torchattacks pins, warns about other packages
        import torchattacks

    steps = steps or STEPS["pgd"]
    their_attacks = {
        "fgsm": lambda model, x, y: torchattacks.FGSM(model, epsilon)(x, y),
        "pgd": lambda model, x, y: torchattacks.PGD(model, epsilon, epsilon / 4, steps)(x, y),
    }
    rows = []
    for name, their_attack in their_attacks.items():
        both = (attack_of(name, epsilon, steps), torch.enable_grad()(their_attack))
        options = {"seed": seed, "progress": f"{name}, ours and torchattacks'"}
        ours, theirs = (attacked(model, x, y, attack, **options)[0] == y.cpu() for attack in both)
        row = {"attack": name, "steps": steps if name == "pgd" else None, "epsilon": epsilon}
        row |= {"ours": ours.double().mean().item(), "torchattacks": theirs.double().mean().item()}
        row |= {"only_ours": int((theirs & ~ours).sum()), "only_theirs": int((ours & ~theirs).sum())}
        differing = row["only_ours"] + row["only_theirs"]
        rows.append({**row, "p": binomtest(row["only_ours"], differing).pvalue if differing else 1.0})
    return rows
