"""Batched evaluation: eval mode, frozen, float32, over all ranks, within the device's memory."""

import math
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import attacks
from experiment import UserError
from experiment.data import as_float
from experiment.entry import is_out_of_memory

Value = TypeVar("Value")
Batched = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""A function of a batch, (x, y) -> tensors (N, ...)."""


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gathered(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Return every rank's value.

    Raises:
        UserError: another rank is gone.
    """
    _, world = ranks()
    everyone = [value] * world
    if world > 1:
        try:
            dist.all_gather_object(everyone, value, group=group)
        except RuntimeError as error:  # a closed connection
            raise UserError("another rank stopped with an error") from error
    return everyone


def device_of(model: nn.Module, x: Tensor) -> torch.device:
    """Return the network's device, or x's if the network has no parameters."""
    return next((parameter.device for parameter in model.parameters()), x.device)


def as_pixels(x: Tensor) -> Tensor:
    """Convert images to float in [0, 1]."""
    return as_float(x) if x.dtype == torch.uint8 else x


def check_images(x: Tensor, y: Tensor) -> None:
    """Raise UserError unless x and y are as in the module's conventions."""
    if x.ndim != 4 or len(x) == 0 or y.shape != (len(x),):
        raise UserError(f"images {tuple(x.shape)} with labels {tuple(y.shape)}: expected (N, C, H, W) with (N,)")
    if x.dtype != torch.uint8:
        if not x.is_floating_point():
            raise UserError(f"images of type {x.dtype}: expected uint8, or float in [0, 1]")
        low, high = float(x.min()), float(x.max())
        if not (low >= 0 and high <= 1):  # also rejects NaN
            raise UserError(
                f"pixel values range from {low:g} to {high:g}; expected [0, 1]. Put normalisation inside the network."
            )
    if y.dtype != torch.int64 or int(y.min()) < 0:
        raise UserError(f"labels of type {y.dtype} from {y.min()}: expected int64 from 0")


def check_network(name: str, model: nn.Module, x: Tensor, num_classes: int) -> None:
    """Check that a network maps images like x, (N, C, H, W), to logits (N, num_classes).

    Raises:
        UserError: it fails on the first two images, stays in train mode, or returns something else.
    """
    x = x[:2]
    device = device_of(model, x)
    try:
        with measuring(device, model):
            logits = model(as_pixels(x.to(device)).float())
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        fault = f"{type(error).__name__}: {error}"
        raise UserError(f"network {name!r} fails on images {tuple(x.shape)}: {fault}") from error
    if not isinstance(logits, Tensor) or logits.shape != (len(x), num_classes):
        given = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"network {name!r} returns {given} for images {tuple(x.shape)}; expected logits {(len(x), num_classes)}"
        )


@contextmanager
def measuring(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Context for evaluation: eval mode, frozen, float32, no gradients, forked random generators; restored on exit.

    Raises:
        RuntimeError: a network left eval mode.
    """
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


def per_image(
    function: Batched,
    x: Tensor,
    y: Tensor,
    batch: int,
    seed: int | str,
    *models: nn.Module,
    progress: str | None = None,
) -> tuple[Tensor, ...]:
    """Apply function(x_batch, y_batch) to every batch, over all ranks, and concatenate its tensors (N, ...) on the CPU.

    Args:
        seed: seed of the random numbers of all batches.
        models: the networks that the function uses; the first one determines the device.
        progress: name of the progress bar on rank 0, or None.
    """
    from tqdm import tqdm

    check_images(x, y)
    device = device_of(models[0], x)
    rank, world = ranks()
    mine = range(rank, math.ceil(len(x) / batch), world)
    found, size = {}, min(batch, len(x))
    shown = progress is not None and rank == 0 and sys.stderr.isatty()
    total = sum(len(y[i * batch :][:batch]) for i in mine)
    with (
        measuring(device, *models),
        tqdm(total=total, unit="image", desc=progress, disable=not shown, dynamic_ncols=True, leave=False) as bar,
    ):
        for i in mine:
            # One random stream per batch, which does not depend on the rank. A hash, because neighbouring seeds would
            # share streams; 32 bits, because the CPU generator ignores higher ones.
            stream = zlib.crc32(f"{seed} {i}".encode())
            rows = slice(i * batch, (i + 1) * batch)
            part = partial(_in_parts, function, as_pixels(x[rows].to(device)), y[rows].to(device), stream)
            found[i], size = within_memory(part, size, "the evaluation")
            bar.update(len(y[rows]))
    if world > 1:
        on_cpu = {i: tuple(rows.cpu() for rows in each) for i, each in found.items()}
        found = {i: each for part in gathered(on_cpu) for i, each in part.items()}
    # One transfer at the end: transfers per batch would synchronise.
    return _joined([found[i] for i in sorted(found)], "cpu")


def _in_parts(function: Batched, x: Tensor, y: Tensor, stream: int, limit: int) -> tuple[Tensor, ...]:
    """Apply function(x, y) to at most `limit` images at once; each image keeps its random start."""
    parts = []
    for first in range(0, len(x), limit):
        torch.default_generator.manual_seed(stream)
        if x.device.type == "cuda":
            torch.cuda.manual_seed(stream)
        with attacks.shard_of(first, len(x)):
            parts.append(function(x[first : first + limit], y[first : first + limit]))
    return _joined(parts)


def _joined(parts: list[tuple[Tensor, ...]], device: str | None = None) -> tuple[Tensor, ...]:
    return tuple(torch.cat(column).to(device) for column in zip(*parts, strict=True))


def within_memory(attempt: Callable[[int], Value], limit: int, name: str) -> tuple[Value, int]:
    """Call attempt(limit), with half the limit of images at once until the device's memory suffices.

    Returns:
        The value, and the limit that sufficed.

    Raises:
        UserError: not even one image fits.
    """
    while True:
        try:
            return attempt(limit), limit
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if limit == 1:
                raise UserError(f"{name} does not fit in the device's memory, even with single images") from error
        # Outside the except clause: the exception's traceback would keep the tensors alive.
        torch.cuda.empty_cache()
        limit //= 2
        print(f"{name}: out of memory; again with {limit} images at once", file=sys.stderr, flush=True)


def flags_text(correct: Tensor) -> str:
    """Format (N,) bool as N characters, 1 for true, for JSON files."""
    return "".join("01"[flag] for flag in correct.tolist())


def accuracy_of(flags: str) -> dict[str, Any]:
    """Return ``accuracy``, its 95 % ``interval``, ``examples`` and ``flags`` of one character per image."""
    correct, examples = flags.count("1"), len(flags)
    interval = list(wilson_interval(correct, examples))
    return {"accuracy": correct / examples, "interval": interval, "examples": examples, "flags": flags}


def wilson_interval(correct: int, examples: int) -> tuple[float, float]:
    """95 % Wilson interval of an accuracy, for `correct` of `examples` images drawn at random.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    from scipy.stats import binomtest  # takes a second

    interval = binomtest(correct, examples).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
