"""Batched evaluation: eval mode, frozen, float32, over all ranks, within the device's memory."""

import math
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

import attacks
from experiment import UserError
from experiment.data import as_float
from experiment.entry import is_out_of_memory
from experiment.evaluation.ranks import ranks


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
        for model in models:
            assert_eval(model)


def assert_eval(model: nn.Module) -> None:
    """Raise RuntimeError if any submodule is in train mode."""
    if any(module.training for module in model.modules()):
        raise RuntimeError("the network switched to train mode during its evaluation")


def per_image(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
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
        progress: name of the progress bar, or None.
    """
    check_images(x, y)
    device = device_of(models[0], x)
    rank, world = ranks()
    mine = range(rank, math.ceil(len(x) / batch), world)
    found = {}
    with measuring(device, *models), progress_bar(progress, sum(len(y[i * batch :][:batch]) for i in mine)) as bar:
        for i in mine:
            # One random stream per batch, which does not depend on the rank. A hash, because neighbouring seeds would
            # share streams; 32 bits, because the CPU generator ignores higher ones.
            stream = zlib.crc32(f"{seed} {i}".encode())
            rows = slice(i * batch, (i + 1) * batch)
            x_here, y_here = as_pixels(x[rows].to(device)), y[rows].to(device)
            found[i] = _in_parts(function, x_here, y_here, stream, device)
            bar.update(len(x_here))
    if world > 1:
        everyone: list[dict[int, tuple[Tensor, ...]]] = [{}] * world
        dist.all_gather_object(everyone, {i: tuple(rows.cpu() for rows in each) for i, each in found.items()})
        found = {i: each for part in everyone for i, each in part.items()}
    # One transfer at the end: transfers per batch would synchronise.
    return _joined([found[i] for i in sorted(found)], "cpu")


def _in_parts(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], x: Tensor, y: Tensor, stream: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Apply function(x, y) in as many parts as the device's memory requires; each image keeps its random start."""
    size = len(x)
    while True:
        parts = []
        try:
            for first in range(0, len(x), size):
                torch.default_generator.manual_seed(stream)
                if device.type == "cuda":
                    torch.cuda.manual_seed(stream)
                with attacks.shard_of(first, len(x)):
                    parts.append(function(x[first : first + size], y[first : first + size]))
            return _joined(parts)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise UserError("evaluation does not fit in the device's memory, even with single images") from error
        # Outside the except clause: the exception's traceback would keep the tensors alive.
        torch.cuda.empty_cache()
        size = (size + 1) // 2


def _joined(parts: list[tuple[Tensor, ...]], device: str | None = None) -> tuple[Tensor, ...]:
    return tuple(torch.cat(column).to(device) for column in zip(*parts, strict=True))


if TYPE_CHECKING:
    from tqdm import tqdm


@contextmanager
def progress_bar(name: str | None, images: int) -> Iterator["tqdm"]:
    """Show a bar on rank 0; nothing without a name, or if stderr is not a terminal."""
    from tqdm import tqdm

    shown = name is not None and ranks()[0] == 0 and sys.stderr.isatty()
    with tqdm(total=images, unit="image", desc=name, disable=not shown, dynamic_ncols=True, leave=False) as bar:
        yield bar


def flags_text(correct: Tensor) -> str:
    """Format (N,) bool as N characters, 1 for true, for JSON files."""
    return "".join("01"[flag] for flag in correct.tolist())


def wilson_interval(correct: int, examples: int) -> tuple[float, float]:
    """95 % Wilson interval of an accuracy, for `correct` of `examples` images drawn at random.

    Unlike the normal approximation it stays within [0, 1] and has a positive width at 0 and 1.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    z = 1.959964
    share, scale = correct / examples, 1 + z**2 / examples
    middle = (share + z**2 / (2 * examples)) / scale
    half = z * math.sqrt(share * (1 - share) / examples + z**2 / (4 * examples**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)
