"""compare.py: runs side by side on the terminal, as Markdown, plots, CSV, LaTeX, a page, and records."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiment import UserError, cli
from experiment.compare.comparison import Comparison, comparison_of
from experiment.compare.exports import as_csv, as_latex, commands
from experiment.compare.inserted import insert
from experiment.compare.records import write_records
from experiment.compare.sources import read_sources
from experiment.compare.text import escaped
from experiment.files import write_atomically
from experiment.text import as_text


def compare(sources: Sequence[Path], out: Path, show: Callable[[str], None] = print) -> Comparison:
    """Compare runs: show tables and notes; write comparison.md and the plots (PNG, PDF, SVG) into `out`.

    Args:
        sources: see ``read_sources``.
        out: created if it does not exist.
        show: takes each text for the terminal.

    Raises:
        UserError: see ``read_sources`` and ``comparison_of``; `out` cannot be written to. After all was written and
            shown, the rest without a gain: runs that cannot be subtracted, see ``gains_of``.
    """
    comparison = comparison_of(read_sources(sources))
    _write(comparison, out, show)
    _refuse(comparison)
    return comparison


def _write(comparison: Comparison, out: Path, show: Callable[[str], None]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made a folder: {error.strerror}") from error
    from experiment.compare.plots import draw_all  # matplotlib takes a second

    plots = draw_all(comparison.groups, comparison.gains, out)
    pictures = [f"![{path.stem}]({path.name})" for path in plots if path.suffix == ".png"]
    parts = [comparison.markdown(), *pictures]
    parts += ["Commands:", commands(comparison.groups)] if comparison.groups else []
    path = out / "comparison.md"
    _write_text(path, "\n\n".join(part.rstrip("\n") for part in parts) + "\n")
    width = _terminal_width()
    for table in comparison.tables:
        show(escaped(as_text(table, width)) + "\n")
    for note in comparison.notes:
        show(escaped(note))
    show(
        escaped(f"\nplots     {', '.join(str(path) for path in plots)}" if plots else "\nno plots: nothing is finished")
    )
    show(escaped(f"markdown  {path}"))


def _refuse(comparison: Comparison) -> None:
    if comparison.refusals:
        raise UserError("; ".join(comparison.refusals))


def _terminal_width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _write_text(path: Path, text: str) -> None:
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
    files = {
        "csv": "a line per run, accuracies as fractions",
        "latex": "the table of results as a booktabs tabular",
        "html": "one page with everything, that opens without network",
        "records": "the finished runs in one small file, which compare.py takes in their place",
    }
    for flag, what in files.items():
        parser.add_argument(f"--{flag}", type=Path, metavar="FILE", help=f"also write {what}")
    parser.add_argument(
        "--insert",
        type=Path,
        metavar="FILE.md",
        help="write no comparison.md; put the tables of every records file and study NAME between the lines "
        "<!-- begin NAME --> and <!-- end NAME --> of FILE.md (or NAME table: one table; A+B gains figure: a figure)",
    )
    args = parser.parse_args(argv)
    if args.insert:
        others = [flag for flag in ("out", *files) if getattr(args, flag, None)]
        if others:
            parser.error(f"argument --insert: writes nothing else; not together with --{others[0]}")
        print(*insert(args.insert, args.sources), sep="\n")
        return
    for flag in files:
        if (path := getattr(args, flag)) and not path.parent.is_dir():
            raise UserError(f"--{flag} {path}: {path.parent} is not a folder")
    runs = read_sources(args.sources)
    if args.records and len(runs.folders) < len(runs.finished):
        raise UserError("--records is made of run folders; records among the sources are not taken over")
    comparison = comparison_of(runs)
    _write(comparison, getattr(args, "out", None) or _common_parent(args.sources), print)
    if args.csv:
        _write_text(args.csv, as_csv(comparison.groups, comparison.gains))
    if args.latex and comparison.groups:
        _write_text(args.latex, as_latex(comparison.groups, comparison.tables[0]))
    if args.html:
        from experiment.compare.page import page

        _write_text(args.html, page(comparison))
    if args.records:
        write_records(args.records, runs.folders)
    for flag in files:
        if (path := getattr(args, flag)) and (flag != "latex" or comparison.groups):
            print(f"{flag:<8}  {path}")
    _refuse(comparison)


def _common_parent(sources: Sequence[Path]) -> Path:
    """The folder that holds all run folders, shown from here if it lies below; else the current one."""
    folders = {Path(os.path.abspath(source)) for source in sources}
    parents = {path.parent if (path / "config.json").is_file() or path.is_file() else path for path in folders}
    here, parent = Path.cwd(), parents.pop()
    if parents:
        return Path(".")
    return parent.relative_to(here) if parent.is_relative_to(here) else parent
