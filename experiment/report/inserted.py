"""Tables in documents, made anew from committed records: no figure is typed."""

from collections.abc import Sequence
from pathlib import Path

from experiment import UserError
from experiment.files import write_atomically
from experiment.report.comparison import Comparison, comparison_of
from experiment.report.exports import as_markdown
from experiment.report.sources import read_sources

TABLE_ONLY = " table"
"""A mark that ends so gets the first table without the notes, for a README."""


def insert(path: Path, sources: Sequence[Path], run_dir: Path = Path("runs")) -> list[str]:
    """Put each source's tables between its marks (``<!-- begin NAME -->``, ``<!-- end NAME -->``) in a document.

    NAME is the file's name without its ending; ``NAME table`` gets the first table alone.

    Returns:
        What was done, a line per mark.

    Raises:
        UserError: the document cannot be read or has no marks for a source.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    said = []
    for source in sources:
        comparison, found = comparison_of(read_sources([source], run_dir)), False
        for mark, part in ((source.stem, described), (source.stem + TABLE_ONLY, first_table)):
            begin, end = f"<!-- begin {mark} -->\n", f"<!-- end {mark} -->"
            before, opened, rest = text.partition(begin)
            _, closed, after = rest.partition(end)
            if opened and closed:
                text, found = f"{before}{begin}{part(comparison)}{end}{after}", True
                said.append(f"{path}: {mark} from {source}")
        if not found:
            raise UserError(f"{path} has no lines '<!-- begin {source.stem} -->' and '<!-- end {source.stem} -->'")
    write_atomically(path, lambda file: file.write(text.encode()))
    return said


def described(comparison: Comparison) -> str:
    """Tables, notes, and by what, where and in how long they were made."""
    runs = [run for group in comparison.groups for run in group.runs]
    if not runs:  # published figures, waiting for ours
        return first_table(comparison)
    hours = sum(sum(run.seconds.values()) for run in runs) / 3600
    hardware = ", ".join(dict.fromkeys(run.environment["hardware"] for run in runs))
    commits = ", ".join(dict.fromkeys(run.environment["commit"][:12] for run in runs))
    return f"{comparison.markdown()}\n{len(runs)} runs, {hours:.1f} hours in all on {hardware}; commit {commits}.\n"


def first_table(comparison: Comparison) -> str:
    """The first table alone."""
    return as_markdown(comparison.tables[0]) + "\n"
