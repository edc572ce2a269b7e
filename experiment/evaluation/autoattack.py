"""AutoAttack by its authors' package, in chunks of images for resuming and for several ranks."""

import hashlib
import json
import logging
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from experiment import UserError
from experiment.compat import import_autoattack
from experiment.entry import is_out_of_memory
from experiment.evaluation.batches import (
    as_pixels,
    assert_eval,
    check_images,
    device_of,
    flags_text,
    measuring,
    wilson_interval,
)
from experiment.evaluation.ranks import SharedWork, ranks
from experiment.files import read_json, state_sha256, write_json

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The attacks of the standard version in order; each attacks the images that are still robust."""
STANDARD, TARGETS = "standard", 9
"""The standard version, and the number of target classes per image of its APGD-T and FAB-T."""

# APGD clamps to float32(x - eps) and float32(x + eps), each off by at most 2^-24 for pixels in [0, 1], and epsilon
# itself is rounded: 1e-6 is ten times what rounding can add, and 1/30,000 of a budget of 8/255.
_BALL_TOLERANCE = 1e-6
# AutoAttack's authors warn when Square breaks more than 0.2 % of the images after the white-box attacks. A single image
# is not called a pattern, so that a sample of a few hundred raises no false alarm.
_SQUARE_SHARE = 0.002
_SECONDS_UNTIL_VISIBLE = 90  # NFS caches a folder's content for up to 60


def version_for(classes: int) -> str:
    """Return the version of AutoAttack for a number of classes: ``standard`` from 10, otherwise its printed label.

    APGD-T's loss reads the fourth largest logit, so networks of two or three classes are attacked without it.
    """
    if classes > TARGETS:
        return STANDARD
    if classes > 3:
        return f"AutoAttack, {classes - 1} targets (not standard)"
    return "APGD-CE, FAB, Square (not standard)"


def autoattack_label(version: str) -> str:
    """Return the printed name of a version."""
    return "AutoAttack" if version == STANDARD else version


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
    """Compute accuracy under AutoAttack: the standard version, or the closest to it for fewer than 10 classes.

    The images are attacked in fixed chunks of `batch`, so that the result does not depend on interruptions. A finished
    chunk is a file in `folder`, which is read instead of attacking again. If CUDA memory is exhausted, the network
    processes half as many images at once from then on, and the current attack is repeated with the same random numbers,
    so that the result depends on the memory only through rounding.

    Args:
        folder: folder of the chunk files, on a file system that all ranks share; None keeps no files and cannot resume.
        batch: images per chunk. Random starts are drawn per chunk, so the result depends on it as on the seed.
        show_progress: print progress lines to stderr.

    Returns:
        Plain types for result.json: ``accuracy`` (robust fraction) with its 95 % ``interval``, ``clean``, ``examples``,
        ``epsilon``, ``seed``, ``batch``, ``version``, ``package``, ``attacks`` (robust fraction after each attack),
        ``flags`` (for "clean" and each attack one character per image, in order: 1 if it is classified correctly
        after this attack and those before, else 0), ``seconds`` and ``attack_seconds`` (summed over chunks, including
        resumed ones and other ranks), ``student_sha256``, ``warnings`` (signs of gradient masking).

    Raises:
        UserError: epsilon, x or y out of range; fewer than 2 classes; parameters not float32; a chunk file that is
            damaged or belongs to another student, setting or data; not enough memory for one image.
        RuntimeError: an adversarial image is outside the epsilon-ball or [0, 1], or the recomputed accuracy differs.

    Source: Croce & Hein, ICML 2020.
    """
    device = device_of(model, x)
    classes = _checked_classes(model, x, y, epsilon)
    rank, world = ranks()
    if world > 1 and folder is None:
        raise UserError("AutoAttack on several ranks needs a folder for its chunk files")
    settings = {"epsilon": epsilon, "seed": seed, "batch": batch, "version": version_for(classes)}
    settings["package"] = f"pyautoattack {version_of('pyautoattack')}"
    # torch.compile's wrapper prefixes every name; the weights are those of the module inside.
    student = state_sha256(getattr(model, "_orig_mod", model))
    chunks = [slice(first, min(first + batch, len(x))) for first in range(0, len(x), batch)]
    run = {"student": student, "chunk size": batch, **{name: settings[name] for name in settings if name != "batch"}}
    keys = [{**run, "chunk": i, "data": data_sha256(x[chunk], y[chunk])} for i, chunk in enumerate(chunks)]
    records = dict(_finished_chunks(folder, keys))
    work = SharedWork([i for i in range(len(chunks)) if i not in records], folder)
    progress = Progress(len(x), records, work, show=show_progress and rank == 0)
    name = "AutoAttack standard" if settings["version"] == STANDARD else settings["version"]
    progress.say(
        f"{name} on {len(x)} images: epsilon {epsilon:.6f}, seed {seed}, chunks of {batch}, {settings['package']}; "
        f"{len(chunks) - len(work.tasks)} of {len(chunks)} chunks were done before"
    )
    fitting = InParts(model, batch)
    try:
        for i in work.mine():
            images, labels = as_pixels(x[chunks[i]].to(device)).float(), y[chunks[i]].to(device)
            with measuring(device, fitting), attack_switches():
                records[i] = _attack_chunk(fitting, images, labels, epsilon, seed, classes, progress)
            if folder is not None:
                content = {"parts": keys[i], "record": records[i]}
                write_json(_chunk_file(folder, i), {**content, "sha256": _checksum(content)})
            progress.finish(records[i])
        work.wait(progress.show)
    except BaseException:
        work.fail()
        raise
    if world > 1:
        records = _chunks_of_all_ranks(folder, keys)
    result = _merge([records[i] for i in range(len(chunks))], len(x))
    for warning in result["warnings"]:
        progress.say(f"warning: AutoAttack: {warning}")
    return {**settings, **result, "student_sha256": student}


def _checked_classes(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> int:
    check_images(x, y)
    if not 0 < epsilon <= 1:
        raise UserError(f"epsilon {epsilon:g} is out of range for AutoAttack (expected 0 < epsilon <= 1)")
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise UserError("AutoAttack needs a network with float32 parameters")
    device = device_of(model, x)
    with measuring(device, model):
        classes = model(as_pixels(x[:1].to(device)).float()).shape[1]
    if classes < 2:
        raise UserError(f"AutoAttack needs at least 2 classes; the network has {classes}")
    if int(y.max()) >= classes:
        raise UserError(f"label {int(y.max())} is out of range; the network has {classes} classes")
    return classes


def _merge(records: list[dict[str, Any]], examples: int) -> dict[str, Any]:
    """Merge the chunks, and check all of them for gradient masking."""
    flags = {name: "".join(record["flags"][name] for record in records) for name in records[0]["flags"]}
    attacks = [name for name in flags if name != "clean"]
    robust = {name: flags[name].count("1") for name in attacks}
    seconds = {name: sum(record["seconds"][name] for record in records) for name in attacks}
    counted = Counter(warning for record in records for warning in record["warnings"])
    found = [f"{warning} (in {times} of {len(records)} chunks)" for warning, times in sorted(counted.items())]
    broken = robust["fab-t"] - robust["square"]
    if broken > max(1, _SQUARE_SHARE * examples):
        found.append(
            f"Square, which uses no gradient, broke {broken} of {examples} images that all white-box attacks left "
            "correct: gradients may be masked, and the true robustness lower"
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
        "warnings": found,
    }


# One chunk ------------------------------------------------------------------------------------------------------------


def _attack_chunk(
    model: "InParts", x: Tensor, y: Tensor, epsilon: float, seed: int, classes: int, progress: "Progress"
) -> dict[str, Any]:
    """Run the attacks on one chunk, each on the images that are still robust; return flags and seconds.

    Running one attack at a time is bit-identical to the package's standard run, which reseeds before every batch of
    every attack and passes on the images that are still robust (tested). It shows progress, and allows an attack to be
    repeated with less memory.
    """
    AutoAttack = import_autoattack()

    def correct(images: Tensor, labels: Tensor) -> Tensor:
        logits = model(images)
        if not logits.isfinite().all():
            raise UserError("the network gives NaN or infinite logits; AutoAttack cannot attack it")
        return logits.argmax(dim=1) == labels

    def attack(name: str, images: Tensor, labels: Tensor) -> Tensor:
        # Another batch size may use other kernels, whose rounding can change the prediction of an image on a decision
        # boundary. Such an image counts as misclassified; the package would remove it from its batch, too.
        robust = correct(images, labels)
        if not robust.all():
            left = robust.nonzero().squeeze(1)
            if len(left):
                robust[left] = attack(name, images[left], labels[left])
            return robust
        adversary = AutoAttack(model, norm="Linf", eps=epsilon, seed=seed, version=STANDARD, device=images.device)
        adversary.attacks_to_run = [name]
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(TARGETS, classes - 1)
        x_adv, y_adv = adversary.run_standard_evaluation(images, labels, batch_size=len(images))
        assert_eval(model)
        _check_adversarial(x_adv, images, epsilon, name)
        # Recomputed in the same batch as in the package: FAB's images are on the decision boundary.
        robust = correct(x_adv, labels)
        if not torch.equal(robust, y_adv == labels):
            differing = int((robust != (y_adv == labels)).sum())
            raise RuntimeError(
                f"{name}: the accuracy recomputed from the adversarial images differs from AutoAttack's on {differing} "
                f"of {len(labels)} images: the network is random, or its state has changed since the attack"
            )
        return robust

    robust = _within_memory(partial(correct, x, y), len(x), model, "clean pass", progress)
    record: dict[str, Any] = {"images": len(x), "flags": {"clean": flags_text(robust)}, "seconds": {}}
    with _package_warnings() as found:
        for name in AUTOATTACK:
            if name == "apgd-t" and classes <= 3:
                continue
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


def _check_adversarial(x_adv: Tensor, x: Tensor, epsilon: float, name: str) -> None:
    """Raise RuntimeError unless every pixel is within epsilon of x's and in [0, 1] (NaN is neither)."""
    delta = (x_adv - x).abs()
    if not (delta <= epsilon + _BALL_TOLERANCE).all():
        raise RuntimeError(f"{name} left the ball: a pixel moved by {delta.max():.8f}, epsilon is {epsilon:.8f}")
    if not ((x_adv >= 0) & (x_adv <= 1)).all():
        raise RuntimeError(f"{name} left [0, 1]: pixels from {x_adv.min():.8f} to {x_adv.max():.8f}")


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
        parts = x.split(self.limit)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return torch.cat([self.model(part) for part in parts])
        # Parts keep no activations for the backward pass. An eval-mode pass draws no random numbers.
        again = partial(recomputed, self.model, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(part) for part in parts])


def _within_memory(
    attempt: Callable[[], Tensor], images: int, model: InParts, what: str, progress: "Progress"
) -> Tensor:
    """Call attempt(); while it runs out of memory, repeat with half as many images at once."""
    while True:
        tried = min(images, model.limit)
        try:
            return attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if tried == 1:
                raise UserError(
                    f"AutoAttack ({what}) does not fit in the device's memory, even with single images"
                ) from error
        # Outside the except clause: the exception's traceback would keep the tensors alive.
        torch.cuda.empty_cache()
        model.limit = tried // 2
        progress.say(f"AutoAttack {what}: out of memory with {tried} images at once; again with {model.limit}")


@contextmanager
def attack_switches() -> Iterator[None]:
    """Set the torch switches that AutoAttack needs; restored on exit.

    cudnn.benchmark is off: Square's batch shrinks with every misclassified image, and each new size would be tuned.
    Deterministic algorithms only warn: FAB's cumulative sum has none on CUDA and would raise an error.
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


class Progress:
    """Images attacked on all ranks, and the share that is robust so far: a line per chunk, per attack on a terminal."""

    def __init__(self, images: int, done: dict[int, dict[str, Any]], work: SharedWork, *, show: bool) -> None:
        """Begin with the records of the chunks that were done before; `work` counts for all ranks."""
        self._images, self._work, self._show = images, work, show
        self._before = [sum(counts) for counts in zip((0, 0), *map(_counts, done.values()), strict=True)]
        self._shown = self._before[0]

    def say(self, line: str) -> None:
        """Print a line on stderr."""
        if self._show:
            print(line, file=sys.stderr, flush=True)

    def begin(self, attack: str, record: dict[str, Any]) -> None:
        """An attack on this rank's chunk begins."""
        if sys.stderr.isatty():
            images, robust = self._so_far(record)
            share = 100 * robust / images
            self.say(f"AutoAttack: {images} of {self._images} images, {attack}, robust so far {share:.2f} %")

    def finish(self, record: dict[str, Any]) -> None:
        """Count a chunk, for all ranks."""
        for counter, count in zip(("images", "robust"), _counts(record), strict=True):
            self._work.count(counter, count)
        self.show()

    def show(self) -> None:
        """Print what all ranks have done, if it has changed."""
        images, robust = self._so_far()
        if images > self._shown:
            self._shown = images
            self.say(f"AutoAttack: {images} of {self._images} images, robust {100 * robust / images:.2f} %")

    def _so_far(self, *running: dict[str, Any]) -> tuple[int, int]:
        counted = [self._work.counted(counter) for counter in ("images", "robust")]
        images, robust = (sum(counts) for counts in zip(self._before, counted, *map(_counts, running), strict=True))
        return images, robust


def _counts(record: dict[str, Any]) -> tuple[int, int]:
    """Images of a chunk, and those that are robust after its last attack so far."""
    *_, latest = record["flags"].values()
    return record["images"], latest.count("1")


# Chunk files ----------------------------------------------------------------------------------------------------------


def _chunk_file(folder: Path, i: int) -> Path:
    return Path(folder) / f"chunk-{i:05d}.json"


def data_sha256(x: Tensor, y: Tensor) -> str:
    """SHA-256 of the images as the network sees them, and of the labels."""
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    digest.update(as_pixels(x).float().cpu().contiguous().numpy().tobytes())
    digest.update(y.to(torch.int64).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([content["parts"], content["record"]], sort_keys=True).encode()).hexdigest()


def _finished_chunks(folder: Path | None, keys: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Create the folder, and read the chunk files in it: (number, record).

    Raises:
        UserError: a file belongs to another student, setting or data, or its checksum does not match.
    """
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}") from error
    for i, key in enumerate(keys):
        path = _chunk_file(folder, i)
        if not path.exists():
            continue
        content = {"parts": None, "record": None, **read_json(path)}
        if content.get("sha256") != _checksum(content):
            raise UserError(
                f"{path} is damaged: its checksum does not match; delete it to have its images attacked again"
            )
        differing = [name for name in key if content["parts"].get(name) != key[name]]
        if differing:
            raise UserError(
                f"{path} holds AutoAttack results of another {' and '.join(differing)}; results are not mixed: "
                f"use another folder, or delete {folder} to attack again"
            )
        yield i, content["record"]


def _chunks_of_all_ranks(folder: Path, keys: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """All chunks, once every rank has written its own; a network file system may show them some seconds later."""
    end = time.monotonic() + _SECONDS_UNTIL_VISIBLE
    while len(records := dict(_finished_chunks(folder, keys))) < len(keys):
        if time.monotonic() > end:
            missing = next(i for i in range(len(keys)) if i not in records)
            raise UserError(
                f"{_chunk_file(folder, missing)}, which another rank wrote, is not visible here; --run_dir must be on "
                "a file system that all ranks share"
            )
        time.sleep(1)
    return records
