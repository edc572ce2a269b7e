"""Accuracy on clean images and under FGSM, PGD and C&W."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

import attacks
from experiment import UserError
from experiment.data import Data
from experiment.evaluation.batches import per_image

STEPS = {"pgd": 20, "cw": 30}
"""The usual number of steps of an attack that has steps; a step is epsilon / 4 (2/255 at 8/255)."""


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


def attack_of(name: str, model: nn.Module, epsilon: float, steps: int | None = None) -> Callable[..., Tensor]:
    """Return the attack (x, y) -> x_adv called `name`: fgsm, pgd or cw; clean and epsilon 0 return x.

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
    attack: Callable[[Tensor, Tensor], Tensor],
    *,
    batch: int = 512,
    seed: int | str = 0,
    keep: bool = False,
    progress: str | None = None,
) -> Attacked:
    """Attack every image and classify it.

    Args:
        attack: (x, y) -> x_adv on one batch.
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
    return _share(attacked(model, x, y, attack_of("clean", model, 0), batch=batch))


def fgsm_accuracy(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, batch: int = 512, seed: int = 0) -> float:
    """Compute the accuracy under FGSM without a random start (Goodfellow et al., ICLR 2015)."""
    return _share(attacked(model, x, y, attack_of("fgsm", model, epsilon), batch=batch, seed=seed))


def pgd_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, steps: int = 20, batch: int = 512, seed: int = 0
) -> float:
    """Compute the accuracy under PGD: uniform start, step epsilon / 4 (2/255 at 8/255); PGD-20 by default.

    Source: Madry et al., ICLR 2018, with the settings of the IGDM paper, section 5.
    """
    return _share(attacked(model, x, y, attack_of("pgd", model, epsilon, steps), batch=batch, seed=seed))


def cw_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, steps: int = 30, batch: int = 512, seed: int = 0
) -> float:
    """Compute the accuracy under the L-infinity C&W attack (margin loss, uniform start, step epsilon / 4)."""
    return _share(attacked(model, x, y, attack_of("cw", model, epsilon, steps), batch=batch, seed=seed))


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


def _share(found: Attacked) -> float:
    return int(found.correct.sum()) / len(found.correct)
