"""The four attacks of AutoAttack on one chunk of images, within the device's memory, and held to what they claim."""

import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from experiment import UserError
from experiment.compat import import_autoattack
from experiment.entry import is_out_of_memory
from experiment.evaluation.autoattack_files import AUTOATTACK
from experiment.evaluation.autoattack_progress import AutoAttackProgress
from experiment.evaluation.batches import assert_eval
from experiment.evaluation.flags import flags_text

# APGD clamps to float32(x - eps) and float32(x + eps), each off by at most 2^-24 for pixels in [0, 1], and epsilon
# itself is rounded: 1e-6 is ten times what rounding can add, and 1/30,000 of a budget of 8/255.
_BALL_TOLERANCE = 1e-6


@contextmanager
def attack_switches() -> Iterator[None]:
    """What AutoAttack needs of torch's switches, restored on exit.

    cudnn.benchmark off: Square's batch shrinks with every image that falls, and each new size would be tuned anew.
    Deterministic algorithms where there are any: FAB's cumulative sum has none on CUDA, and would raise.
    """
    benchmark, strict = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.backends.cudnn.benchmark = False
    try:
        with warnings.catch_warnings():
            if strict:
                torch.use_deterministic_algorithms(True, warn_only=True)
                warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if strict:
            torch.use_deterministic_algorithms(True, warn_only=warn_only)


class FewAtOnce(nn.Module):
    """A network that sees at most `limit` images at once: in further parts, each run again for its gradient.

    So memory decides how many images are computed together, and not how many are attacked together.
    """

    def __init__(self, model: nn.Module, limit: int) -> None:
        super().__init__()
        self.model, self.limit = model, limit

    def forward(self, x: Tensor) -> Tensor:
        if len(x) <= self.limit:
            return self.model(x)
        parts = x.split(self.limit)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return torch.cat([self.model(part) for part in parts])
        # A part keeps no activations for the backward pass; an eval-mode pass without them draws no random numbers.
        again = partial(recomputed, self.model, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(part) for part in parts])


def attack_chunk(
    model: FewAtOnce, x: Tensor, y: Tensor, epsilon: float, seed: int, progress: AutoAttackProgress
) -> dict[str, Any]:
    """Run the four attacks on one chunk, each on the images still robust; flags and seconds.

    One attack at a time is the package's standard run, bit for bit: it reseeds before every batch of every attack,
    and gives each attack the images still robust (a test holds this). Done here, because it shows progress, and lets
    one attack be repeated with less memory.
    """
    AutoAttack = import_autoattack()

    def correct(images: Tensor, labels: Tensor) -> Tensor:
        logits = model(images)
        if not logits.isfinite().all():
            raise UserError("the network gives NaN or infinite logits; AutoAttack would report nonsense")
        return logits.argmax(dim=1) == labels

    def attack(name: str, images: Tensor, labels: Tensor) -> Tensor:
        # Another batch size may take other kernels, whose rounding moves an image across a boundary that it all but
        # touches. What is wrong in this batch has fallen; the package would leave it out of its batch, too.
        stand = correct(images, labels)
        if not stand.all():
            left = stand.nonzero().squeeze(1)
            if len(left):
                stand[left] = attack(name, images[left], labels[left])
            return stand
        adversary = AutoAttack(model, norm="Linf", eps=epsilon, seed=seed, version="standard", device=images.device)
        adversary.attacks_to_run = [name]
        x_adv, y_adv = adversary.run_standard_evaluation(images, labels, batch_size=len(images))
        assert_eval(model)
        _check_adversarial(x_adv, images, epsilon, name)
        # In the batch that the package used: FAB's images lie on the decision boundary.
        withstood = correct(x_adv, labels)
        if not torch.equal(withstood, y_adv == labels):
            differing = int((withstood != (y_adv == labels)).sum())
            raise RuntimeError(
                f"{name}: the accuracy recomputed from the adversarial images differs from AutoAttack's on {differing} "
                f"of {len(labels)} images: the network is random, or not in the state in which it was attacked"
            )
        return withstood

    robust = _within_memory(partial(correct, x, y), len(x), model, "clean pass", progress)
    record: dict[str, Any] = {"images": len(x), "flags": {"clean": flags_text(robust)}, "seconds": {}}
    with _package_warnings() as found:
        for name in AUTOATTACK:
            started = time.perf_counter()
            index = robust.nonzero().squeeze(1)
            if len(index):
                progress.begin(name, record)
                attempt = partial(attack, name, x[index], y[index])
                robust[index] = _within_memory(attempt, len(index), model, name, progress)
            record["flags"][name] = flags_text(robust)
            record["seconds"][name] = time.perf_counter() - started
    record["warnings"] = sorted(set(found))
    return record


def _within_memory(
    attempt: Callable[[], Tensor], images: int, model: FewAtOnce, what: str, progress: AutoAttackProgress
) -> Tensor:
    """attempt() on so many images, repeated with half as many at once until they fit into the device's memory."""
    while True:
        tried = min(images, model.limit)
        try:
            return attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if tried == 1:
                raise UserError(
                    f"AutoAttack ({what}) does not fit into the device's memory, even one by one"
                ) from error
        # Outside the except clause: the exception's traceback would keep the tensors alive.
        torch.cuda.empty_cache()
        model.limit = tried // 2
        progress.say(f"AutoAttack {what}: out of memory with {tried} images at once; again with {model.limit}")


def _check_adversarial(x_adv: Tensor, x: Tensor, epsilon: float, name: str) -> None:
    """Raise RuntimeError unless every pixel is within epsilon of x's and in [0, 1] (NaN is neither)."""
    delta = (x_adv - x).abs()
    if not (delta <= epsilon + _BALL_TOLERANCE).all():
        raise RuntimeError(f"{name} left the ball: a pixel moved by {delta.max():.8f}, epsilon is {epsilon:.8f}")
    if not ((x_adv >= 0) & (x_adv <= 1)).all():
        raise RuntimeError(f"{name} left [0, 1]: pixels from {x_adv.min():.8f} to {x_adv.max():.8f}")


@contextmanager
def _package_warnings() -> Iterator[list[str]]:
    """Collect the package's warnings (zero gradients, randomised network, ...) instead of printing them each time."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            # The number of points differs from call to call: without it, equal warnings are equal.
            message = re.sub(r"^there are \d+ points", "there are points", record.getMessage())
            found.append(message.removesuffix(" See flags_doc.md for details."))

    logger, collector = logging.getLogger("auto-attack"), Collector(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(collector)
    try:
        yield found
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagate
