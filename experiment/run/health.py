"""Signs that a network is worthless."""

from torch import Tensor

SETTLED_STEPS = 200
"""Optimizer steps after which a student that predicts one class only has collapsed; before, its BatchNorm statistics
may simply not have settled."""

PROBE_IMAGES = 256


def fault_of(logits: Tensor) -> str | None:
    """What makes logits (N, C) of different images worthless, or None."""
    if not logits.isfinite().all():
        return "not finite"
    # Equal up to some ten roundings: kernels may add up the first and the last rows of a batch in another order.
    spread = (logits.amax(dim=0) - logits.amin(dim=0)).max()
    return "the same for every image" if spread <= 1e-6 * logits.abs().max() else None
