"""AutoAttack, standard version, by the package of its authors, in chunks that resume."""

import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiment import UserError
from experiment.evaluation.autoattack_chunk import FewAtOnce, attack_chunk, attack_switches
from experiment.evaluation.autoattack_files import AUTOATTACK, chunk_file, data_sha256, finished_chunks, write_chunk
from experiment.evaluation.autoattack_progress import AutoAttackProgress
from experiment.evaluation.batches import as_pixels, check_images, device_of, measuring
from experiment.evaluation.flags import wilson_interval
from experiment.evaluation.ranks import SharedWork, ranks
from experiment.files import state_sha256

# The AutoAttack authors warn when Square breaks more than 0.2 % of the images after the white-box attacks; a single
# image is not called a pattern, so that a sample of a few hundred does not ring by chance.
_SQUARE_SHARE = 0.002
_SECONDS_UNTIL_SEEN = 90  # NFS keeps what it knows of a folder for up to 60


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
    work = SharedWork([i for i in range(len(chunks)) if i not in records], folder)
    progress = AutoAttackProgress(len(x), records.values(), work, show=show_progress and rank == 0)
    progress.say(
        f"AutoAttack standard on {len(x)} images: epsilon {epsilon:.6f}, seed {seed}, chunks of {batch}, "
        f"{run['package']}; {len(chunks) - len(work.tasks)} of {len(chunks)} chunks were done before"
    )
    older = sum(folder is not None and chunk_file(folder, i).exists() for i in work.tasks)
    if older:
        progress.say(f"chunks of an older format, without a flag per image, are attacked again: {older}")
    fitting = FewAtOnce(model, batch)
    try:
        for i in work.mine():
            images, labels = as_pixels(x[chunks[i]].to(device)).float(), y[chunks[i]].to(device)
            with measuring(device, fitting), attack_switches():
                records[i] = attack_chunk(fitting, images, labels, epsilon, seed, progress)
            if folder is not None:
                write_chunk(chunk_file(folder, i), parts[i], records[i])
            progress.finish(records[i])
        work.wait(progress.look)
    except BaseException:
        work.fail()
        raise
    finally:
        progress.close()
    if world > 1:
        records = _chunks_of_all_ranks(folder, parts)

    result = _merge([records[i] for i in range(len(chunks))], len(x))
    for warning in result["warnings"]:
        progress.say(f"warning: AutoAttack: {warning}")
    settings = {"epsilon": epsilon, "seed": seed, "batch": batch, "version": "standard", "package": run["package"]}
    return {**settings, **result, "student_sha256": run["student"]}


def _chunks_of_all_ranks(folder: Path, parts: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """All chunks, once every rank has written its own; a network file system may show them some seconds later."""
    end = time.monotonic() + _SECONDS_UNTIL_SEEN
    while len(records := dict(finished_chunks(folder, parts))) < len(parts):
        if time.monotonic() > end:
            missing = next(i for i in range(len(parts)) if i not in records)
            raise UserError(
                f"{chunk_file(folder, missing)}, which another rank wrote, is not to be seen from here; --run_dir must "
                "lie on a file system that all ranks share"
            )
        time.sleep(1)
    return records


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
