"""A comparison as documents: Markdown, one HTML page (--html), and marks in a document of one's own (--insert).

A mark is ``<!-- begin WHAT -->`` on a line of its own, up to ``<!-- end WHAT -->``. WHAT is the name of a records file
or study (without its ending; several joined by ``+`` are read together), and after it

    nothing       tables, notes, and by what, where and in how long the runs were made
    table         the table of results in short
    NAME figure   one figure of compare.py (gains, alignment, ...), as an SVG in the folder figures beside the document
"""

import base64
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from experiment import UserError
from experiment.compare.comparison import Comparison, comparison_of
from experiment.compare.notes import notes_of, verdict
from experiment.compare.read import PICTURES, read_runs
from experiment.compare.tables import as_markdown, markdown_text, results_table, short_columns, tables_of
from experiment.files import write_atomically
from experiment.text import TEXT_COLUMNS, Table, comma_list

_MARK = re.compile(
    r"^<!-- begin (([\w.+-]+)(?: (table|(\w+) figure))?) -->\n((?:(?!<!-- begin ).)*?)<!-- end \1 -->$",
    re.DOTALL | re.MULTILINE,
)
FIGURES = "figures"
"""Folder beside the document."""


def fill_marks(
    path: Path, sources: Sequence[Path], columns: Sequence[str] = (), run_dir: Path = Path("runs")
) -> list[str]:
    """Fill every mark of a document whose sources are all given; a line per mark, and per source that has none.

    Raises:
        UserError: the document cannot be read, or has no mark for any source; a mark names a figure that these runs
            do not have.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    by_name: dict[str, Path] = {}
    for source in sources:
        if by_name.setdefault(source.stem, source) != source:
            raise UserError(f"two sources are called {source.stem}: give either the study or its records")
    comparisons: dict[str, Comparison] = {}
    done = []

    def filled(mark: re.Match[str]) -> str:
        what, names, part, figure, _ = mark.groups()
        if not by_name.keys() >= set(names.split("+")):
            return mark[0]
        if names not in comparisons:
            comparisons[names] = comparison_of(read_runs([by_name[name] for name in names.split("+")], run_dir))
        comparison = comparisons[names]
        if figure:
            content = _picture(comparison, path, names, figure)
        elif part and comparison.groups:
            content = as_markdown(results_table(comparison, columns or short_columns(comparison)))
        else:
            content = _described(comparison, columns)
        done.append(f"{path}: {what}")
        return f"<!-- begin {what} -->\n{content}\n<!-- end {what} -->"

    made = _MARK.sub(filled, text)
    if not done:
        name = next(iter(by_name))
        raise UserError(f"{path} has no lines '<!-- begin {name} -->' and '<!-- end {name} -->'")
    write_atomically(path, lambda file: file.write(made.encode()))
    used = {name for names in comparisons for name in names.split("+")}
    return done + [f"{path}: no mark for {name}" for name in by_name if name not in used]


def as_document(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables and notes in Markdown."""
    return "\n\n".join([*map(as_markdown, tables), "\n".join(f"- {markdown_text(note)}" for note in notes)])


def commands_of(comparison: Comparison) -> list[str]:
    """The command of each finished run, below a comment with where it ran."""
    lines = []
    for group in comparison.groups:
        for run in group.runs:
            about = f"# {group.label}, {comma_list(run.setting[:2])}, seed {run.seed}: {run.result.hardware}"
            # One line each: a line break in a quoted argument could end the code block.
            lines += [" ".join(text.split()) for text in (about, run.result.command)]
    return lines


def _described(comparison: Comparison, columns: Sequence[str]) -> str:
    """Tables, notes, and by what, where and in how long they were made."""
    tables = tables_of(comparison, columns)
    runs = [run for group in comparison.groups for run in group.runs]
    if not runs:  # published figures, without ours
        return as_markdown(tables[0])
    hours = sum(sum(run.result.seconds.values()) for run in runs) / 3600
    hardware = comma_list(dict.fromkeys(run.result.hardware for run in runs))
    commits = comma_list(dict.fromkeys(run.environment["commit"][:12] for run in runs))
    total = f"{len(runs)} runs, {hours:.1f} hours in all on {hardware}; commit {commits}."
    return f"{as_document(tables, notes_of(comparison))}\n\n{total}"


def _picture(comparison: Comparison, document: Path, names: str, name: str) -> str:
    """Draw one figure beside the document; the Markdown that shows it."""
    from experiment.compare.figures import all_figures, rendered  # matplotlib takes a second

    figures = all_figures(comparison)
    if name not in figures:
        raise UserError(f"{document}: {names} has no figure {name!r}; it has {', '.join(figures) or 'none'}")
    path = document.parent / FIGURES / f"{names.replace('+', '_')}_{name}.svg"
    path.parent.mkdir(exist_ok=True)
    content = rendered(figures[name], "svg")
    write_atomically(path, lambda file: file.write(content[content.index(b"<svg") :]))
    return f"![{name}: {names.replace('+', ', ')}]({FIGURES}/{path.name})"


def page(comparison: Comparison, tables: Sequence[Table], notes: Sequence[str]) -> str:
    """The gains in sentences, tables, figures, notes, and each run's command."""
    from jinja2 import Environment

    from experiment.compare.figures import all_figures, rendered  # matplotlib takes a second

    template = resources.files("experiment.compare").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    runs = [(group.label, run) for group in comparison.groups for run in group.runs]
    figures = all_figures(comparison, stacked=True)  # a telephone shows one column
    pictures = [(name, "svg+xml", rendered(figure, "svg")) for name, figure in figures.items()]
    pictures += [
        (f"{path.stem}: drawn by evaluate.py for {label}, seed {run.seed}.", PICTURES[path.suffix], path.read_bytes())
        for label, run in runs
        for path in run.pictures
    ]
    return environment.from_string(template).render(
        title=", ".join(dict.fromkeys(run.name for _, run in runs)) or "Runs that are not finished",
        verdicts=[f"{verdict(gain)}, seeds: {len(gain.by_seed)}" for gain in comparison.gains],
        tables=tables,
        text_columns=TEXT_COLUMNS,
        notes=notes,
        pictures=[
            (name, f"data:image/{kind};base64,{base64.b64encode(content).decode()}") for name, kind, content in pictures
        ],
        commands=commands_of(comparison),
    )
