"""The table of runs and the notes under it, as text and as Markdown."""

import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import fmean, stdev

from experiment.report.results import ABSENT, listed, shown
from experiment.report.statistics import Gain, Row, gain_uncertainty, half_width


def _points(values: Sequence[float], sign: str = "") -> str:
    """Per cent with two decimals, with the sample standard deviation where there are several; '-' for none."""
    if not values:
        return "-"
    mean = f"{100 * fmean(values):{sign}.2f}"
    return f"{mean} ± {100 * stdev(values):.2f}" if len(values) > 1 else mean


def labels_of(rows: Sequence[Row]) -> list[str]:
    """Method names; rows of one name also get the settings in which they differ ('lr 0.1')."""
    labels = []
    for row in rows:
        twins = [other.first.conditions for other in rows if other.pair == row.pair and other.name == row.name]
        varying = [
            f"{key} {shown(row.first.conditions.get(key, ABSENT))}"
            for key in dict.fromkeys(key for conditions in twins for key in conditions)
            if any(conditions.get(key) != row.first.conditions.get(key) for conditions in twins)
        ]
        labels.append(f"{row.name} ({', '.join(varying)})" if varying else row.name)
    return labels


def table_of(rows: Sequence[Row], gains: Sequence[Gain]) -> list[list[str]]:
    """The table as text cells, header first; accuracies in per cent, gains in points."""
    adds = "/".join(dict.fromkeys(row.first.adds for row in rows if row.first.adds))
    gain_of = {id(gain.row): gain.by_seed for gain in gains}
    header = ["method", "teacher", "student", "dataset", "clean", "PGD-20", "AutoAttack", f"{adds} gain".strip()]
    table = [[*header, "n seeds", "AutoAttack images"]]
    for row, label in zip(rows, labels_of(rows), strict=True):
        run = row.first
        figures = [_points(row.values(figure)) for figure in ("clean", "pgd20", "autoattack")]
        gain = _points(gain_of.get(id(row), ()), "+")
        images = str(run.attack.get("examples", "-"))
        table.append([label, run.teacher, run.student, run.dataset, *figures, gain, str(len(row.runs)), images])
    return table


def notes_of(rows: Sequence[Row], gains: Sequence[Gain]) -> list[str]:
    """What must be known to read the table: units, attacks, uncertainty, and what differs between paired runs."""
    labels = {id(row): label for row, label in zip(rows, labels_of(rows), strict=True)}
    tested = listed(sorted({run.test_examples for row in rows for run in row.runs}))
    notes = [f"Accuracies in per cent; clean and PGD-20 on all {tested} test images, gains in points of AutoAttack."]
    if any(len(row.runs) > 1 for row in rows):
        notes.append("Mean ± sample standard deviation (n - 1) over seeds where n seeds is above 1.")
    notes += _attack_notes(rows, labels)
    notes += _gain_notes(gains, labels)
    for row in rows:
        if row.first.adds and not any(other.pair == row.pair and other.first.adds is None for other in rows):
            notes.append(
                f"{labels[id(row)]} ({row.first.teacher}, {row.first.student}, {row.first.dataset}): no gain, as no "
                f"run of {row.first.method} alone with the same teacher, student and dataset is listed."
            )
    return notes


def _attack_notes(rows: Sequence[Row], labels: dict[int, str]) -> list[str]:
    kinds: dict[tuple[str, float], list[str]] = {}
    widths: dict[int, list[float]] = {}
    for row in rows:
        if not row.first.attack:
            continue
        kinds.setdefault((row.first.attack["version"], row.first.attack["epsilon"]), []).append(labels[id(row)])
        examples, accuracy = row.first.attack["examples"], fmean(row.values("autoattack"))
        widths.setdefault(examples, []).append(100 * half_width(accuracy, examples))
    notes = []
    for (version, epsilon), users in kinds.items():
        whose = "" if len(kinds) == 1 else f" ({', '.join(dict.fromkeys(users))})"
        notes.append(f"AutoAttack: {version}, epsilon {_budget(epsilon)}{whose}.")
    for examples, measured in widths.items():
        low, high = f"{min(measured):.1f}", f"{max(measured):.1f}"
        spread = low if low == high else f"{low} to {high}"
        notes.append(f"Uncertainty of an AutoAttack accuracy: ± {spread} points on {examples} images (95 %, binomial).")
    for row in rows:
        for run in row.runs:
            notes += [f"{labels[id(row)]}, seed {run.seed}, AutoAttack warned: {text}." for text in run.warnings]
    return notes


def _gain_notes(gains: Sequence[Gain], labels: dict[int, str]) -> list[str]:
    notes = []
    for gain in gains:
        n = len(gain.by_seed)
        mean, uncertainty = fmean(gain.by_seed), gain_uncertainty(gain)
        verdict = "within noise" if abs(mean) < uncertainty else "beyond this uncertainty"
        spread = "" if n == 1 else f" and t interval over {n} seeds"
        notes.append(
            f"{labels[id(gain.row)]} minus {labels[id(gain.baseline)]} ({gain.row.first.teacher}, "
            f"{gain.row.first.student}, {gain.row.first.dataset}): {100 * mean:+.2f} points, uncertainty of the "
            f"difference ± {100 * uncertainty:.1f} points (95 %, unpaired binomial{spread}): {verdict}."
        )
        runs = (*gain.baseline.runs, *gain.row.runs)
        changed = []
        for key in dict.fromkeys(key for run in runs for key in run.circumstances):
            values = dict.fromkeys(shown(run.circumstances.get(key, ABSENT)) for run in runs)
            changed += [f"{key} {' and '.join(values)}"] if len(values) > 1 else []
        if changed:
            notes.append(f"These runs were not made in the same place: {'; '.join(changed)}.")
    if gains:
        notes.append(
            "Which images fell is not recorded: the difference is treated as unpaired, which errs on the wide side."
        )
    if any(len(gain.by_seed) == 1 for gain in gains):
        notes.append("With a single seed a difference includes seed noise, which the interval above does not cover.")
    return notes


def _budget(epsilon: float) -> str:
    """8/255 rather than 0.03137."""
    whole = Fraction(epsilon * 255).limit_denominator(10)
    return f"{whole.numerator}/255" if whole.denominator == 1 and math.isclose(whole / 255, epsilon) else f"{epsilon:g}"


def as_text(table: Sequence[Sequence[str]]) -> str:
    """The table in aligned columns, figures to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 4 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def as_markdown(rows: Sequence[Row], table: Sequence[Sequence[str]], notes: Sequence[str], plot: str) -> str:
    """The table, the notes, the plot, and the hardware and command of every run."""
    lines = [_markdown_row(table[0]), _markdown_row(["---"] * 4 + ["---:"] * (len(table[0]) - 4))]
    lines += [_markdown_row(cells) for cells in table[1:]]
    lines += ["", *(f"- {_markdown(note)}" for note in notes), "", f"![Accuracy by epoch, AutoAttack accuracy]({plot})"]
    lines += ["", "Commands:", "", "```sh"]
    for row, label in zip(rows, labels_of(rows), strict=True):
        for run in row.runs:
            # One line each: a line break in a quoted argument could end the code block.
            title = f"# {label}, {run.teacher}, {run.student}, seed {run.seed}: {run.circumstances['hardware']}"
            lines += [" ".join(title.split()), " ".join(run.command.split())]
    return "\n".join([*lines, "```", ""])


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{character}" if character in r"\`*_<>|[]" else character for character in " ".join(text.split()))


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell if set(cell) <= set('-:') else _markdown(cell) for cell in cells)} |"
