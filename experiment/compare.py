"""Finished runs side by side: the table on the terminal and as Markdown, the plot, and how far to trust a difference.

Runs that differ in nothing but their seed are one row. A method that adds something to a base method (config.json's
"adds") stands beside its baseline, and its gain, the AutoAttack accuracy minus the baseline's, is printed only if the
two rows were made under the same conditions; if they were not, the error after the table says in what they differ.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiment import UserError, cli
from experiment.checkpoint import read_json, write_atomically

MAY_DIFFER = (
    "run_name", "run_dir", "data_dir", "teacher_path", "device", "nowand", "aa_batch", "checkpoint_minutes", "seed",
    "eval_after",
)  # fmt: skip
"""Settings that leave the experiment the same; those that begin with wandb_ come on top."""

ABSENT = "absent"


@dataclass(frozen=True)
class Run:
    """One finished run folder, checked: accuracies are fractions in [0, 1]."""

    folder: Path
    method: str
    adds: str | None
    family: str
    """The script's name without what it adds: a baseline and its twin share it."""
    added_settings: tuple[str, ...]
    conditions: dict[str, Any]
    """What must be equal for two runs to be repetitions of one experiment: settings, data, teacher, AutoAttack."""
    circumstances: dict[str, str]
    """What may change a figure slightly and is worth a note: hardware, versions, commit."""
    teacher: str
    student: str
    dataset: str
    seed: int
    clean: float
    pgd20: float
    test_examples: int
    autoattack: float | None
    attack: dict[str, Any]
    """AutoAttack's epsilon, version, seed and examples; empty if it was not run."""
    warnings: tuple[str, ...]
    """What AutoAttack warned of, such as masked gradients."""
    curves: dict[str, dict[int, float]]
    """By "clean" and "pgd20": accuracy by epoch."""
    command: str


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seed, in the order of their seeds."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """Any of the runs, for what they share."""
        return self.runs[0]

    @property
    def name(self) -> str:
        """The method, with what it adds."""
        return "+".join(part for part in (self.first.method, self.first.adds) if part)

    @property
    def pair(self) -> tuple[str, ...]:
        """What a baseline and its twin have in common."""
        return (self.first.method, self.first.family, self.first.teacher, self.first.student, self.first.dataset)

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return [run.seed for run in self.runs]

    def values(self, figure: str) -> list[float]:
        """One accuracy per seed; empty if it was not measured."""
        return [value for run in self.runs if (value := getattr(run, figure)) is not None]


@dataclass(frozen=True)
class Gain:
    """AutoAttack accuracy of a row minus that of its baseline, one difference per seed, in fractions."""

    row: Row
    baseline: Row
    by_seed: tuple[float, ...]


def read_run(folder: Path) -> Run:
    """Read and check config.json, metrics.jsonl and result.json of one run folder.

    Raises:
        UserError: not a run folder, an unfinished run, or files that do not hold what a run writes.
    """
    # os.path.isdir and isfile answer False where Path's raise, such as for a name that is too long.
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder; give the folders of finished runs")
    if not os.path.isfile(folder / "config.json"):
        raise UserError(f"{folder} is not a run folder: it holds no config.json")
    config = read_json(folder / "config.json")
    if not os.path.isfile(folder / "result.json"):
        command = _get(config, folder / "config.json", "command", str)
        raise UserError(f"{folder} is an unfinished run (no result.json); to finish it, run this again: {command}")
    return _checked_run(folder, config, read_json(folder / "result.json"))


def _checked_run(folder: Path, config: dict[str, Any], result: dict[str, Any]) -> Run:
    in_config, in_result = folder / "config.json", folder / "result.json"
    for values, path in ((config, in_config), (result, in_result)):
        if _get(values, path, "format", int) != 1:
            raise UserError(f"{path} has format {values['format']}; this version reads format 1")
    settings = _get(config, in_config, "settings", dict)
    for key in ("script", "method", "adds"):
        if config.get(key) != result.get(key):
            raise UserError(
                f"{folder} holds files of two runs: {key} is {_show(config.get(key))} in config.json and "
                f"{_show(result.get(key))} in result.json"
            )
    adds = _get(config, in_config, "adds", str, optional=True)
    script = _get(config, in_config, "script", str)
    conditions = {key: value for key, value in settings.items() if not _may_differ(key)}
    for key, kind, optional in (
        ("dataset_sha256", str, False),
        ("num_classes", int, False),
        ("teacher_sha256", str, True),
    ):
        conditions[key] = _get(config, in_config, key, kind, optional=optional)
    measured = _get(result, in_result, "autoattack", dict, optional=True)
    attack, warnings = {}, []
    if measured:
        warnings = _get(measured, in_result, "warnings", list, optional=True) or []
        attack = {
            "epsilon": _fraction(measured, in_result, "epsilon"),
            "version": _get(measured, in_result, "version", str),
            "seed": _get(measured, in_result, "seed", int),
            "examples": _count(measured, in_result, "examples"),
        }
    # The seed of AutoAttack is the run's own by default: it is compared seed by seed, not over a row.
    conditions |= {f"AutoAttack {key}": value for key, value in attack.items() if key != "seed"}
    versions = _get(config, in_config, "versions", dict)
    return Run(
        folder=folder,
        method=_get(config, in_config, "method", str),
        adds=adds,
        family=script.replace(f"_{adds}", "") if adds else script,
        added_settings=tuple(map(str, _get(config, in_config, "added_settings", list))),
        conditions=conditions,
        circumstances={
            "hardware": _get(result, in_result, "hardware", str),
            "commit": _get(config, in_config, "commit", str, optional=True) or "unknown",
            "changed before a resumption": _listed(result.get("changed") or ["nothing"])
            if isinstance(result.get("changed", []), list)
            else "unknown",
            **{f"{package} version": str(version) for package, version in versions.items()},
            # Chunks of another size draw other random numbers.
            **{f"AutoAttack {key}": str(measured[key]) for key in ("batch", "package") if key in (measured or {})},
        },
        teacher=_get(result, in_result, "teacher", str, optional=True) or "-",
        student=_get(result, in_result, "student", str),
        dataset=_get(result, in_result, "dataset", str),
        seed=_get(result, in_result, "seed", int),
        clean=_fraction(result, in_result, "clean"),
        pgd20=_fraction(result, in_result, "pgd20"),
        test_examples=_count(result, in_result, "test_examples"),
        autoattack=_fraction(measured, in_result, "accuracy") if measured else None,
        attack=attack,
        warnings=tuple(map(str, warnings)),
        curves=_curves(folder / "metrics.jsonl"),
        command=_get(result, in_result, "command", str),
    )


def _get(values: dict[str, Any], path: Path, key: str, kind: type, *, optional: bool = False) -> Any:
    """values[key], of the JSON type `kind`, or None where that is allowed."""
    value = values.get(key)
    # bool is an int to Python, not to JSON.
    if (value is None and optional) or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    raise UserError(f"{path}: {key} is {_show(values.get(key, ABSENT))}, which no run writes; was the file edited?")


def _fraction(values: dict[str, Any], path: Path, key: str) -> float:
    value = _get(values, path, key, int | float)
    if not 0 <= value <= 1:
        raise UserError(f"{path}: {key} is {_show(value)}; a fraction from 0 to 1 is needed")
    return float(value)


def _count(values: dict[str, Any], path: Path, key: str) -> int:
    value = _get(values, path, key, int)
    if not 1 <= value < 2**31:
        raise UserError(f"{path}: {key} is {_show(value)}; a whole number from 1 is needed")
    return value


def _curves(path: Path) -> dict[str, dict[int, float]]:
    """Clean and PGD-20 accuracy by epoch, of the epochs that were evaluated."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error.reason} at byte {error.start}") from error
    curves: dict[str, dict[int, float]] = {"clean": {}, "pgd20": {}}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not valid JSON: {str(error).splitlines()[0]}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} holds {_show(row)}; a JSON object is needed")
        for figure, curve in curves.items():
            if figure in row:
                curve[_count(row, path, "epoch")] = _fraction(row, path, figure)
    return curves


def _may_differ(setting: str) -> bool:
    return setting in MAY_DIFFER or setting.startswith("wandb_")


def _show(value: Any) -> str:
    """A value in a message or a label: short, on one line."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    # Checksums: twelve characters tell any two apart.
    return text if len(text) <= 60 else f"{text[:12]}..."


def escaped(text: str) -> str:
    """Text that any output takes: bytes of a path name that are not UTF-8 become escapes."""
    return text.encode(errors="backslashreplace").decode()


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Gather runs that differ in nothing but their seed into rows; pairs together, the baseline first.

    Raises:
        UserError: two runs have the same settings and the same seed: they would not be independent repetitions.
    """
    same: dict[str, dict[int, Run]] = {}
    for run in runs:
        identity = [run.method, run.adds, run.family, run.teacher, run.student, run.dataset, run.conditions]
        seeds = same.setdefault(json.dumps(identity, sort_keys=True), {})
        if run.seed in seeds:
            raise UserError(
                f"{seeds[run.seed].folder} and {run.folder} are the same experiment with the same seed {run.seed}; "
                "give one of them"
            )
        seeds[run.seed] = run
    rows = [Row(tuple(seeds[seed] for seed in sorted(seeds))) for seeds in same.values()]
    order = list(dict.fromkeys(row.pair for row in rows))
    return sorted(rows, key=lambda row: (order.index(row.pair), row.first.adds is not None))


def differences(run: Run, baseline: Run) -> list[str]:
    """Name every condition in which the runs differ, with both values, but those that the method itself brings."""
    found = []
    for key in dict.fromkeys([*baseline.conditions, *run.conditions]):
        ours, theirs = run.conditions.get(key, ABSENT), baseline.conditions.get(key, ABSENT)
        if key not in run.added_settings and ours != theirs:
            found.append(f"{key} {_show(theirs)} and {_show(ours)}")
    return found


def gains_of(rows: Sequence[Row]) -> tuple[list[Gain], list[str]]:
    """Subtract its baseline from every row that has one; rows of different methods are never subtracted.

    Returns:
        The gains, and for each row that was made under other conditions or with other seeds than its baseline a
        sentence that names each of them with both values.
    """
    gains, refusals = [], []
    for row in rows:
        baselines = [other for other in rows if other.pair == row.pair and other.first.adds is None]
        if row.first.adds is None or not baselines:
            continue
        # Several baselines (another learning rate, say) may be listed: the one that fits is the one subtracted.
        baseline = min(baselines, key=lambda other: len(differences(row.first, other.first)))
        subtraction = f"cannot subtract {baseline.first.folder} ({baseline.name}) from {row.first.folder} ({row.name})"
        if found := differences(row.first, baseline.first):
            allowed = ", ".join(row.first.added_settings) or "nothing"
            refusals.append(
                f"{subtraction}, they differ in {'; '.join(found)}; only {allowed} may differ: rerun one of them"
            )
            continue
        if row.seeds != baseline.seeds:
            refusals.append(
                f"{subtraction}, their seeds differ: {_listed(baseline.seeds)} and {_listed(row.seeds)}; "
                "give runs with the same seeds"
            )
            continue
        attack_seeds, theirs = ([run.attack.get("seed") for run in each.runs] for each in (row, baseline))
        if attack_seeds != theirs:
            refusals.append(
                f"{subtraction}, they differ in AutoAttack seed {_listed(theirs)} and {_listed(attack_seeds)}; "
                "rerun one of them"
            )
            continue
        ours, theirs = row.values("autoattack"), baseline.values("autoattack")
        if ours:
            by_seed = tuple(a - b for a, b in zip(ours, theirs, strict=True))
            gains.append(Gain(row, baseline, by_seed))
    return gains, refusals


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def half_width(accuracy: float, examples: int) -> float:
    """Half of the 95 % binomial interval of an accuracy measured on `examples` images, as a fraction.

    Wilson's interval, which unlike the textbook one does not shrink to nothing at 0 and 1.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    z = 1.959964
    spread = accuracy * (1 - accuracy) / examples + z**2 / (4 * examples**2)
    return z * math.sqrt(spread) / (1 + z**2 / examples)


def gain_uncertainty(gain: Gain) -> float:
    """Half-width of the 95 % interval of the mean gain, as a fraction.

    The binomial half-widths of the two accuracies, unpaired, and with several seeds Student's t interval of the mean
    over seeds, added in quadrature. Every seed is measured on the same images, so more seeds do not narrow the former.
    """
    examples = gain.row.first.attack["examples"]
    parts = [half_width(fmean(row.values("autoattack")), examples) for row in (gain.row, gain.baseline)]
    n = len(gain.by_seed)
    if n > 1:
        from scipy.stats import t  # takes a second to import

        parts.append(float(t.ppf(0.975, n - 1)) * stdev(gain.by_seed) / math.sqrt(n))
    return math.hypot(*parts)


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
            f"{key} {_show(row.first.conditions.get(key, ABSENT))}"
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
    tested = _listed(sorted({run.test_examples for row in rows for run in row.runs}))
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
            values = dict.fromkeys(_show(run.circumstances.get(key, ABSENT)) for run in runs)
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
    from experiment.plot import plot  # draws rows, and so imports this module

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
