"""compare.py: compare runs on the terminal, and as Markdown, plots, CSV, LaTeX, an HTML page and records.

--insert fills marks in a document of one's own: ``<!-- begin WHAT -->`` on a line, up to ``<!-- end WHAT -->``. WHAT is
the name of a records file or study (without its ending; several joined by ``+`` are read together), and after it

    nothing       tables, notes, and the runs' total time, hardware and commits
    table         the table of results in short
    NAME figure   one figure of compare.py (gains, alignment, ...), as an SVG in the folder figures beside the document
"""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiment import UserError, cli
from experiment.compare import figures
from experiment.compare.comparison import Comparison, comparison_of
from experiment.compare.notes import notes_of, verdict
from experiment.compare.read import PICTURES, read_runs, records_of
from experiment.compare.tables import HEADS, as_csv, as_document, as_latex, as_markdown, short_columns, tables_of
from experiment.files import make_folder, write_atomically
from experiment.text import TEXT_COLUMNS, Table, as_text, comma_list, escaped

FILES = {
    "csv": "a line per run, accuracies as fractions",
    "latex": "the table of results as a booktabs tabular that fits a column",
    "html": "one self-contained page",
    "records": "the finished runs as one small file, a source for compare.py",
}
"""What can be written beside comparison.md and the plots, by flag."""

_MARK = re.compile(
    r"^<!-- begin (([\w.+-]+)(?: (table|(\w+) figure))?) -->\n((?:(?!<!-- begin ).)*?)<!-- end \1 -->$",
    re.DOTALL | re.MULTILINE,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, compare the runs and write the files."""
    parser = cli.Parser(
        "compare.py",
        description="Compare runs side by side: tables, plots, page.",
        examples=("runs", "runs/BASELINE runs/IGDM --html comparison.html"),
    )
    add = parser.add_argument
    sources = "run folder, folder of run folders, study (.toml) or records (.json)"
    add("sources", nargs="+", type=Path, metavar="DIR", help=sources)
    add("--out", type=Path, metavar="DIR", help="folder of comparison.md and the plots (default: that of the runs)")
    columns = f"columns of the table of results, of {', '.join(HEADS)} (default: method, clean, autoattack, gain and "
    columns += "what differs; "
    columns += "in comparison.md all that were measured)"
    add("--columns", nargs="+", choices=tuple(HEADS), default=[], metavar="NAME", help=columns)
    for flag, what in FILES.items():
        add(f"--{flag}", type=Path, metavar="FILE", help=f"also write {what}")
    insert = "only fill FILE.md between the lines <!-- begin NAME --> and <!-- end NAME -->; NAME is a records file or "
    insert += "study, with 'table' or 'gains figure' after it for that part alone"
    add("--insert", type=Path, metavar="FILE.md", help=insert)
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
    if comparison.not_subtracted:  # after all was written and shown
        raise UserError("; ".join(comparison.not_subtracted))


def _show(comparison: Comparison, out: Path, columns: Sequence[str], files: Mapping[str, Path]) -> None:
    """Print tables and notes; write comparison.md and the plots (PNG, PDF, SVG) into `out`, and `files` by FILES."""
    make_folder(out)
    tables, notes, drawn = tables_of(comparison, columns), notes_of(comparison), figures.all_figures(comparison)
    figures.write_figures(drawn, out)
    parts = [as_document(tables, notes), *(f"![{name}]({name}.png)" for name in drawn)]
    if commands := _commands(comparison):
        parts += ["Commands:", "\n".join(["```sh", *commands, "```"])]
    _write(out / "comparison.md", "\n\n".join(parts) + "\n")
    columns_shown = columns or short_columns(comparison)
    short = tables_of(comparison, columns_shown)
    lines = [*(as_text(table) + "\n" for table in short), *notes_of(comparison, columns_shown)]
    plots = out / f"{{{','.join(drawn)}}}.{{png,pdf,svg}}"
    lines += [f"\nplots     {plots}" if drawn else "\nno plots: no run is finished"]
    lines += [f"markdown  {out / 'comparison.md'}, with all columns and notes"]
    contents = {
        "csv": lambda: as_csv(comparison),
        "latex": lambda: as_latex(comparison, columns),
        "html": lambda: _page(comparison, short, notes),
        "records": lambda: records_of(comparison.runs),
    }
    for name, path in files.items():
        _write(path, contents[name]())
        lines.append(f"{name:<8}  {path}")
    print(escaped("\n".join(lines)))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(escaped(text).encode()))


def fill_marks(
    path: Path, sources: Sequence[Path], columns: Sequence[str] = (), run_dir: Path = Path("runs")
) -> list[str]:
    """Fill every mark of a document whose sources are all given; a line per mark, and per source that has none."""
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
            content = as_markdown(tables_of(comparison, columns or short_columns(comparison))[0])
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


def _commands(comparison: Comparison) -> list[str]:
    """The command of each finished run, below a comment with its method, seed and hardware."""
    lines = []
    for group in comparison.groups:
        for run in group.runs:
            about = f"# {group.label}, {comma_list(run.setting[:2])}, seed {run.seed}: {run.result.hardware}"
            # One line each: a line break in a quoted argument could end the code block.
            lines += [" ".join(text.split()) for text in (about, run.result.command)]
    return lines


def _described(comparison: Comparison, columns: Sequence[str]) -> str:
    """Tables, notes, and the runs' total time, hardware and commits."""
    tables = tables_of(comparison, columns)
    runs = comparison.runs
    if not runs:  # published figures, without ours
        return as_markdown(tables[0])
    hours = sum(sum(run.result.seconds.values()) for run in runs) / 3600
    hardware = comma_list(dict.fromkeys(run.result.hardware for run in runs))
    commits = comma_list(dict.fromkeys(run.environment["commit"][:12] for run in runs))
    total = f"{len(runs)} runs, {hours:.1f} hours in all on {hardware}; commit {commits}."
    return f"{as_document(tables, notes_of(comparison))}\n\n{total}"


def _picture(comparison: Comparison, document: Path, names: str, name: str) -> str:
    """Draw one figure beside the document; the Markdown that shows it."""
    drawn = figures.all_figures(comparison)
    if name not in drawn:
        raise UserError(f"{document}: {names} has no figure {name!r}; it has {', '.join(drawn) or 'none'}")
    path = document.parent / "figures" / f"{names.replace('+', '_')}_{name}.svg"
    path.parent.mkdir(exist_ok=True)
    content = figures.rendered(drawn[name], "svg")
    write_atomically(path, lambda file: file.write(content[content.index(b"<svg") :]))
    return f"![{name}: {names.replace('+', ', ')}](figures/{path.name})"


def _page(comparison: Comparison, tables: Sequence[Table], notes: Sequence[str]) -> str:
    """The gains in sentences, tables, figures, notes, and each run's command."""
    from jinja2 import Environment

    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    runs = [(group.label, run) for group in comparison.groups for run in group.runs]
    drawn = figures.all_figures(comparison, stacked=True)  # a telephone shows one column
    pictures = [(name, "svg+xml", figures.rendered(figure, "svg")) for name, figure in drawn.items()]
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
        commands=_commands(comparison),
    )
