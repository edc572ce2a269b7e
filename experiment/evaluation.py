"""What a network withstands: clean, FGSM, PGD-20, C&W and AutoAttack accuracy, and gradient alignment.

Conventions of every public function here:
    x is (N, C, H, W), uint8 or float in [0, 1]; y is (N,) int64; both on any device, moved batch by batch to the
    network's. Accuracies are fractions of N. Networks compute in float32 (autocast is switched off; TF32 stays as the
    process has it), in eval mode with frozen parameters; modes and requires_grad are restored, no ``.grad`` is touched,
    and the global random generators end as they began: random starts come from `seed` alone.
    With torch.distributed initialised, every rank must call with the same arguments: batches (for AutoAttack, chunks)
    are split over the ranks and every rank gets the merged result. Each batch has a random stream of its own, so that
    the result does not depend on the number of ranks.
"""

import hashlib
import json
import logging
import math
import re
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

import attacks
from experiment import UserError
from experiment.checkpoint import read_json, state_sha256, write_json
from experiment.compat import import_autoattack
from experiment.data import as_float

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The attacks of AutoAttack's standard version, in their order; each gets the images that the ones before left."""

GRADIENT_DEFINITION = (
    "g = gradient of softmax(logits)[true class] with respect to the input (0 to 1 scale); means over images of "
    "GD = ||g_student - g_teacher||_2 and GC = cos(g_student, g_teacher), which counts as 0 for a zero gradient"
)
"""To be printed beside GD and GC: the paper does not say of which scalar it takes the gradient."""

# APGD clamps to float32(x - eps) and float32(x + eps), each off by at most 2^-24 for pixels in [0, 1], and epsilon
# itself is rounded: 1e-6 is ten times what rounding can add, and 1/30,000 of a budget of 8/255.
_BALL_TOLERANCE = 1e-6

# The AutoAttack authors warn when Square breaks more than 0.2 % of the images after the white-box attacks; a single
# image is not called a pattern, so that a sample of a few hundred does not ring by chance.
_SQUARE_SHARE = 0.002


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


def gradient_alignment(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, batch: int = 128
) -> dict[str, float]:
    """GD and GC between the input gradients of student and teacher, as `GRADIENT_DEFINITION` says.

    Returns:
        ``gd``: mean L2 distance (lower: the student follows the teacher); ``gc``: mean cosine (higher).

    Source: Lee, Cho, Kim, ICLR 2025, section 5 (GD, GC).
    """

    def gradient(model: nn.Module, clean: Tensor, labels: Tensor) -> Tensor:
        clean = clean.clone().requires_grad_()
        with torch.enable_grad():
            true = F.softmax(model(clean), dim=1).gather(1, labels[:, None]).sum()
        # float64: a confident network's gradients are so small that their squares underflow in float32.
        return torch.autograd.grad(true, [clean])[0].double().flatten(1)

    def sums(clean: Tensor, labels: Tensor) -> Tensor:
        of_student, of_teacher = gradient(student, clean, labels), gradient(teacher, clean, labels)
        norms = of_student.norm(dim=1) * of_teacher.norm(dim=1)
        cosine = torch.where(norms > 0, (of_student * of_teacher).sum(dim=1) / norms, 0)
        return torch.stack([(of_student - of_teacher).norm(dim=1).sum(), cosine.sum()])

    gd, gc = (_sum_over_batches(sums, x, y, batch, 0, student, teacher) / len(x)).tolist()
    return {"gd": gd, "gc": gc}


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
        Plain types for result.json: ``accuracy`` (robust fraction), ``clean``, ``examples``, ``epsilon``, ``seed``,
        ``batch``, ``version``, ``package``, ``attacks`` (robust fraction after each attack), ``seconds`` and
        ``attack_seconds`` (summed over chunks, whenever and on whichever rank they were attacked),
        ``student_sha256``, ``warnings`` (signs of gradient masking).

    Raises:
        UserError: fewer than 10 classes; epsilon, x or y out of range; parameters not float32; a chunk file of
            another student, setting or data, or a damaged one; no memory even for one image.
        RuntimeError: an adversarial image outside the epsilon-ball or [0, 1], or an accuracy that its recomputation
            does not confirm: the number would be worth nothing.

    Source: Croce & Hein, ICML 2020.
    """
    device = _device(model, x)
    _check_images(x, y)
    if not 0 < epsilon <= 1:
        raise UserError(f"epsilon {epsilon:g} is not allowed for AutoAttack; above 0 and up to 1")
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise UserError("AutoAttack needs a network with float32 parameters")
    with _measuring(device, model):
        classes = model(_pixels(x[:1].to(device)).float()).shape[1]
    if classes < 10:
        raise UserError(
            f"AutoAttack, standard version, needs at least 10 classes (9 targets); the network has {classes}"
        )
    if int(y.max()) >= classes:
        raise UserError(f"label {int(y.max())} is not allowed; the network has {classes} classes")
    rank, world = _ranks()
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
    parts = [{**run, "chunk": i, "data": _data_sha256(x[chunk], y[chunk])} for i, chunk in enumerate(chunks)]
    records = dict(_finished_chunks(folder, parts))
    if world > 1:
        dist.barrier()  # every rank has seen the same files before any rank adds one
    todo = [i for i in range(len(chunks)) if i not in records][rank::world]
    show_progress = show_progress and rank == 0
    display = _Display(records.values(), [len(y[chunks[i]]) for i in todo], show_progress)
    display.say(
        f"AutoAttack standard on {len(x)} images: epsilon {epsilon:.6f}, seed {seed}, chunks of {batch}, "
        f"{run['package']}; {len(records)} of {len(chunks)} chunks were done before"
    )
    fitting = _FewAtOnce(model, batch)
    try:
        for i in todo:
            images, labels = _pixels(x[chunks[i]].to(device)).float(), y[chunks[i]].to(device)
            with _measuring(device, fitting), _attack_switches():
                records[i] = _attack_chunk(fitting, images, labels, epsilon, seed, display)
            if folder is not None:
                _write_chunk(_chunk_file(folder, i), parts[i], records[i])
            display.finish(records[i])
    finally:
        display.close()
    if world > 1:
        dist.barrier()
        records = dict(_finished_chunks(folder, parts))

    result = _merge([records[i] for i in range(len(chunks))], len(x))
    for warning in result["warnings"]:
        display.say(f"warning: AutoAttack: {warning}")
    settings = {"epsilon": epsilon, "seed": seed, "batch": batch, "version": "standard", "package": run["package"]}
    return {**settings, **result, "student_sha256": run["student"]}


# Batches ----------------------------------------------------------------------------------------------------------


def _ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _device(model: nn.Module, x: Tensor) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), x.device)


def _pixels(x: Tensor) -> Tensor:
    """Images as float in [0, 1]."""
    return as_float(x) if x.dtype == torch.uint8 else x


def _check_images(x: Tensor, y: Tensor) -> None:
    """Raise UserError unless x and y are as in the module's conventions."""
    if x.ndim != 4 or len(x) == 0 or y.shape != (len(x),):
        raise UserError(f"images {tuple(x.shape)} with labels {tuple(y.shape)} are not allowed; (N, C, H, W) with (N,)")
    if x.dtype != torch.uint8:
        if not x.is_floating_point():
            raise UserError(f"images of type {x.dtype} are not allowed; uint8, or float in [0, 1]")
        low, high = float(x.min()), float(x.max())
        if not (low >= 0 and high <= 1):  # NaN is refused too
            raise UserError(f"pixels from {low:g} to {high:g} are not allowed; [0, 1] (normalise inside the network)")
    if y.dtype != torch.int64 or int(y.min()) < 0:
        raise UserError(f"labels of type {y.dtype} from {y.min()} are not allowed; int64, from 0")


@contextmanager
def _measuring(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Eval mode, frozen, float32, gradients off, and random generators of their own; all restored on exit.

    Raises:
        RuntimeError: a network left eval mode by itself, so that what was measured is not the network in use.
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
            _assert_eval(model)


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


def _assert_eval(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise RuntimeError("the network switched itself to train mode during its evaluation; no accuracy is reported")


def _sum_over_batches(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, batch: int, seed: int, *models: nn.Module
) -> Tensor:
    """Sum function(x_batch, y_batch), a pair of numbers, over all batches and ranks, in float64."""
    _check_images(x, y)
    device = _device(models[0], x)
    rank, world = _ranks()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with _measuring(device, *models):
        for i in range(rank, math.ceil(len(x) / batch), world):
            # A stream per batch: its start must not depend on which rank takes it. A hash, because neighbouring seeds
            # would share streams, and of 32 bits, because the CPU generator ignores higher ones.
            stream = zlib.crc32(f"{seed} {i}".encode())
            rows = slice(i * batch, (i + 1) * batch)
            x_here, y_here = _pixels(x[rows].to(device)), y[rows].to(device)
            total += _in_parts(function, x_here, y_here, stream, device)
    if world > 1:
        dist.all_reduce(total)
    return total


def _in_parts(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, stream: int, device: torch.device
) -> Tensor:
    """function(x, y), summed over as many parts as the device's memory asks for; every image's start stays its own."""
    size = len(x)
    while True:
        total = torch.zeros(2, dtype=torch.float64, device=device)
        try:
            for first in range(0, len(x), size):
                torch.default_generator.manual_seed(stream)
                if device.type == "cuda":
                    torch.cuda.manual_seed(stream)
                with attacks.shard_of(first, len(x)):
                    total += function(x[first : first + size], y[first : first + size])
            return total
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise UserError("evaluation does not fit into the device's memory, even image by image") from error
        # Outside the except clause: the exception's traceback would keep the tensors alive.
        torch.cuda.empty_cache()
        size = (size + 1) // 2


def _accuracy(
    model: nn.Module, x: Tensor, y: Tensor, batch: int, seed: int, attack: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """Fraction of the images that the network classifies correctly after attack(x, y)."""

    def counts(clean: Tensor, labels: Tensor) -> Tensor:
        logits = model(attack(clean, labels))
        return torch.stack([(logits.argmax(dim=1) == labels).sum(), (~logits.isfinite()).any(dim=1).sum()])

    # One transfer at the end: a count read batch by batch would make the host wait for the device.
    correct, not_finite = _sum_over_batches(counts, x, y, batch, seed, model).tolist()
    if not_finite:
        raise UserError(f"the network gives NaN or infinite logits on {not_finite:.0f} of {len(x)} images; no accuracy")
    return correct / len(x)


# AutoAttack -------------------------------------------------------------------------------------------------------


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
    model: _FewAtOnce, x: Tensor, y: Tensor, epsilon: float, seed: int, display: "_Display"
) -> dict[str, Any]:
    """Run the four attacks on one chunk, each on the images still robust; counts and seconds.

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
        _assert_eval(model)
        _check_adversarial(x_adv, images, epsilon, name)
        # In the batch that the package used: another batch size may take other kernels, whose rounding moves
        # FAB's images, which lie on the decision boundary, across it.
        robust = correct(x_adv, labels)
        if not torch.equal(robust, y_adv == labels):
            differing = int((robust != (y_adv == labels)).sum())
            raise RuntimeError(
                f"{name}: the accuracy recomputed from the adversarial images differs from AutoAttack's on {differing} "
                f"of {len(labels)} images: the network is random, or not in the state in which it was attacked"
            )
        return robust

    flags = _within_memory(partial(correct, x, y), len(x), model, "clean pass", display)
    record: dict[str, Any] = {"images": len(x), "clean": int(flags.sum()), "robust": {}, "seconds": {}}
    with _package_warnings() as found:
        for name in AUTOATTACK:
            started = time.perf_counter()
            index = flags.nonzero().squeeze(1)
            if len(index):
                display.begin(name, record)
                attempt = partial(attack, name, x[index], y[index])
                flags[index] = _within_memory(attempt, len(index), model, name, display)
            record["robust"][name] = int(flags.sum())
            record["seconds"][name] = time.perf_counter() - started
    record["warnings"] = sorted(set(found))
    return record


def _within_memory(
    attempt: Callable[[], Tensor], images: int, model: _FewAtOnce, what: str, display: "_Display"
) -> Tensor:
    """attempt() on so many images, repeated with half as many at once until they fit into the device's memory."""
    while True:
        tried = min(images, model.limit)
        try:
            return attempt()
        except torch.OutOfMemoryError as error:
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
    """Add up the chunks; look for gradient masking over all of them."""
    robust = {name: sum(record["robust"][name] for record in records) for name in AUTOATTACK}
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
        "clean": sum(record["clean"] for record in records) / examples,
        "examples": examples,
        "attacks": {name: count / examples for name, count in robust.items()},
        "seconds": sum(seconds.values()),
        "attack_seconds": seconds,
        "warnings": warnings,
    }


# Chunk files ------------------------------------------------------------------------------------------------------


def _chunk_file(folder: Path, i: int) -> Path:
    return Path(folder) / f"chunk-{i:05d}.json"


def _data_sha256(x: Tensor, y: Tensor) -> str:
    """SHA-256 of the images as the network sees them, and of the labels."""
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    digest.update(_pixels(x).float().cpu().contiguous().numpy().tobytes())
    digest.update(y.to(torch.int64).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checksum(parts: dict[str, Any], record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([parts, record], sort_keys=True).encode()).hexdigest()


def _write_chunk(path: Path, parts: dict[str, Any], record: dict[str, Any]) -> None:
    write_json(path, {"parts": parts, "record": record, "sha256": _checksum(parts, record)})


def _finished_chunks(folder: Path | None, parts: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Create the folder, and read the chunk files that are there: (number, record).

    Raises:
        UserError: a file belongs to another student, setting or data, or its checksum does not match.
    """
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}") from error
    for i, expected in enumerate(parts):
        path = _chunk_file(folder, i)
        if not path.exists():
            continue
        content = read_json(path)
        found, record = content.get("parts"), content.get("record")
        if content.get("sha256") != _checksum(found, record):
            raise UserError(
                f"{path} is damaged: its checksum does not match; delete it to have its images attacked again"
            )
        differing = [name for name in expected if found.get(name) != expected[name]]
        if differing:
            raise UserError(
                f"{path} holds AutoAttack results of another {' and '.join(differing)}; results are not mixed: "
                f"use another folder, or delete {folder} to attack anew"
            )
        yield i, record


# Progress ---------------------------------------------------------------------------------------------------------


class _Display:
    """The progress bar: images done, the attack at work, and the share of them that is robust so far.

    Where stderr is no terminal there is no bar, only a line per chunk.
    """

    def __init__(self, done: Iterable[dict[str, Any]], todo: Iterable[int], show: bool) -> None:
        from tqdm import tqdm

        self._show, self._images, self._robust = show, 0, 0
        self._total = sum(record["images"] for record in done) + sum(todo)
        shown = show and sys.stderr.isatty()
        self._bar = tqdm(total=self._total, unit="image", desc="AutoAttack", disable=not shown, dynamic_ncols=True)
        for record in done:
            self._count(record)

    def say(self, line: str) -> None:
        """Print a line on stderr, above the bar."""
        if self._show:
            self._bar.write(line, file=sys.stderr)

    def begin(self, attack: str, record: dict[str, Any]) -> None:
        """Show the attack that starts now, and the robust share with the chunk at hand."""
        robust = min([record["clean"], *record["robust"].values()])
        share = (self._robust + robust) / (self._images + record["images"])
        self._bar.set_postfix_str(f"{attack}, robust {100 * share:.2f} %")

    def finish(self, record: dict[str, Any]) -> None:
        """Count a chunk that is done now."""
        self._count(record)
        if self._bar.disable:
            share = self._robust / self._images
            self.say(f"AutoAttack: {self._images} of {self._total} images, robust {100 * share:.2f} %")

    def _count(self, record: dict[str, Any]) -> None:
        self._images += record["images"]
        self._robust += record["robust"][AUTOATTACK[-1]]
        self._bar.update(record["images"])

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
