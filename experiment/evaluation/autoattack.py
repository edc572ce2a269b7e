"""AutoAttack by its authors' package, in chunks of images for resuming and for several ranks."""

import hashlib
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib.metadata import version as version_of
from logging import WARNING, LogRecord, getLogger
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiment import UserError
from experiment.compat import import_autoattack
from experiment.data import as_float
from experiment.engine import gathered, ranks
from experiment.evaluation.batches import (
    InParts,
    accuracy_of,
    check_images,
    device_of,
    flags_text,
    measuring,
    within_memory,
)
from experiment.files import make_folder, read_json, state_sha256, write_json
from experiment.text import AUTOATTACK_STEPS

AUTOATTACK = AUTOATTACK_STEPS[1:]
"""The attacks of the standard version in order; each attacks the images that are still robust."""
STANDARD, TARGETS = "standard", 9
"""The standard version, and the number of target classes per image of its APGD-T and FAB-T."""

# APGD clamps to float32(x - eps) and float32(x + eps), each off by at most 2^-24 for pixels in [0, 1], and epsilon
# itself is rounded: 1e-6 is ten times what rounding can add, and 1/30,000 of a budget of 8/255.
_BALL_TOLERANCE = 1e-6
# AutoAttack's authors warn when Square breaks more than 0.2 % of the images after the white-box attacks. A single image
# is not called a pattern, so that a sample of a few hundred raises no false alarm.
_SQUARE_SHARE = 0.002


def _version_for(classes: int) -> str:
    """Return the version for a number of classes: ``standard`` from 10, otherwise its printed label."""
    if classes > TARGETS:
        return STANDARD
    # APGD-T's loss reads the fourth largest logit, so networks of two or three classes are attacked without it.
    return f"AutoAttack, {classes - 1} targets (not standard)" if classes > 3 else "APGD-CE, FAB, Square (not standard)"


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
) -> dict[str, Any]:
    """Compute accuracy under AutoAttack: the standard version, or the closest to it for fewer than 10 classes.

    The images are attacked in fixed chunks of `batch`, so that the result does not depend on interruptions. A finished
    chunk is a file in `folder`, which is read instead of attacking again. If CUDA memory is exhausted, the network
    processes half as many images at once from then on, and the current attack is repeated with the same random numbers,
    so that the result depends on the memory only through rounding. Rank 0 prints progress lines to stderr.

    Args:
        folder: folder of the chunk files; None keeps no files and cannot resume.
        batch: images per chunk. Random starts are drawn per chunk, so the result depends on it as on the seed.

    Returns:
        Plain types for result.json: ``accuracy`` (robust fraction) with its 95 % ``interval``, ``clean``, ``examples``,
        ``epsilon``, ``seed``, ``batch``, ``version``, ``package``, ``attacks`` (robust fraction after each attack),
        ``flags`` (for "clean" and each attack one character per image, in order: 1 if it is classified correctly
        after this attack and those before, else 0), ``seconds`` and ``attack_seconds`` (summed over chunks, including
        resumed ones and other ranks), ``student_sha256``, ``warnings`` (signs of gradient masking).

    Raises:
        UserError: epsilon, x or y out of range; a chunk file that is damaged or belongs to another student, setting or
            data; not enough memory for one image.
        RuntimeError: an adversarial image is outside the epsilon-ball or [0, 1], or the recomputed accuracy differs.

    Source: Croce & Hein, ICML 2020.
    """
    check_images(x, y)
    if not 0 < epsilon <= 1:
        raise UserError(f"epsilon {epsilon:g} is out of range for AutoAttack (expected 0 < epsilon <= 1)")
    device, (rank, world) = device_of(model, x), ranks()
    with measuring(device, model):
        classes = model(as_float(x[:1].to(device)).float()).shape[1]
    settings = {"epsilon": epsilon, "seed": seed, "version": _version_for(classes)}
    settings["package"] = f"pyautoattack {version_of('pyautoattack')}"
    student = state_sha256(model)
    run = {"student": student, "chunk size": batch, **settings}
    chunks = [slice(first, first + batch) for first in range(0, len(x), batch)]
    keys = [{**run, "chunk": i, "data": data_sha256(x[chunk], y[chunk])} for i, chunk in enumerate(chunks)]
    # Ranks finish at different times: they meet in a group of their own, which waits for days.
    group = dist.new_group(timeout=timedelta(days=30), backend="gloo") if world > 1 else None
    # Rank 0's view of the folder: a network file system may show each rank other files.
    records = gathered(_finished_chunks(folder, keys) if folder else {}, group)[0]
    left = [i for i in range(len(chunks)) if i not in records]

    def say(line: str) -> None:
        if rank == 0:
            print(line, file=sys.stderr, flush=True)

    say(
        f"{autoattack_label(settings['version'])} on {len(x)} images: epsilon {epsilon:.6f}, seed {seed}, chunks of "
        f"{batch}, {settings['package']}; {len(records)} of {len(chunks)} chunks were done before"
    )
    in_parts = InParts(model, min(batch, len(x)))
    for i in left[rank::world]:
        images, labels = as_float(x[chunks[i]].to(device)).float(), y[chunks[i]].to(device)
        with measuring(device, in_parts), attack_switches():
            records[i] = _attack_chunk(in_parts, images, labels, epsilon, seed, classes)
        if folder is not None:
            write_json(_chunk_file(folder, i), {"parts": keys[i], "record": records[i]})
        attacked = sum(record["images"] for record in records.values())
        robust = sum(record["flags"]["square"].count("1") for record in records.values())
        say(f"AutoAttack: {attacked} of {len(x)} images, robust {100 * robust / attacked:.2f} %")
    records = {i: record for part in gathered(records, group) for i, record in part.items()}
    result = _merge([records[i] for i in range(len(chunks))], len(x))
    for warning in result["warnings"]:
        say(f"warning: AutoAttack: {warning}")
    return {**settings, "batch": batch, **result, "student_sha256": student}


def _merge(records: list[dict[str, Any]], examples: int) -> dict[str, Any]:
    """Merge the chunks, and check all of them for gradient masking."""
    flags = {name: "".join(record["flags"][name] for record in records) for name in records[0]["flags"]}
    robust = {name: text.count("1") for name, text in flags.items()}
    clean = robust.pop("clean")
    seconds = {name: sum(record["seconds"][name] for record in records) for name in robust}
    counted = Counter(warning for record in records for warning in record["warnings"])
    found = [f"{warning} (in {times} of {len(records)} chunks)" for warning, times in sorted(counted.items())]
    broken = robust["fab-t"] - robust["square"]
    if broken > max(1, _SQUARE_SHARE * examples):
        found.append(
            f"Square, which uses no gradient, broke {broken} of {examples} images that all white-box attacks left "
            "correct: gradients may be masked, and the true robustness lower"
        )
    return {
        **accuracy_of(flags["square"]),
        "clean": clean / examples,
        "attacks": {name: count / examples for name, count in robust.items()},
        "flags": flags,
        "seconds": sum(seconds.values()),
        "attack_seconds": seconds,
        "warnings": found,
    }


# One chunk ------------------------------------------------------------------------------------------------------------


def _attack_chunk(model: InParts, x: Tensor, y: Tensor, epsilon: float, seed: int, classes: int) -> dict[str, Any]:
    """Run the attacks on one chunk, each on the images that are still robust; return flags and seconds.

    Running one attack at a time is bit-identical to the package's standard run, which reseeds before every batch of
    every attack and passes on the images that are still robust (tested). It gives a flag per image after each attack,
    and allows an attack to be repeated with less memory.
    """
    AutoAttack = import_autoattack()

    def correct(images: Tensor, labels: Tensor) -> Tensor:
        logits = model(images)
        if not logits.isfinite().all():
            raise UserError("the network gives NaN or infinite logits; AutoAttack cannot attack it")
        return logits.argmax(dim=1) == labels

    def attack(name: str, robust: Tensor) -> Tensor:
        robust = robust.clone()
        index = robust.nonzero().squeeze(1)
        # Fewer images may use other kernels, whose rounding can change the prediction of an image on a decision
        # boundary. Such an image counts as misclassified; the package would remove it from its batch, too.
        while len(index) and not (still := correct(x[index], y[index])).all():
            robust[index] = still
            index = index[still]
        if len(index) == 0:
            return robust
        images, labels = x[index], y[index]
        adversary = AutoAttack(model, norm="Linf", eps=epsilon, seed=seed, version=STANDARD, device=x.device)
        adversary.attacks_to_run = [name]
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(TARGETS, classes - 1)
        x_adv, y_adv = adversary.run_standard_evaluation(images, labels, batch_size=len(images))
        _check_adversarial(x_adv, images, epsilon, name)
        # Recomputed in the same batch as in the package: FAB's images are on the decision boundary.
        robust[index] = correct(x_adv, labels)
        differing = int((robust[index] != (y_adv == labels)).sum())
        if differing:
            raise RuntimeError(
                f"{name}: the accuracy recomputed from the adversarial images differs from AutoAttack's on {differing} "
                f"of {len(labels)} images: the network is random, or its state has changed since the attack"
            )
        return robust

    robust = within_memory(partial(correct, x, y), [model], "AutoAttack (clean pass)")
    record: dict[str, Any] = {"images": len(x), "flags": {"clean": flags_text(robust)}, "seconds": {}}
    with _package_warnings() as found:
        for name in AUTOATTACK:
            if name == "apgd-t" and classes <= 3:
                continue
            started = time.perf_counter()
            robust = within_memory(partial(attack, name, robust), [model], f"AutoAttack ({name})")
            record["flags"][name] = flags_text(robust)
            record["seconds"][name] = time.perf_counter() - started
    record["warnings"] = sorted(found)
    return record


def _check_adversarial(x_adv: Tensor, x: Tensor, epsilon: float, name: str) -> None:
    """Raise RuntimeError unless every pixel is within epsilon of x's and in [0, 1] (NaN is neither)."""
    delta = (x_adv - x).abs()
    if not (delta <= epsilon + _BALL_TOLERANCE).all():
        raise RuntimeError(f"{name} left the ball: a pixel moved by {delta.max():.8f}, epsilon is {epsilon:.8f}")
    if not ((x_adv >= 0) & (x_adv <= 1)).all():
        raise RuntimeError(f"{name} left [0, 1]: pixels from {x_adv.min():.8f} to {x_adv.max():.8f}")


@contextmanager
def attack_switches() -> Iterator[None]:
    """Set the torch switches that AutoAttack needs; restored on exit.

    cudnn.benchmark is off: Square's batch shrinks with every misclassified image, and each new size would be tuned.
    Deterministic algorithms only warn: FAB's cumulative sum has none on CUDA and would raise an error.
    """
    benchmark, strict = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
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
            torch.use_deterministic_algorithms(True)


@contextmanager
def _package_warnings() -> Iterator[set[str]]:
    """Collect the package's warnings (zero gradients, randomised network, ...) instead of printing them each time."""
    logger, found = getLogger("auto-attack"), set()

    def collect(record: LogRecord) -> bool:
        if record.levelno >= WARNING:
            # The number of points differs from call to call: without it, equal warnings are equal.
            message = re.sub(r"^there are \d+ points", "there are points", record.getMessage())
            found.add(message.removesuffix(" See flags_doc.md for details."))
        return False  # it is not printed

    logger.addFilter(collect)
    try:
        yield found
    finally:
        logger.removeFilter(collect)


# Chunk files ----------------------------------------------------------------------------------------------------------


def _chunk_file(folder: Path, i: int) -> Path:
    return folder / f"chunk-{i:05d}.json"


def data_sha256(x: Tensor, y: Tensor) -> str:
    """SHA-256 of the images as the network sees them, and of the labels."""
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    digest.update(as_float(x).float().cpu().contiguous().numpy().tobytes())
    digest.update(y.to(torch.int64).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _finished_chunks(folder: Path, keys: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Create the folder, and read the chunk files in it: records by number."""
    make_folder(folder)
    records = {}
    for i, key in enumerate(keys):
        path = _chunk_file(folder, i)
        if not path.exists():
            continue
        try:
            content = read_json(path)
            parts, records[i] = content["parts"], content["record"]
        except (UserError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}). Delete it to attack its images again") from error
        if differing := [name for name in key if parts.get(name) != key[name]]:
            raise UserError(
                f"{path} holds AutoAttack results of another {' and '.join(differing)}; results are not mixed: "
                f"use another folder, or delete {folder} to attack again"
            )
    return records
