"""The record of an evaluation: write (never overwriting), read, format, and compare with the run."""

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from experiment import UserError
from experiment.evaluation.accuracy import STEPS, Attacked
from experiment.evaluation.autoattack import autoattack_label
from experiment.evaluation.batches import as_pixels
from experiment.files import read_json, write_atomically, write_json
from experiment.text import budget

FOLDER = "evaluations"
"""Folder of the records, in a run folder or next to a checkpoint."""

FORMAT = 2


def check_record_place(folder: Path, out: Path | None) -> None:
    """Check, before the evaluation, that the record can be written.

    Raises:
        UserError: `out` exists, or its folder does not; the folder cannot be written to.
    """
    if out is not None:
        check_output(out)
        return
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}. Use --out FILE.json")


def check_output(path: Path) -> None:
    """Check that a file does not exist and that its folder does."""
    if path.exists():
        raise UserError(f"{path} exists and is not overwritten. Use another name")
    # The folder of the records is created later.
    if not path.parent.is_dir() and not (path.parent.name == FOLDER and path.parent.parent.is_dir()):
        raise UserError(f"{path}: no such folder: {path.parent}")


def write_record(folder: Path, record: dict[str, Any], out: Path | None = None) -> Path:
    """Write a record to `out`, or under ``folder/evaluations``, named after its time and its measurements.

    Args:
        record: plain types, with ``measured``, the kinds of measurements; ``format`` and ``time`` are added.

    Returns:
        The file.

    Raises:
        UserError: it cannot be written.
    """
    record = {"format": FORMAT, "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), **record}
    path = out or _unused(Path(folder) / FOLDER, f"{record['time'].replace(':', '-')}_{'-'.join(record['measured'])}")
    path.parent.mkdir(exist_ok=True)
    write_json(path, record)
    return path


def _unused(folder: Path, name: str) -> Path:
    """Create an empty file with an unused name: two evaluations may end in the same second."""
    folder.mkdir(parents=True, exist_ok=True)
    path, again = folder / f"{name}.json", 1
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            again += 1
            path = folder / f"{name}_{again}.json"
        else:
            return path


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a folder, oldest first, each with its ``file``; other files are ignored."""
    found = []
    for path in sorted((Path(folder) / FOLDER).glob("*.json")):
        if path.stat().st_size and (record := read_json(path)).get("format") == FORMAT:
            found.append({**record, "file": str(path)})
    return sorted(found, key=lambda record: record["time"])


def newest_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the newest record of each kind: clean, fgsm, pgd, cw, autoattack, gradients, torchattacks."""
    return {kind: record for record in records(folder) for kind in record["measured"]}


def save_adversarial(path: Path, x: Tensor, y: Tensor, found: Attacked) -> None:
    """Write an .npz with x and x_adv, (N, C, H, W) float32 in [0, 1], and y and predictions, (N,) int64.

    Raises:
        UserError: it cannot be written.
    """
    import numpy as np

    arrays = {"x": as_pixels(x).float(), "x_adv": found.x_adv, "y": y, "predictions": found.predictions}
    path.parent.mkdir(exist_ok=True)
    on_cpu = {name: tensor.cpu().contiguous().numpy() for name, tensor in arrays.items()}
    write_atomically(path, lambda file: np.savez_compressed(file, **on_cpu))


NAMES = {"clean": "clean", "fgsm": "FGSM", "pgd": "PGD", "cw": "C&W", "autoattack": "AutoAttack"}


def attack_label(attack: str, steps: int | None = None, restarts: int = 1, points: Sequence[dict] = ()) -> str:
    """Return the printed name of an attack: PGD-20, "PGD-100, 5 starts" with restarts, AutoAttack with its version.

    Args:
        points: its measurements, as returned by ``accuracy_curve`` and ``autoattack_curve``.
    """
    versions = [point["result"]["version"] for point in points if point.get("result")]
    if versions:
        return autoattack_label(versions[0])
    if attack not in STEPS:
        return NAMES[attack]
    return f"{NAMES[attack]}-{steps or STEPS[attack]}" + (f", {restarts} starts" if restarts > 1 else "")


def record_text(record: dict[str, Any]) -> str:
    """Format the figures of a record: accuracies in per cent with two decimals, with definitions where needed.

    Args:
        record: as ``evaluate.py`` writes it: ``settings`` with steps and restarts, and any of ``accuracies``,
            ``per_class``, ``torchattacks``, ``gradients``.
    """
    lines = [*_accuracies(record)]
    if "per_class" in record:
        lines += ["", *_per_class(record)]
    if "torchattacks" in record:
        lines += ["", *_torchattacks(record["torchattacks"])]
    if "gradients" in record:
        lines += ["", *_gradients(record["gradients"])]
    return "\n".join(lines)


def _label(attack: str, record: dict[str, Any]) -> str:
    settings, points = record["settings"], record["accuracies"].get(attack, ())
    return attack_label(attack, settings["steps"], settings["restarts"], points)


def _accuracies(record: dict[str, Any]) -> Iterator[str]:
    if not record["accuracies"]:
        return
    width = max(22, *(len(_label(attack, record)) + 1 for attack in record["accuracies"]))
    yield f"  {'attack':<{width}}{'epsilon':>9}{'accuracy':>11}   95 % interval    images  attacked"
    for attack, points in record["accuracies"].items():
        for point in points:
            low, high = point["interval"]
            yield (
                f"  {_label(attack, record):<{width}}{budget(point['epsilon']):>9}"
                f"{100 * point['accuracy']:>9.2f} %   {100 * low:5.2f} to {100 * high:6.2f} %{point['examples']:>8}"
                f"  {' + '.join(map(str, point['attacked']))}"
            )


def _per_class(record: dict[str, Any]) -> Iterator[str]:
    per_class = record["per_class"]
    attacks = per_class["attacks"]
    strongest = list(attacks)[-1]
    by_class = {attack: {row["class"]: row for row in rows} for attack, rows in attacks.items()}
    yield f"by class at epsilon {budget(per_class['epsilon'])}, the worst under {_label(strongest, record)} first"
    width = max(len(row["class"]) for row in (*attacks[strongest], {"class": "class"})) + 2
    labels = [_label(attack, record) for attack in attacks]
    widths = [max(len(label) + 3, 11) for label in labels]
    yield f"  {'class':<{width}}{'images':>6}" + "".join(map(str.rjust, labels, widths))
    for row in attacks[strongest]:
        name = row["class"]
        cells = (f"{100 * of[name]['accuracy']:.2f} %" if name in of else "-" for of in by_class.values())
        yield f"  {name:<{width}}{row['examples']:>6}" + "".join(map(str.rjust, cells, widths))


def _torchattacks(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "comparison with torchattacks: same images, epsilon, step size and steps (without C&W, an L2 attack there)"
    for row in rows:
        verdict = "DIFFERENCE at the 5 % level" if row["beyond_noise"] else "no difference at the 5 % level"
        yield (
            f"  {attack_label(row['attack'], row['steps']):<12}ours {100 * row['ours']:.2f} %, torchattacks "
            f"{100 * row['torchattacks']:.2f} %; {row['only_ours']} images misclassified only under ours, "
            f"{row['only_theirs']} only under theirs: {verdict} (McNemar p = {row['p']:.2f})"
        )


def _gradients(report: dict[str, Any]) -> Iterator[str]:
    yield "input gradients of student and teacher, for each scalar f"
    yield f"  {'f':<16}{'GD':>12}{'GC':>9}{'remainder: student':>21}{'teacher':>9}"
    for name, row in report["scalars"].items():
        yield (
            f"  {name:<16}{row['gd']:>12.4f}{row['gc']:>9.4f}"
            f"{row['remainder_student']:>21.4f}{row['remainder_teacher']:>9.4f}"
        )
    for name, row in report["scalars"].items():
        yield f"  {name}: f = {row['definition']}"
    yield f"  {report['alignment_definition']}"
    yield f"  {report['remainder_definition']}; at epsilon {budget(report['epsilon'])}"


def differences(record: dict[str, Any], config: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Describe other data, another teacher, and accuracies that differ although the settings are equal.

    Args:
        record: the evaluation's record, as ``evaluate.py`` writes it.
        config, result: the run's config.json and result.json, or {}.
    """
    found = []
    for name, what in (("dataset_sha256", "data"), ("teacher_sha256", "teacher")):
        here, there = record[name], config.get(name)
        if here and there and here != there:
            found.append(f"the {what} differs from the run's: SHA-256 {here[:12]}..., in config.json {there[:12]}...")
    if result.get("student_sha256") != record["student_sha256"]:
        return found
    for name, (here, there) in _measured_in_the_same_way(record, config, result).items():
        if here != there:
            found.append(f"{name} is {100 * here:.2f} % here and {100 * there:.2f} % in result.json")
    return found


def _measured_in_the_same_way(
    record: dict[str, Any], config: dict[str, Any], result: dict[str, Any]
) -> dict[str, tuple[float, float]]:
    """Pair the accuracies of record and result.json that were measured on the same images with the same settings."""
    settings, accuracies, same = record["settings"], record["accuracies"], {}
    if record["test_examples"] == result.get("test_examples"):
        if "clean" in accuracies:
            same["clean"] = (accuracies["clean"][0]["accuracy"], result["clean"])
        monitored = {"epsilons": [config.get("settings", {}).get("epsilon")], "restarts": 1, "start_seed": 0}
        usual = settings["steps"] in (None, STEPS["pgd"]) and all(settings[key] == monitored[key] for key in monitored)
        if "pgd" in accuracies and usual:
            same["PGD-20"] = (accuracies["pgd"][0]["accuracy"], result["pgd20"])
    attack, own = accuracies.get("autoattack", [{}])[0].get("result"), result.get("autoattack")
    if attack and own and all(attack[key] == own.get(key) for key in ("examples", "epsilon", "seed", "batch")):
        same["AutoAttack"] = (attack["accuracy"], own["accuracy"])
    return same
