"""Batched evaluation: eval mode, frozen, float32, over all ranks, within the device's memory."""

import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

import attacks
from experiment import UserError
from experiment.data import as_float
from experiment.engine import gathered, ranks
from experiment.entry import is_out_of_memory

Value = TypeVar("Value")


def device_of(model: nn.Module, x: Tensor) -> torch.device:
    """Return the network's device, or x's if the network has no parameters."""
    return next((parameter.device for parameter in model.parameters()), x.device)


def check_images(x: Tensor, y: Tensor) -> None:
    """Raise UserError unless x is (N, C, H, W), uint8 or in [0, 1], and y is (N,)."""
    if x.ndim != 4 or len(x) == 0 or y.shape != (len(x),):
        raise UserError(f"images {tuple(x.shape)} with labels {tuple(y.shape)}: expected (N, C, H, W) with (N,)")
    low, high = float(x.min()), float(x.max())
    if x.dtype != torch.uint8 and not 0 <= low <= high <= 1:  # NaN is in no range
        raise UserError(
            f"pixel values range from {low:g} to {high:g}; expected [0, 1]. Put normalisation inside the network."
        )


def check_network(name: str, model: nn.Module, x: Tensor, num_classes: int) -> None:
    """Check that a network maps images like x, (N, C, H, W), to logits (N, num_classes).

    Raises:
        UserError: it fails on the first two images, stays in train mode, or returns something else.
    """
    x = x[:2]
    device = device_of(model, x)
    try:
        with measuring(device, model):
            logits = model(as_float(x.to(device)).float())
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        fault = f"{type(error).__name__}: {error}"
        raise UserError(f"network {name!r} fails on images {tuple(x.shape)}: {fault}") from error
    given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if given != (len(x), num_classes):
        expected = f"expected logits {(len(x), num_classes)}"
        raise UserError(f"network {name!r} returns {given} for images {tuple(x.shape)}; {expected}")


@contextmanager
def measuring(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Context for evaluation: eval mode, frozen, float32, no gradients, forked random generators; restored on exit."""
    cuda = device.type == "cuda"
    with (
        attacks.frozen(*models),
        torch.random.fork_rng([device] if cuda else []),
        torch.cuda.device(device) if cuda else nullcontext(),  # AutoAttack seeds the current device only
        torch.autocast(device.type, enabled=False),
        torch.no_grad(),
    ):
        yield
        if any(module.training for model in models for module in model.modules()):
            raise RuntimeError("the network switched to train mode during its evaluation")


class InParts(nn.Module):
    """A network that processes at most `limit` images at once; parts are recomputed for the gradient.

    Memory then limits how many images are processed together, but not how many are attacked together.
    """

    def __init__(self, model: nn.Module, limit: int) -> None:
        super().__init__()
        self.model, self.limit = model, limit

    def forward(self, x: Tensor) -> Tensor:
        if len(x) <= self.limit:
            return self.model(x)
        # Parts keep no activations for the backward pass. An eval-mode pass draws no random numbers.
        part = partial(recomputed, self.model, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([part(images) for images in x.split(self.limit)])


def within_memory(attempt: Callable[[], Value], models: Sequence[InParts], name: str) -> Value:
    """Call attempt(); while the device's memory does not suffice, halve the limit of the models and call it again."""
    while True:
        try:
            return attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if models[0].limit == 1:
                raise UserError(f"{name} does not fit in the device's memory, even with single images") from error
        # Outside the except clause: the exception's traceback would keep the tensors alive.
        torch.cuda.empty_cache()
        for model in models:
            model.limit //= 2
        print(f"{name}: out of memory; again with {models[0].limit} images at once", file=sys.stderr, flush=True)


def per_image(
    function: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    y: Tensor,
    batch: int,
    seed: int | str,
    *models: nn.Module,
    progress: str | None = None,
) -> tuple[Tensor, ...]:
    """Apply function(x, y, *models) to every batch, over all ranks, and concatenate its tensors (N, ...) on the CPU.

    Args:
        seed: seed of the random numbers of all batches.
        models: networks; the function gets them within the device's memory, and must use no others.
        progress: name of the progress bar on rank 0, or None.
    """
    from tqdm import tqdm

    check_images(x, y)
    device, (rank, world) = device_of(models[0], x), ranks()
    in_parts = [InParts(model, min(batch, len(x))) for model in models]
    hidden, found = progress is None or rank > 0 or not sys.stderr.isatty(), {}
    mine = range(rank, math.ceil(len(x) / batch), world)

    def attempt(stream: int, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(stream)
        return function(x, y, *in_parts)

    with measuring(device, *in_parts):
        for i in tqdm(mine, unit="batch", desc=progress, disable=hidden, dynamic_ncols=True, leave=False):
            rows = slice(i * batch, (i + 1) * batch)
            x_batch, y_batch = as_float(x[rows].to(device)), y[rows].to(device)
            # One random stream per batch, which does not depend on the rank. A hash, because neighbouring seeds would
            # share streams; 32 bits, because the CPU generator ignores higher ones.
            stream = zlib.crc32(f"{seed} {i}".encode())
            found[i] = within_memory(partial(attempt, stream, x_batch, y_batch), in_parts, "the evaluation")
    # After the last batch, because transfers synchronise.
    on_cpu = {i: tuple(tensor.cpu() for tensor in tensors) for i, tensors in found.items()}
    merged = {i: tensors for part in gathered(on_cpu) for i, tensors in part.items()}
    return tuple(map(torch.cat, zip(*(merged[i] for i in sorted(merged)), strict=True)))


def flags_text(correct: Tensor) -> str:
    """Format (N,) bool as N characters, 1 for true, for JSON files."""
    return "".join("01"[flag] for flag in correct.tolist())


def accuracy_of(flags: str) -> dict[str, Any]:
    """Return ``accuracy``, its 95 % ``interval`` and ``examples`` of flags, one character per image."""
    correct, examples = flags.count("1"), len(flags)
    return {"accuracy": correct / examples, "interval": [*wilson_interval(correct, examples)], "examples": examples}


def wilson_interval(correct: int, examples: int) -> tuple[float, float]:
    """95 % Wilson interval of an accuracy, for `correct` of `examples` images drawn at random.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    from scipy.stats import binomtest  # takes a second

    interval = binomtest(correct, examples).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
