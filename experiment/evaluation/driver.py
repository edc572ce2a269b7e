"""AutoAttack, standard version, by the package of its authors, in chunks that resume."""

import logging
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from experiment import UserError
from experiment.compat import import_autoattack
from experiment.entry import is_out_of_memory
from experiment.evaluation.batches import as_pixels, assert_eval, check_images, device_of, measuring, ranks
from experiment.evaluation.chunks import AUTOATTACK, chunk_file, data_sha256, finished_chunks, write_chunk
from experiment.evaluation.display import Display
from experiment.evaluation.flags import flags_text, wilson_interval
from experiment.files import state_sha256

# APGD clamps to float32(x - eps) and float32(x + eps), each off by at most 2^-24 for pixels in [0, 1], and epsilon
# itself is rounded: 1e-6 is ten times what rounding can add, and 1/30,000 of a budget of 8/255.
_BALL_TOLERANCE = 1e-6

# The AutoAttack authors warn when Square breaks more than 0.2 % of the images after the white-box attacks; a single
# image is not called a pattern, so that a sample of a few hundred does not ring by chance.
_SQUARE_SHARE = 0.002


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    folder: Path | None = None,
    batch: int = 250,
    seed: int = 0,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Accuracy under AutoAttack, standard version, by the package of its authors.

    The images are attacked in fixed chunks of `batch`, so that the result does not depend on where a run was
    interrupted. A finished chunk is a file in `folder`; it is read instead of attacked again. Out of CUDA memory, the
    network is run on half as many images at once from then on, and the attack at hand is repeated: with the same random
    numbers, so that the result does not depend on the memory either, but for the rounding of other kernels.

    Args:
        folder: where the chunk files are, on a file system that all ranks share; None keeps nothing and cannot resume.
        batch: images per chunk. Random starts are drawn per chunk, so it belongs to the result as the seed does.
        show_progress: a progress bar, and lines about what is done, on stderr.

    Returns:
        Plain types for result.json: ``accuracy`` (robust fraction) with its 95 % ``interval``, ``clean``, ``examples``,
        ``epsilon``, ``seed``, ``batch``, ``version``, ``package``, ``attacks`` (robust fraction after each attack),
        ``flags`` (for "clean" and each attack one character per image, in order: 1 if it is classified correctly
        after this attack and those before, else 0), ``seconds`` and
        ``attack_seconds`` (summed over chunks, whenever and on whichever rank they were attacked),
        ``student_sha256``, ``warnings`` (signs of gradient masking).

    Raises:
        UserError: fewer than 10 classes; epsilon, x or y out of range; parameters not float32; a chunk file of
            another student, setting or data, or a damaged one; no memory even for one image.
        RuntimeError: an adversarial image outside the epsilon-ball or [0, 1], or an accuracy that its recomputation
            does not confirm: the number would be worth nothing.

    Source: Croce & Hein, ICML 2020.
    """
    device = device_of(model, x)
    check_images(x, y)
    if not 0 < epsilon <= 1:
        raise UserError(f"epsilon {epsilon:g} is not allowed for AutoAttack; above 0 and up to 1")
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise UserError("AutoAttack needs a network with float32 parameters")
    with measuring(device, model):
        classes = model(as_pixels(x[:1].to(device)).float()).shape[1]
    if classes < 10:
        raise UserError(
            f"AutoAttack, standard version, needs at least 10 classes (9 targets); the network has {classes}"
        )
    if int(y.max()) >= classes:
        raise UserError(f"label {int(y.max())} is not allowed; the network has {classes} classes")
    rank, world = ranks()
    if world > 1 and folder is None:
        raise UserError("AutoAttack on several ranks needs a folder for its chunk files")

    run = {
        # torch.compile's wrapper prefixes every name; the weights are those of the module inside.
        "student": state_sha256(getattr(model, "_orig_mod", model)),
        "epsilon": epsilon,
        "seed": seed,
        "version": "standard",
        "chunk size": batch,
        "package": f"pyautoattack {version('pyautoattack')}",
    }
    chunks = [slice(first, min(first + batch, len(x))) for first in range(0, len(x), batch)]
    parts = [{**run, "chunk": i, "data": data_sha256(x[chunk], y[chunk])} for i, chunk in enumerate(chunks)]
    records = dict(finished_chunks(folder, parts))
    if world > 1:
        dist.barrier()  # every rank has seen the same files before any rank adds one
    todo = [i for i in range(len(chunks)) if i not in records][rank::world]
    show_progress = show_progress and rank == 0
    display = Display(records.values(), [len(y[chunks[i]]) for i in todo], show_progress)
    display.say(
        f"AutoAttack standard on {len(x)} images: epsilon {epsilon:.6f}, seed {seed}, chunks of {batch}, "
        f"{run['package']}; {len(records)} of {len(chunks)} chunks were done before"
    )
    older = sum(folder is not None and chunk_file(folder, i).exists() for i in todo)
    if older:
        display.say(f"{older} chunks are of an older format without a flag per image: they are attacked again")
    fitting = _FewAtOnce(model, batch)
    try:
        for i in todo:
            images, labels = as_pixels(x[chunks[i]].to(device)).float(), y[chunks[i]].to(device)
            with measuring(device, fitting), _attack_switches():
                records[i] = _attack_chunk(fitting, images, labels, epsilon, seed, display)
            if folder is not None:
                write_chunk(chunk_file(folder, i), parts[i], records[i])
            display.finish(records[i])
    finally:
        display.close()
    if world > 1:
        dist.barrier()
        records = dict(finished_chunks(folder, parts))

    result = _merge([records[i] for i in range(len(chunks))], len(x))
    for warning in result["warnings"]:
        display.say(f"warning: AutoAttack: {warning}")
    settings = {"epsilon": epsilon, "seed": seed, "batch": batch, "version": "standard", "package": run["package"]}
    return {**settings, **result, "student_sha256": run["student"]}


@contextmanager
def _attack_switches() -> Iterator[None]:
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


class _FewAtOnce(nn.Module):
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


def _attack_chunk(
    model: _FewAtOnce, x: Tensor, y: Tensor, epsilon: float, seed: int, display: "Display"
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
        adversary = AutoAttack(model, norm="Linf", eps=epsilon, seed=seed, version="standard", device=images.device)
        adversary.attacks_to_run = [name]
        x_adv, y_adv = adversary.run_standard_evaluation(images, labels, batch_size=len(images))
        assert_eval(model)
        _check_adversarial(x_adv, images, epsilon, name)
        # In the batch that the package used: another batch size may take other kernels, whose rounding moves
        # FAB's images, which lie on the decision boundary, across it.
        withstood = correct(x_adv, labels)
        if not torch.equal(withstood, y_adv == labels):
            differing = int((withstood != (y_adv == labels)).sum())
            raise RuntimeError(
                f"{name}: the accuracy recomputed from the adversarial images differs from AutoAttack's on {differing} "
                f"of {len(labels)} images: the network is random, or not in the state in which it was attacked"
            )
        return withstood

    robust = _within_memory(partial(correct, x, y), len(x), model, "clean pass", display)
    record: dict[str, Any] = {"images": len(x), "flags": {"clean": flags_text(robust)}, "seconds": {}}
    with _package_warnings() as found:
        for name in AUTOATTACK:
            started = time.perf_counter()
            index = robust.nonzero().squeeze(1)
            if len(index):
                display.begin(name, record)
                attempt = partial(attack, name, x[index], y[index])
                robust[index] = _within_memory(attempt, len(index), model, name, display)
            record["flags"][name] = flags_text(robust)
            record["seconds"][name] = time.perf_counter() - started
    record["warnings"] = sorted(set(found))
    return record


def _within_memory(
    attempt: Callable[[], Tensor], images: int, model: _FewAtOnce, what: str, display: "Display"
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
        display.say(f"AutoAttack {what}: out of memory with {tried} images at once; again with {model.limit}")


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


def _merge(records: list[dict[str, Any]], examples: int) -> dict[str, Any]:
    """Join the chunks; look for gradient masking over all of them."""
    flags = {name: "".join(record["flags"][name] for record in records) for name in ("clean", *AUTOATTACK)}
    robust = {name: flags[name].count("1") for name in AUTOATTACK}
    seconds = {name: sum(record["seconds"][name] for record in records) for name in AUTOATTACK}
    counted = Counter(warning for record in records for warning in record["warnings"])
    warnings = [f"{warning} (in {times} of {len(records)} chunks)" for warning, times in sorted(counted.items())]
    broken = robust["fab-t"] - robust["square"]
    if broken > max(1, _SQUARE_SHARE * examples):
        warnings.append(
            f"Square, which sees no gradient, broke {broken} of {examples} images that withstood all white-box "
            "attacks: gradients may be masked, and the true robustness lower"
        )
    return {
        "accuracy": robust["square"] / examples,
        "interval": list(wilson_interval(robust["square"], examples)),
        "clean": flags["clean"].count("1") / examples,
        "examples": examples,
        "attacks": {name: count / examples for name, count in robust.items()},
        "flags": flags,
        "seconds": sum(seconds.values()),
        "attack_seconds": seconds,
        "warnings": warnings,
    }
