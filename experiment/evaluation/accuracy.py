"""Accuracy on clean images and under FGSM, PGD and C&W."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import attacks
from experiment import UserError
from experiment.data import Data
from experiment.evaluation.batches import sum_over_batches


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 512) -> float:
    """Accuracy on clean images."""
    return _accuracy(model, x, y, batch, 0, lambda clean, _: clean)


def fgsm_accuracy(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, batch: int = 512, seed: int = 0) -> float:
    """Accuracy under FGSM from x itself (Goodfellow et al., ICLR 2015)."""
    return _accuracy(model, x, y, batch, seed, lambda clean, labels: attacks.fgsm(model, clean, labels, epsilon))


def pgd_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, steps: int = 20, batch: int = 512, seed: int = 0
) -> float:
    """Accuracy under PGD: uniform start, step epsilon / 4 (2/255 at 8/255); PGD-20 by default.

    Source: Madry et al., ICLR 2018, at the setting of the IGDM paper, section 5.
    """
    return _accuracy(
        model, x, y, batch, seed, lambda clean, labels: attacks.pgd(model, clean, labels, epsilon, epsilon / 4, steps)
    )


def cw_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, steps: int = 30, batch: int = 512, seed: int = 0
) -> float:
    """Accuracy under the L-infinity C&W attack (margin loss, uniform start, step epsilon / 4)."""
    return _accuracy(
        model, x, y, batch, seed, lambda clean, labels: attacks.cw(model, clean, labels, epsilon, epsilon / 4, steps)
    )


def monitor(model: nn.Module, images: Data, epsilon: float) -> dict[str, float]:
    """What a run measures after an epoch, with seed 0 in every run: the same random starts for every network.

    Returns:
        ``clean`` and ``pgd20`` on the test images; where training images were held out, ``holdout_pgd10`` on these.
    """
    found = {
        "clean": accuracy(model, images.x_test, images.y_test),
        "pgd20": pgd_accuracy(model, images.x_test, images.y_test, epsilon),
    }
    if len(images.x_holdout):
        found["holdout_pgd10"] = pgd_accuracy(model, images.x_holdout, images.y_holdout, epsilon, steps=10)
    return found


def _accuracy(
    model: nn.Module, x: Tensor, y: Tensor, batch: int, seed: int, attack: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """Fraction of the images that the network classifies correctly after attack(x, y)."""

    def counts(clean: Tensor, labels: Tensor) -> Tensor:
        logits = model(attack(clean, labels))
        return torch.stack([(logits.argmax(dim=1) == labels).sum(), (~logits.isfinite()).any(dim=1).sum()])

    # One transfer at the end: a count read batch by batch would make the host wait for the device.
    correct, not_finite = sum_over_batches(counts, x, y, batch, seed, model).tolist()
    if not_finite:
        raise UserError(f"the network gives NaN or infinite logits on {not_finite:.0f} of {len(x)} images; no accuracy")
    return correct / len(x)
