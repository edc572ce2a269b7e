"""The tables of a comparison, as Markdown, LaTeX and CSV: results, beside published figures, and unfinished runs."""

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from experiment.compare.comparison import Comparison, SeedGroup
from experiment.compare.runs import FIGURES, Experiment, PendingRun
from experiment.text import TEXT_COLUMNS, Table, points, spread

HEADS = {
    **{name: name for name in ("method", "teacher", "student", "dataset", "clean")},
    "pgd20": "PGD-20",
    "autoattack": "AutoAttack",
    "few_classes": "fewer than 10 classes",
    "gain": "gain (95 % interval)",
    "gd": "GD",
    "gc": "GC",
    "logit_gd": "logit GD",
    "logit_gc": "logit GC",
    "best_minus_last": "best - last",
    "best_autoattack": "best AutoAttack",
    "holdout_pgd10": "holdout PGD-10",
    "swa_autoattack": "SWA AutoAttack",
    "seeds": "n seeds",
    "images": "AutoAttack images",
}
"""The head of each column, by its name for --columns."""
ALWAYS = ("method", "teacher", "student", "dataset", "clean", "pgd20", "autoattack", "gain", "seeds", "images")
"""Columns that are shown by default; the others only where something was measured for them."""
DIGITS = {"gd": 4, "gc": 3, "logit_gd": 3, "logit_gc": 3}
"""Decimals of what is not an accuracy."""


def tables_of(comparison: Comparison, columns: Sequence[str] = ()) -> list[Table]:
    """The tables that have rows; the first is that of the results, if a run is finished."""
    made = [
        results_table(comparison, columns) if comparison.groups else [],
        _published_table(comparison),
        _pending_table(comparison.pending),
    ]
    return [table for table in made if table]


def results_table(comparison: Comparison, columns: Sequence[str] = ()) -> Table:
    """Accuracies in per cent, gains in points; without `columns`, those that something was measured for."""
    groups = comparison.groups
    added = "/".join(dict.fromkeys(group.first.added for group in groups if group.first.added))
    cells = {name: [_cell(group, name, comparison) for group in groups] for name in columns or HEADS}
    if not columns:
        always = set(ALWAYS) if added else set(ALWAYS) - {"gain"}
        cells = {name: column for name, column in cells.items() if name in always or set(column) != {"-"}}
    heads = HEADS | {"gain": f"{added} {HEADS['gain']}".strip()}
    return [[heads[name] for name in cells], *map(list, zip(*cells.values(), strict=True))]


def short_columns(comparison: Comparison) -> list[str]:
    """Method, clean, AutoAttack (PGD-20 without it) and gain; teacher, student and dataset where they differ."""
    attacks = sorted({_attack_column(group) for group in comparison.groups} - {""})
    gain = ["gain"] if comparison.gains else []
    return ["method", *comparison.varying, "clean", *(attacks or ["pgd20"]), *gain]


def _attack_column(group: SeedGroup) -> str:
    """The column of AutoAttack: versions for few classes are not comparable with the standard one; "" without."""
    attack = group.first.attack
    return "" if attack is None else "autoattack" if attack.version == "standard" else "few_classes"


def _cell(group: SeedGroup, name: str, comparison: Comparison) -> str:
    run = group.first
    if name == "gain":
        gain = next((gain for gain in comparison.gains if gain.group is group), None)
        low, high = (100 * end for end in gain.interval) if gain else (0, 0)
        return f"{100 * gain.mean:+.2f} ({low:+.2f} to {high:+.2f})" if gain else "-"
    what = {
        "method": group.label,
        **run.names,
        "seeds": str(len(group.runs)),
        "images": str(run.attack.examples) if run.attack else "-",
    }
    if name in what:
        return what[name]
    if name in ("autoattack", "few_classes"):
        if name != _attack_column(group):
            return "-"
        return points(group.values("autoattack")) + (f", {run.attack.version}" if name == "few_classes" else "")
    values = group.values(name)
    return spread(values, DIGITS[name]) if name in DIGITS else points(values, "+" if name == "best_minus_last" else "")


def _published_table(comparison: Comparison) -> Table:
    """Our figures (per cent) beside the published ones and the difference (points); a dash for unfinished runs."""
    rows: list[tuple[str, Experiment, SeedGroup | None]]
    rows = [(group.label, group.first, group) for group in comparison.groups]
    shown = {(run.name, *run.setting) for _, run, _ in rows}
    waiting = {(run.name, *run.setting): run for run in comparison.pending}  # seeds of one experiment once
    rows += [(run.name, run, None) for key, run in waiting.items() if key not in shown]
    table = []
    for name, run, group in rows:
        if cell := run.published:
            row = [name, run.names["teacher"], run.names["student"]]
            for figure in FIGURES:
                ours = group.values(figure) if group else []
                difference = [fmean(ours) - cell[figure]] if ours else []
                row += [points(ours), points([cell[figure]]), points(difference, "+")]
            table.append(row)
    heads = [f"{HEADS[figure]}{part}" for figure in FIGURES for part in ("", ", published", ", difference")]
    return [["method", "teacher", "student", *heads], *table] if table else []


def _pending_table(pending: Sequence[PendingRun]) -> Table:
    rows = [
        [run.folder, run.name, run.names["teacher"], run.names["student"], str(run.settings.seed), run.state]
        for run in pending
    ]
    return [["run", "method", "teacher", "student", "seed", "state"], *rows] if rows else []


def as_markdown(table: Table) -> str:
    """A Markdown table."""
    ruler = ["---" if head in TEXT_COLUMNS else "---:" for head in table[0]]
    rows = [[_markdown_text(cell) if cell != "-" else cell for cell in row] for row in table]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ruler, *rows[1:]))


def _markdown_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(text.split()))


def as_document(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables and notes in Markdown."""
    return "\n\n".join([*map(as_markdown, tables), "\n".join(f"- {_markdown_text(note)}" for note in notes)])


def as_csv(comparison: Comparison) -> str:
    """One line per run, accuracies as fractions: for other programs."""
    from pandas import DataFrame

    names = ("clean", "pgd20", "autoattack", "gd", "gc", "logit_gd", "logit_gc", "best_minus_last")
    gains = {gain.group: gain.by_seed for gain in comparison.gains}
    rows: list[dict[str, Any]] = [
        {
            "method": group.label,
            "base_method": run.method,
            **dict(zip(("teacher", "student", "dataset"), run.setting, strict=True)),
            "seed": run.seed,
            **{name: run.values.get(name) for name in names},
            "gain": gains.get(group, {}).get(run.seed),
            "test_examples": run.result.test_examples,
            "autoattack_examples": run.attack and run.attack.examples,
            "autoattack_version": run.attack and run.attack.version,
            "run": run.folder,
        }
        for group in comparison.groups
        for run in group.runs
    ]
    return DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def as_latex(comparison: Comparison, columns: Sequence[str] = ()) -> str:
    r"""A booktabs tabular of the results that fits a column; it needs ``\usepackage{booktabs}``."""
    from pandas import DataFrame

    table = results_table(comparison, columns or short_columns(comparison))
    frame = DataFrame(table[1:], columns=table[0])
    styler = frame.style.hide(axis="index").format(_latex_cell, escape="latex")
    styler = styler.format_index(_latex_cell, escape="latex", axis=1)
    alignment = "".join("l" if head in TEXT_COLUMNS else "r" for head in table[0])
    made = styler.to_latex(hrules=True, column_format=f"@{{}}{alignment}@{{}}")
    return f"{{\\scriptsize\\setlength{{\\tabcolsep}}{{1.5pt}}%\n{made}}}\n"


def _latex_cell(text: str) -> str:
    """A cell, after LaTeX's characters were escaped: signs in mathematics, deviations and intervals small."""
    text = re.sub(r" ± ([\d.]+)", r" {\\tiny$\\pm$\1}", text)
    text = re.sub(r" \(([+-][\d.]+) to ([+-][\d.]+)\)", r" {\\tiny[$\1$, $\2$]}", text)
    text = re.sub(r" \(95 \\% interval\)", r" {\\tiny[95\\,\\%]}", text)
    return re.sub(r"^([+-])(?=\d)", r"$\1$", text)
