"""What each way to save work is worth: the product's step without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from experiment.engine import Accelerated

if TYPE_CHECKING:
    from benchmarks.training_step import ProductStep


def without_folding(fast: Accelerated) -> None:
    """Run the network itself, frozen, where the folded view would run."""
    fast.view = None


def without_channels_last(fast: Accelerated) -> None:
    """Weights, and with them activations, in contiguous NCHW layout."""
    fast.model.to(memory_format=torch.contiguous_format)
    for layer in fast.view._layers if fast.view else ():
        layer.weight = layer.weight.contiguous()


def without_reuse(fast: Accelerated) -> None:
    """Run every pass that the script writes, also one of a tensor that this step has run before."""
    fast.step = contextlib.nullcontext


def without_any(fast: Accelerated) -> None:
    """The script's step as plain PyTorch: frozen networks and a clean pass without gradient are all that is left."""
    for take_away in (without_channels_last, without_folding, without_reuse):
        take_away(fast)


def without_graph(step: ProductStep) -> None:
    """Launch each kernel of an attack step from the host; changes nothing where the engine captures no graph."""
    step.engine._attack_step = None


def each(change: Callable[[Accelerated], None]) -> Callable[[ProductStep], None]:
    """The change made to student and teacher."""

    def both(step: ProductStep) -> None:
        for fast in (step.fast_student, step.fast_teacher):
            change(fast)

    return both


TRICKS: dict[str, Callable[[ProductStep], None]] = {
    "product": lambda step: None,
    "without CUDA graph": without_graph,
    "without folding BatchNorm": each(without_folding),
    "without channels_last": each(without_channels_last),
    "without reuse of passes": each(without_reuse),
    "without all three": each(without_any),
}
"""Name and what is done to a finished step. "All three" are the last three before it: without folding, no graph."""
