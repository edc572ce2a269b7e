"""Benchmark results as JSON and as Markdown tables.

    python -m benchmarks.report DIR --insert docs/performance_tables.md

writes the tables of the JSON files in DIR, made on another machine, between the markers of a Markdown file that bear
the files' names: `gpu_check.json` goes to `<!-- begin gpu_check -->`. Without --insert it prints them.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import workload
from experiment import UserError, cli
from experiment.evaluation import AUTOATTACK
from experiment.files import read_json, write_atomically, write_json
from experiment.run import provenance

Row = dict[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def spread(row: Row, name: str, digits: int = 2) -> str:
    """A median with its quartiles."""
    low, high = row[f"{name}_quartiles"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _step(row: Row) -> str:
    name = f"{row['method']}, "
    if row["step"] == "published":
        return name + "published order"
    every = f", --teacher_every {row['teacher_every']}" if "teacher_every" in row else ""
    return f"{name}{row['step']}, {row['precision']}, {'compiled' if row['compile'] else 'eager'}{every}"


def _memory(row: Row) -> str:
    return "-" if row.get("peak_memory_gib") is None else f"{row['peak_memory_gib']:.2f}"


SPEED = ("images/s (quartiles)", lambda r: spread(r, "images_per_second"))
MEMORY = ("peak memory, GiB", _memory)

COLUMNS: dict[str, list[tuple[str, Callable[[Row], object]]]] = {
    "machine": [("machine", lambda r: r["name"]), ("", lambda r: r["value"])],
    "tests": [("tests on the device", lambda r: r["name"]), ("", lambda r: r["outcome"])],
    "ceilings": [
        ("ceiling", lambda r: r["precision"]),
        ("matrix product, TFLOP/s", lambda r: f"{r['matmul_tflops']:.3g}"),
        ("convolution, TFLOP/s", lambda r: f"{r['convolution_tflops']:.3g}"),
    ],
    "rows": [
        ("step", _step),
        SPEED,
        ("ratio (quartiles)", lambda r: spread(r, "ratio")),
        ("GFLOP/image", lambda r: f"{r['gflop_per_image']:.2f}"),
        ("TFLOP/s", lambda r: f"{r['tflops']:.3f}"),
        ("share of peak", lambda r: _share(r["share_of_peak"])),
        MEMORY,
    ],
    "tricks": [
        ("step", lambda r: f"{_step(r)}, {r['trick']}"),
        SPEED,
        ("time / product's time (quartiles)", lambda r: spread(r, "ratio", 3)),
        ("share of peak", lambda r: _share(r["share_of_peak"]) if "share_of_peak" in r else "-"),
        MEMORY,
    ],
    "profile": [("part of the step's time", lambda r: r["name"]), ("share", lambda r: _share(r["share"]))],
    "fidelity": [
        ("AdaAD's attack against float32", lambda r: r["precision"]),
        ("signs that flip in the first step", lambda r: f"{100 * r['flipped']:.2f} %"),
        ("objective reached / float32's", lambda r: f"{r['objective_ratio']:.5f}"),
    ],
    "pgd20": [
        ("PGD-20", lambda r: r["step"]),
        ("batch", lambda r: r["batch"]),
        SPEED,
        ("ratio (quartiles)", lambda r: spread(r, "ratio")),
        MEMORY,
    ],
    "autoattack": [
        ("AutoAttack, standard, batch", lambda r: r["batch"]),
        *(
            (f"{name}, s/image", lambda r, name=name: f"{r['attack_seconds'][name] / r['examples']:.3f}")
            for name in AUTOATTACK
        ),
        ("all, s/image", lambda r: f"{sum(r['attack_seconds'].values()) / r['examples']:.3f}"),
        ("robust", lambda r: f"{100 * r['accuracy']:.0f} % of {r['examples']}"),
    ],
}
"""The columns of the table of each kind of rows."""


def tables(figures: dict[str, Any]) -> list[str]:
    """The Markdown tables of all kinds of rows, and the error of each row that failed."""
    made = []
    for kind, columns in COLUMNS.items():
        rows = figures.get(kind) or []
        good = [row for row in rows if "error" not in row]
        if good:
            made.append(table([title for title, _ in columns], [[cell(row) for _, cell in columns] for row in good]))
        made += [f"not measured: {row.get('setting', kind)}: {row['error']}" for row in rows if "error" in row]
    return made


def text_of(figures: dict[str, Any]) -> str:
    """Command, machine and tables of a JSON file."""
    where = f"{figures['hardware']}; torch {figures['torch']}; commit {figures['commit']}"
    shown = [f"`{figures['command']}`  \n{where}"]
    if "line" in figures:
        shown.append(figures["line"])
    for name, part in figures.get("parts", {}).items():
        state = "" if part["status"] == "done" else f" ({part['status']})"
        shown += [f"**{name}**{state}, {part['seconds']:.0f} s", *tables(part)]
    return "\n\n".join([*shown, *tables(figures)])


def make_folder(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Create the folder of --out, so that an error comes before the measurement."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {folder} cannot be made: {error.strerror}")


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a benchmark's flags and those that every benchmark has."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=cli.positive_int, default=5, help="turns per setting")
    parser.add_argument("--commit", help="the commit, if git does not know it")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args(argv)
    args.device = cli.resolve_device(parser, args.device)
    if args.out:
        make_folder(parser, args.out.parent)
    return args


def about(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Command, machine, versions and commit of a measurement."""
    given = sys.argv[1:]
    for flag in ("--out", "--commit"):  # they do not change the figures
        if flag in given:
            del given[given.index(flag) : given.index(flag) + 2]
    origin, threads = provenance(Path(__file__)), os.environ.get("OMP_NUM_THREADS")
    return {
        "benchmark": name,
        "command": (f"OMP_NUM_THREADS={threads} " if threads else "")
        + shlex.join(["python", "-m", f"benchmarks.{name}", *given]),
        "hardware": workload.engine(device).hardware(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": origin["versions"]["python"],
        "commit": args.commit or origin["commit"],
    }


class Report:
    """Results of a benchmark, written to --out after every row."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device, line: str) -> None:
        self._figures, self._out = {**about(name, args, device), "line": line}, args.out

    def add(self, kind: str, rows: Iterable[Row]) -> None:
        """Add rows of one of COLUMNS' tables as they are measured."""
        for row in rows:
            self._figures.setdefault(kind, []).append(row)
            if self._out:
                write_json(self._out, self._figures)

    def show(self) -> None:
        """Print the tables."""
        print(f"\n{text_of(self._figures)}", flush=True)


def insert(path: Path, mark: str, text: str) -> None:
    """Put text between the lines ``<!-- begin MARK -->`` and ``<!-- end MARK -->`` of a file."""
    begin, end = f"<!-- begin {mark} -->\n", f"<!-- end {mark} -->"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begun, rest = old.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise UserError(f"{path} has no lines {begin.strip()!r} and {end!r} to write between")
    write_atomically(path, lambda file: file.write(f"{before}{begin}{text}\n{end}{after}".encode()))


def main() -> None:
    """Render a folder of JSON files."""
    parser = cli.Parser(prog="python -m benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of JSON files that benchmarks wrote")
    parser.add_argument("--insert", type=Path, metavar="FILE", help="a Markdown file with markers of the files' names")
    args = parser.parse_args()
    files = sorted(args.folder.glob("*.json"))
    if not files:
        raise UserError(f"{args.folder} holds no .json file")
    for path in files:
        figures = read_json(path)
        if "benchmark" not in figures:
            raise UserError(f"{path} is not a report of a benchmark")
        if args.insert:
            insert(args.insert, path.stem, text_of(figures))
        else:
            print(f"\n{text_of(figures)}")


if __name__ == "__main__":
    cli.guard(main)
