"""An evaluation record as lines for the terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from experiment.evaluation.accuracy import STEPS
from experiment.evaluation.autoattack import autoattack_label
from experiment.text import budget

NAMES = {"clean": "clean", "fgsm": "FGSM", "pgd": "PGD", "cw": "C&W", "autoattack": "AutoAttack"}


def attack_label(attack: str, steps: int | None = None, restarts: int = 1, points: Sequence[dict] = ()) -> str:
    """What an attack is called in print: PGD-20, "PGD-100, 5 starts" with restarts, AutoAttack with its version.

    Args:
        points: what was measured with it, as of ``accuracy_curve`` and ``autoattack_curve``.
    """
    versions = [point["result"]["version"] for point in points if point.get("result")]
    if versions:
        return autoattack_label(versions[0])
    if attack not in STEPS:
        return NAMES[attack]
    return f"{NAMES[attack]}-{steps or STEPS[attack]}" + (f", {restarts} starts" if restarts > 1 else "")


def record_text(record: dict[str, Any]) -> str:
    """The figures of a record: accuracies in per cent with two decimals, each with its definition where it needs one.

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
    yield "torchattacks beside ours: same images, epsilon, step and steps (its C&W bounds no L-infinity norm: left out)"
    for row in rows:
        verdict = "BEYOND sampling noise" if row["beyond_noise"] else "within sampling noise"
        yield (
            f"  {attack_label(row['attack'], row['steps']):<12}ours {100 * row['ours']:.2f} %, torchattacks "
            f"{100 * row['torchattacks']:.2f} %; {row['only_ours']} images fell to ours alone, {row['only_theirs']} to "
            f"theirs alone: {verdict} (p = {row['p']:.2f})"
        )


def _gradients(report: dict[str, Any]) -> Iterator[str]:
    yield "input gradients of student and teacher, by the scalar f whose gradient is taken"
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
