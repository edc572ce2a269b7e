"""Signs that a network is worthless: plain functions of networks, logits and losses."""

from pathlib import Path

import torch
from torch import Tensor, nn

from attacks import frozen
from experiment import RunStopped, data

SETTLED_STEPS = 200
"""Optimizer steps after which a student that predicts one class only has collapsed; before, its BatchNorm statistics
may simply not have settled."""

PROBE_IMAGES = 256
"""Images that a student is shown to see whether it has collapsed."""


def fault_of(logits: Tensor) -> str | None:
    """What makes logits (N, C) of different images worthless, or None."""
    if not logits.isfinite().all():
        return "not finite"
    # Equal up to some ten roundings: kernels may add up the first and the last rows of a batch in another order.
    spread = (logits.amax(dim=0) - logits.amin(dim=0)).max()
    return "the same for every image" if spread <= 1e-6 * logits.abs().max() else None


def predicts_one_class(logits: Tensor, y: Tensor) -> bool:
    """Whether logits (N, C) put every image into one class although their labels (N,) differ."""
    return len(y.unique()) > 1 and len(logits.argmax(dim=1).unique()) == 1


def collapse_of(student: nn.Module, images: data.Data, *, one_class: bool) -> str | None:
    """What says, on a sample of the test images, that the student tells no images apart any more, or None.

    Args:
        one_class: whether one class for all of them is such a sign.
    """
    sample = slice(None, None, -(-len(images.x_test) // PROBE_IMAGES))  # over the whole set
    with torch.no_grad(), frozen(student):
        logits = student(data.as_float(images.x_test[sample]))
    if fault := fault_of(logits):
        return f"the student's logits are {fault}"
    if one_class and predicts_one_class(logits, images.y_test[sample]):
        return (
            "the student predicts one class for every image (if the classes are so unequal that it may: "
            "--stop_on_collapse 0)"
        )
    return None


def earliest_bad_step(bad_step: Tensor, term: Tensor, step: int) -> Tensor:
    """`bad_step`, or `step` if that is earlier and the loss term is not finite; without waiting for the device."""
    return torch.minimum(bad_step, torch.where(term.isfinite(), torch.inf, float(step)))


def is_finite(model: nn.Module) -> bool:
    """Whether all weights and statistics are finite."""
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    # Sums hand on what is not finite; one transfer to the host.
    return bool(torch.stack([value.double().sum() for value in floats]).sum().isfinite())


def diverged(fact: str, means: dict[str, float], lr: float, saved: Path | None) -> RunStopped:
    """How a run ends that went wrong: what happened, the state of the losses, and what is left of it.

    Args:
        means: the epoch's means so far, loss terms as ``loss_<name>``.
        saved: the checkpoint from before it, if there is one.
    """
    terms = ", ".join(f"{name.removeprefix('loss_')} {value:g}" for name, value in means.items() if "loss_" in name)
    back = f"{saved} is from before it" if saved else "no checkpoint was written yet"
    return RunStopped(
        f"{fact} (means so far: {terms}; lr {lr:g}); nothing after it is saved, {back}; a smaller --lr, or --precision "
        "fp32, in a new run may help",
        RunStopped.DIVERGED,
    )
