"""Accuracy on clean images and under FGSM, PGD and C&W; the same attacks by torchattacks."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import attacks
from experiment import UserError
from experiment.data import Data
from experiment.evaluation.batches import flags_text, per_image

STEPS = {"pgd": 20, "cw": 30}
"""The usual number of steps of an attack that has steps; a step is epsilon / 4 (2/255 at 8/255)."""

Attack = Callable[[Tensor, Tensor], Tensor]
"""(x, y) -> x_adv on one batch."""


@dataclass(frozen=True)
class Attacked:
    """Predictions after an attack, (N, ...) on the CPU.

    Attributes:
        correct: bool, whether the attacked image is classified correctly.
        predictions: int64.
        x_adv: float32, the attacked images, or None if not kept.
    """

    correct: Tensor
    predictions: Tensor
    x_adv: Tensor | None


def attack_of(name: str, model: nn.Module, epsilon: float, steps: int | None = None) -> Attack:
    """Return the attack called `name`: fgsm, pgd or cw; clean and epsilon 0 return x.

    Args:
        steps: steps of pgd and cw; default `STEPS`.
    """
    steps = steps or STEPS.get(name)
    if name == "clean" or epsilon == 0:
        return lambda x, _: x
    if name == "fgsm":
        return lambda x, y: attacks.fgsm(model, x, y, epsilon)
    with_steps = {"pgd": attacks.pgd, "cw": attacks.cw}[name]
    return lambda x, y: with_steps(model, x, y, epsilon, epsilon / 4, steps)


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
) -> Attacked:
    """Attack every image and classify it.

    Args:
        seed: seed of random starts.
        keep: also return the attacked images.
        progress: name of the progress bar, or None.

    Raises:
        UserError: logits are not finite.
    """

    def classify(x_batch: Tensor, y_batch: Tensor) -> tuple[Tensor, ...]:
        x_adv = attack(x_batch, y_batch)
        logits = model(x_adv)
        kept = (x_adv.float().cpu(),) if keep else ()
        return logits.argmax(dim=1), logits.isfinite().all(dim=1), *kept

    predictions, finite, *x_adv = per_image(classify, x, y, batch, seed, model, progress=progress)
    if not finite.all():
        raise UserError(f"the network returns NaN or infinite logits on {(~finite).sum()} of {len(x)} images")
    return Attacked(predictions == y.cpu(), predictions, x_adv[0] if keep else None)


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 512) -> float:
    """Compute the accuracy on clean images."""
    return pgd_accuracy(model, x, y, 0, batch=batch)


def pgd_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, steps: int = 20, batch: int = 512, seed: int = 0
) -> float:
    """Compute the accuracy under PGD: uniform start, step epsilon / 4 (2/255 at 8/255); PGD-20 by default.

    Source: Madry et al., ICLR 2018, with the settings of the IGDM paper, section 5.
    """
    correct = attacked(model, x, y, attack_of("pgd", model, epsilon, steps), batch=batch, seed=seed).correct
    return int(correct.sum()) / len(correct)


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


def beside_torchattacks(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, steps: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Compute accuracy under our FGSM and PGD and torchattacks', with equal budget, step size and steps.

    torchattacks' C&W minimises an L2 distance and has no L-infinity budget, and its AutoAttack is not the standard
    version, so neither is compared.

    Returns:
        A row per attack: ``attack``, ``steps`` (None for FGSM), ``epsilon``, ``ours``, ``torchattacks`` (fractions),
        ``flags`` of both, ``only_ours`` and ``only_theirs`` (images misclassified under one of them only), ``p``
        (exact McNemar test of these two counts) and ``beyond_noise`` (p below 0.05).
    """
    from scipy.stats import binomtest

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # requests 2.25.1, which torchattacks pins, warns about other packages
        import torchattacks

    steps = steps or STEPS["pgd"]
    pgd = torchattacks.PGD(model, eps=epsilon, alpha=epsilon / 4, steps=steps, random_start=True)
    rows = []
    for name, attack in {"fgsm": torchattacks.FGSM(model, eps=epsilon), "pgd": pgd}.items():
        options = {"seed": seed, "progress": f"{name}, ours and torchattacks'"}
        ours = attacked(model, x, y, attack_of(name, model, epsilon, steps), **options).correct
        theirs = attacked(model, x, y, torch.enable_grad()(attack.__call__), **options).correct
        only_ours, only_theirs = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
        differing = only_ours + only_theirs
        p = float(binomtest(only_ours, differing).pvalue) if differing else 1.0  # McNemar's exact test
        rows.append(
            {
                "attack": name,
                "steps": steps if name == "pgd" else None,
                "epsilon": epsilon,
                "ours": ours.double().mean().item(),
                "torchattacks": theirs.double().mean().item(),
                "flags": {"ours": flags_text(ours), "torchattacks": flags_text(theirs)},
                "only_ours": only_ours,
                "only_theirs": only_theirs,
                "p": p,
                "beyond_noise": p < 0.05,
            }
        )
    return rows
