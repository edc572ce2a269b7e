"""Finished runs side by side: the table on the terminal and as Markdown, the plot, and how far to trust a difference.

Runs that differ in nothing but their seed are one row. A method that adds something to a base method (config.json's
"adds") stands beside its baseline, and its gain, the AutoAttack accuracy minus the baseline's, is printed only if the
two rows were made under the same conditions; if they were not, the error after the table says in what they differ.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from experiment import UserError, cli
from experiment.files import write_atomically
from experiment.report.results import escaped, read_run
from experiment.report.statistics import gains_of, rows_of
from experiment.report.tables import as_markdown, as_text, notes_of, table_of


def compare(folders: Sequence[Path], out: Path, show: Callable[[str], None] = print) -> tuple[Path, Path]:
    """Compare finished runs: show the table and the notes, write comparison.md and comparison.png into `out`.

    Args:
        folders: run folders, at least one.
        out: created if it does not exist.
        show: takes each text for the terminal.

    Returns:
        The paths of the plot and of the Markdown file.

    Raises:
        UserError: see ``read_run`` and ``rows_of``; a folder given twice; `out` cannot be written to. After all was
            written and shown, the rest without a gain: runs that cannot be subtracted, see ``gains_of``.
    """
    seen: dict[str, Path] = {}
    for folder in folders:
        earlier = seen.setdefault(os.path.realpath(folder), folder)
        if earlier is not folder:
            raise UserError(f"{folder} is given twice (the other time as {earlier}); give every run once")
    rows = rows_of([read_run(folder) for folder in folders])
    gains, refusals = gains_of(rows)
    table, notes = table_of(rows, gains), [*notes_of(rows, gains), *(f"No gain: {refusal}." for refusal in refusals)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made a folder: {error.strerror}") from error
    from experiment.report.plots import plot  # matplotlib takes a second

    picture, markdown = out / "comparison.png", out / "comparison.md"
    plot(rows, picture)
    text = as_markdown(rows, table, notes, picture.name)
    write_atomically(markdown, lambda file: file.write(escaped(text).encode()))
    for part in (as_text(table), "", *notes, "", f"plot      {picture}", f"markdown  {markdown}"):
        show(escaped(part))
    if refusals:
        raise UserError("; ".join(refusals))
    return picture, markdown


def main(argv: Sequence[str] | None = None) -> None:
    """Parse RUN_DIR... and --out, and compare."""
    parser = cli.Parser(prog="compare.py", description="finished runs side by side: table, Markdown and plot")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,  # depends on the others: keeps "default: None" out of --help
        help="folder for comparison.md and comparison.png; default the runs' common parent, or . if there is none",
    )
    args = parser.parse_args(argv)
    compare(args.run_dirs, getattr(args, "out", None) or _common_parent(args.run_dirs))


def _common_parent(folders: Sequence[Path]) -> Path:
    """The folder that holds all of them, shown from here if it lies below; else the current one."""
    parents = {Path(os.path.abspath(folder)).parent for folder in folders}
    here, parent = Path.cwd(), parents.pop()
    if parents:
        return Path(".")
    return parent.relative_to(here) if parent.is_relative_to(here) else parent
