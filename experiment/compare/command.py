"""compare.py: runs side by side on the terminal, as Markdown, plots, CSV, LaTeX, a page, and records."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import UserError, cli
from experiment.compare.comparison import Comparison, comparison_of
from experiment.compare.documents import as_document, fill_marks
from experiment.compare.notes import notes_of
from experiment.compare.read import read_runs
from experiment.compare.records import write_records
from experiment.compare.tables import HEADS, as_csv, as_latex, short_columns, tables_of
from experiment.files import write_atomically
from experiment.text import as_text, escaped

FILES = {
    "csv": "a line per run, accuracies as fractions",
    "latex": "the table of results as a booktabs tabular that fits a column",
    "html": "one page with everything, that opens without network",
    "records": "the finished runs in one small file, which compare.py takes in their place",
}
"""What can be written beside comparison.md and the plots, by flag."""


def compare(
    sources: Sequence[Path],
    out: Path,
    *,
    columns: Sequence[str] = (),
    files: Mapping[str, Path] | None = None,
    show: Callable[[str], None] = print,
) -> Comparison:
    """Compare runs: show tables and notes; write comparison.md and the plots (PNG, PDF, SVG) into `out`.

    Args:
        sources: run folders, folders that hold run folders, studies (.toml) or records (.json).
        out: created if it does not exist.
        columns: keys of ``tables.HEADS`` to show in the table of results; default what was measured.
        files: what else to write, by name: csv, latex, html, records.
        show: takes each text for the terminal.

    Raises:
        UserError: a source is none of these or damaged; two runs have the same settings and seed; a file cannot be
            written. After all was written and shown: a run and its baseline differ in more than the addition.
    """
    files = files or {}
    comparison = comparison_of(read_runs(sources))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made a folder: {error.strerror}") from error
    from experiment.compare.figures import all_figures, write_figures  # matplotlib takes a second

    tables, notes, figures = tables_of(comparison, columns), notes_of(comparison), all_figures(comparison)
    plots = write_figures(figures, out)
    _write(out / "comparison.md", _markdown(comparison, tables, notes, figures))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for text in (*(as_text(table, width) + "\n" for table in tables), *notes):
        show(escaped(text))
    show(escaped(f"\nplots     {', '.join(map(str, plots))}" if plots else "\nno plots: no run is finished"))
    show(escaped(f"markdown  {out / 'comparison.md'}"))
    for name, path in files.items():
        if name == "csv":
            _write(path, as_csv(comparison))
        elif name == "latex":
            _write(path, as_latex(comparison, columns))
        elif name == "html":
            from experiment.compare.page import page

            short = tables_of(comparison, columns or (short_columns(comparison) if comparison.groups else ()))
            _write(path, page(comparison, short, notes, figures))
        else:
            write_records(path, [run for group in comparison.groups for run in group.runs])
        show(escaped(f"{name:<8}  {path}"))
    if comparison.refusals:
        raise UserError("; ".join(comparison.refusals))
    return comparison


def _markdown(comparison: Comparison, tables: list, notes: list[str], figures: Mapping[str, Any]) -> str:
    parts = [as_document(tables, notes), *(f"![{name}]({name}.png)" for name in figures)]
    if comparison.groups:
        lines = []
        for group in comparison.groups:
            for run in group.runs:
                what = f"# {group.label}, {run.teacher}, {run.student}, seed {run.seed}: {run.environment['hardware']}"
                # One line each: a line break in a quoted argument could end the code block.
                lines += [" ".join(text.split()) for text in (what, run.command)]
        parts += ["Commands:", "\n".join(["```sh", *lines, "```"])]
    return "\n\n".join(parts) + "\n"


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(escaped(text).encode()))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse what to compare and where to write it, and compare."""
    parser = cli.Parser(
        "compare.py",
        description="Compare runs side by side: tables, plots, page.",
        examples=("runs", "runs/BASELINE runs/IGDM --html comparison.html"),
    )
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="a run folder, a folder that holds run folders, a study (.toml), or records (.json)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,  # depends on the others: keeps "default: None" out of --help
        help="folder for comparison.md and the plots; default the runs' common parent, or . if there is none",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=tuple(HEADS),
        default=[],
        metavar="NAME",
        help=f"columns of the table of results: {', '.join(HEADS)}; default all that were measured; for --latex, "
        "--html and a table in a document method, clean, autoattack and gain",
    )
    for flag, what in FILES.items():
        parser.add_argument(f"--{flag}", type=Path, metavar="FILE", help=f"also write {what}")
    parser.add_argument(
        "--insert",
        type=Path,
        metavar="FILE.md",
        help="write no comparison.md; put the tables of every records file and study NAME between the lines "
        "<!-- begin NAME --> and <!-- end NAME --> of FILE.md (or NAME table: one table; A+B gains figure: a figure)",
    )
    args = parser.parse_args(argv)
    files = {flag: path for flag in FILES if (path := getattr(args, flag))}
    if args.insert:
        others = [*(["out"] if "out" in args else []), *files]
        if others:
            parser.error(f"argument --insert: writes nothing else; not together with --{others[0]}")
        print(*fill_marks(args.insert, args.sources, args.columns), sep="\n")
        return
    for flag, path in files.items():
        if not path.parent.is_dir():
            raise UserError(f"--{flag} {path}: {path.parent} is not a folder")
    taken = [source for source in args.sources if source.suffix == ".json" and source.is_file()]
    if args.records and taken:
        raise UserError(f"--records needs run folders; {taken[0]} is a records file")
    compare(args.sources, getattr(args, "out", None) or _common_parent(args.sources), columns=args.columns, files=files)


def _common_parent(sources: Sequence[Path]) -> Path:
    """The folder that holds all run folders, relative if it is below the current one; else the current one."""
    folders = {Path(os.path.abspath(source)) for source in sources}
    parents = {path.parent if (path / "config.json").is_file() or path.is_file() else path for path in folders}
    current, parent = Path.cwd(), parents.pop()
    if parents:
        return Path(".")
    return parent.relative_to(current) if parent.is_relative_to(current) else parent
