"""compare.py: runs side by side on the terminal, as Markdown, plots, CSV, LaTeX, a page, and records."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiment import UserError, cli
from experiment.compare.comparison import Comparison, comparison_of
from experiment.compare.documents import as_document, commands_of, fill_marks, page
from experiment.compare.notes import notes_of
from experiment.compare.read import read_runs, records_of
from experiment.compare.tables import HEADS, as_csv, as_latex, short_columns, tables_of
from experiment.files import write_atomically
from experiment.text import as_text, escaped

FILES = {
    "csv": "a line per run, accuracies as fractions",
    "latex": "the table of results as a booktabs tabular that fits a column",
    "html": "one self-contained page",
    "records": "the finished runs as one small file, a source for compare.py",
}
"""What can be written beside comparison.md and the plots, by flag."""


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
        help="folder for comparison.md and the plots (default: the folder that holds the runs)",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=tuple(HEADS),
        default=[],
        metavar="NAME",
        help=f"columns of the table of results: {', '.join(HEADS)}; default method, clean, autoattack and gain; "
        "in comparison.md all that were measured",
    )
    for flag, what in FILES.items():
        parser.add_argument(f"--{flag}", type=Path, metavar="FILE", help=f"also write {what}")
    parser.add_argument(
        "--insert",
        type=Path,
        metavar="FILE.md",
        help="only fill the places of FILE.md that lines <!-- begin NAME --> and <!-- end NAME --> enclose; NAME is a "
        "records file or study, with 'table' or 'gains figure' after it for that part alone",
    )
    args = parser.parse_args(argv)
    files = {flag: path for flag in FILES if (path := getattr(args, flag))}
    if args.insert:
        if args.out or files:
            parser.error(f"argument --insert: writes nothing else; not together with --{[*files, 'out'][0]}")
        print(*fill_marks(args.insert, args.sources, args.columns), sep="\n")
        return
    folders = [path for path in args.sources if path.is_dir()]
    parents = {path.parent if (path / "config.json").is_file() else path for path in folders}
    out = parents.pop() if len(parents) == 1 else Path(".")
    comparison = comparison_of(read_runs(args.sources))
    _show(comparison, args.out or out, args.columns, files)
    if comparison.refusals:  # after all was written and shown
        raise UserError("; ".join(comparison.refusals))


def _show(comparison: Comparison, out: Path, columns: Sequence[str], files: Mapping[str, Path]) -> None:
    """Print tables and notes; write comparison.md and the plots (PNG, PDF, SVG) into `out`, and `files` by FILES."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made a folder: {error.strerror}") from error
    from experiment.compare.figures import all_figures, write_figures  # matplotlib takes a second

    tables, notes, figures = tables_of(comparison, columns), notes_of(comparison), all_figures(comparison)
    plots = write_figures(figures, out)
    parts = [as_document(tables, notes), *(f"![{name}]({name}.png)" for name in figures)]
    if commands := commands_of(comparison):
        parts += ["Commands:", "\n".join(["```sh", *commands, "```"])]
    _write(out / "comparison.md", "\n\n".join(parts) + "\n")
    short = tables_of(comparison, columns or short_columns(comparison))
    lines = [*(as_text(table) + "\n" for table in short), *notes]
    lines += [f"\nplots     {', '.join(map(str, plots))}" if plots else "\nno plots: no run is finished"]
    lines += [f"markdown  {out / 'comparison.md'}, with all columns"]
    contents = {
        "csv": lambda: as_csv(comparison),
        "latex": lambda: as_latex(comparison, columns),
        "html": lambda: page(comparison, short, notes),
        "records": lambda: records_of([run for group in comparison.groups for run in group.runs]),
    }
    for name, path in files.items():
        _write(path, contents[name]())
        lines.append(f"{name:<8}  {path}")
    print(escaped("\n".join(lines)))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(escaped(text).encode()))
