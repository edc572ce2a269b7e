"""Tables and figures in documents, made anew from committed records: no figure is typed or drawn by hand.

A mark is ``<!-- begin WHAT -->`` on a line of its own, up to ``<!-- end WHAT -->``. WHAT is the name of a records file
or study (without its ending; several joined by ``+`` are read together), and after it

    nothing       tables, notes, and by what, where and in how long the runs were made
    table         the first table alone, for a README
    NAME figure   one figure of compare.py (gains, alignment, ...), as an SVG in the folder figures beside the document
"""

import re
from collections.abc import Sequence
from pathlib import Path

from experiment import UserError
from experiment.compare.comparison import Comparison, comparison_of
from experiment.compare.exports import as_markdown
from experiment.compare.sources import read_sources
from experiment.files import write_atomically

_MARK = re.compile(
    r"^<!-- begin (([\w.+-]+)(?: (table|(\w+) figure))?) -->\n((?:(?!<!-- begin ).)*?)<!-- end \1 -->$",
    re.DOTALL | re.MULTILINE,
)
FIGURES = "figures"
"""Folder beside the document."""


def insert(path: Path, sources: Sequence[Path], run_dir: Path = Path("runs")) -> list[str]:
    """Fill every mark of a document whose sources are all given.

    Returns:
        What was done, a line per mark, and a line per source that has none.

    Raises:
        UserError: the document cannot be read, or has no mark for any source; a mark names a figure that these runs
            have nothing to show in.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    by_name = {source.stem: source for source in sources}
    if len(by_name) < len(sources):
        names = [source.stem for source in sources]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two sources are called {twice}: give either the study or its records")
    comparisons: dict[str, Comparison] = {}
    said = []

    def filled(mark: re.Match[str]) -> str:
        what, names, part, figure, _ = mark.groups()
        if not by_name.keys() >= set(names.split("+")):
            return mark[0]
        if names not in comparisons:
            chosen = [by_name[name] for name in names.split("+")]
            comparisons[names] = comparison_of(read_sources(chosen, run_dir))
        comparison = comparisons[names]
        if figure:
            content = _picture(comparison, path, names, figure)
        else:
            content = first_table(comparison) if part else described(comparison)
        said.append(f"{path}: {what}")
        return f"<!-- begin {what} -->\n{content}<!-- end {what} -->"

    made = _MARK.sub(filled, text)
    if not said:
        name = next(iter(by_name))
        raise UserError(f"{path} has no lines '<!-- begin {name} -->' and '<!-- end {name} -->'")
    write_atomically(path, lambda file: file.write(made.encode()))
    used = {name for names in comparisons for name in names.split("+")}
    return said + [f"{path}: no mark for {name}" for name in by_name if name not in used]


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


def _picture(comparison: Comparison, document: Path, names: str, figure: str) -> str:
    """Draw one figure beside the document; the Markdown that shows it."""
    from experiment.compare import figures
    from experiment.compare.plots import all_figures  # matplotlib takes a second

    drawn = all_figures(comparison.groups, comparison.gains)
    if figure not in drawn:
        raise UserError(f"{document}: {names} has no figure {figure!r}; it has {', '.join(drawn) or 'none'}")
    place = document.parent / FIGURES / f"{names.replace('+', '_')}_{figure}.svg"
    place.parent.mkdir(exist_ok=True)
    write_atomically(place, lambda file: file.write(figures.svg(drawn[figure]).encode()))
    return f"![{figure}: {names.replace('+', ', ')}]({FIGURES}/{place.name})\n"
