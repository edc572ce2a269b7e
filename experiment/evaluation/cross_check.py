"""Comparison with torchattacks: the same attacks at equal settings, from another implementation."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiment.evaluation.accuracy import STEPS, attack_of, attacked
from experiment.evaluation.batches import flags_text


def beside_torchattacks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Accuracy under FGSM and PGD, ours and torchattacks', on the same images with the same budget, step and steps.

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
    theirs = {"fgsm": torchattacks.FGSM(model, eps=epsilon), "pgd": pgd}
    rows = []
    for name, attack in theirs.items():

        def run(x_batch: Tensor, y_batch: Tensor, attack: Callable[..., Tensor] = attack) -> Tensor:
            with torch.enable_grad():
                return attack(x_batch, y_batch)

        bar = f"{name}, ours and torchattacks'" if progress else None
        ours = attacked(model, x, y, attack_of(name, model, epsilon, steps), seed=seed, progress=bar).correct
        other = attacked(model, x, y, run, seed=seed, progress=bar).correct
        only_ours, only_theirs = int((other & ~ours).sum()), int((ours & ~other).sum())
        apart = only_ours + only_theirs
        p = binomtest(only_ours, apart).pvalue if apart else 1.0  # McNemar's exact test
        rows.append(
            {
                "attack": name,
                "steps": steps if name == "pgd" else None,
                "epsilon": epsilon,
                "ours": ours.double().mean().item(),
                "torchattacks": other.double().mean().item(),
                "flags": {"ours": flags_text(ours), "torchattacks": flags_text(other)},
                "only_ours": only_ours,
                "only_theirs": only_theirs,
                "p": p,
                "beyond_noise": p < 0.05,
            }
        )
    return rows
