"""The fault run: all that can happen to a run, done to real ones. ``python tests/fault_run.py`` prints the table."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from fault_files import crafted_files, damaged_checkpoints, fuzz_files
from fault_inputs import broken_teachers, fuzz_flags, numerical, odd_paths
from fault_kills import POINTS, clock_jumps, interrupt, kill_at_points, kill_at_random, two_processes
from fault_ranks import stopped_ranks
from fault_server import ROOT, SCRIPTS, SMALL, Server, prepare, prepare_teacher
from fault_storage import real_mounts, storage


def threads(home: Path) -> str:
    """The same run with one and with two threads, each twice: what differs, and by how much."""
    import torch

    states, losses = {}, {}
    for count in (1, 2):
        for attempt in range(2):
            name = f"threads_{count}_{attempt}"
            flags = [*SMALL, "--checkpoint_minutes", "10", "--aa_examples", "0", "--epochs", "1", "--steps", "10"]
            subprocess.run(
                [sys.executable, ROOT / f"{SCRIPTS[1]}.py", *flags, "--run_name", name],
                cwd=home,
                env={**os.environ, "OMP_NUM_THREADS": str(count)},
                check=True,
                capture_output=True,
            )
            states[name] = torch.load(home / "runs" / name / "student.pt", weights_only=True)["state_dict"]
            losses[name] = json.loads((home / "runs" / name / "metrics.jsonl").read_text())["loss"]
        first, second = states[f"threads_{count}_0"], states[f"threads_{count}_1"]
        assert all(torch.equal(first[key], second[key]) for key in first), f"{count} threads are not repeatable"
    one, two = states["threads_1_0"], states["threads_2_0"]
    floats = [key for key in one if one[key].is_floating_point()]
    difference = torch.cat([(one[key] - two[key]).flatten() for key in floats])
    size = torch.cat([one[key].flatten() for key in floats])
    relative = abs(losses["threads_1_0"] - losses["threads_2_0"]) / losses["threads_1_0"]
    return (
        "Same seed, same machine, same number of threads: identical bits (two runs each with 1 and with 2 threads). "
        f"1 against 2 threads, AdaAD+IGDM on digits, after one epoch ({len(size):,} weights and statistics): relative "
        f"difference {relative:.1e} in the loss and {difference.norm() / size.norm():.1e} in the norm of the weights; "
        f"at most {difference.abs().max():.1e} in one weight."
    )


def everything(home: Path) -> Iterator[tuple[str, int, str]]:
    """All faults at full length, as (fault, times, what happened)."""
    server = Server()
    try:
        expected = prepare(server, home)
        yield "SIGKILL at a random moment", *kill_at_random(server, home, expected, 60)
        yield from kill_at_points(server, home, expected, 4, list(POINTS))
        yield "SIGTERM, Ctrl-C, hang-up, SIGUSR1", *interrupt(server, home, expected, 24)
        yield from stopped_ranks(home, 3)
        yield from storage(server, home, expected, 3)
        yield from real_mounts(server, home, expected)
        yield from damaged_checkpoints(server, home, expected, 10)
        yield "second process on one run folder", *two_processes(server, home)
        yield "clock set at random", *clock_jumps(server, home, expected)
        yield from numerical(server, home)
        yield from broken_teachers(server, home)
        shutil.rmtree(home / "runs")
        yield from crafted_files(server, home)
        yield from fuzz_files(server, home, 400)
        yield "random values for random flags", *fuzz_flags(server, home, 600)
        yield "paths with spaces, unicode, symbolic links", *odd_paths(server, home)
    finally:
        server.close()


def ranks_only(home: Path) -> Iterator[tuple[str, int, str]]:
    """The faults of several processes alone."""
    server = Server()
    try:
        prepare_teacher(server, home)
    finally:
        server.close()
    yield from stopped_ranks(home, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--part", choices=("all", "ranks"), default="all", help="ranks: of that file only these rows")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    lines = ["| fault | times | outcome |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as place:
        faults = everything if args.part == "all" else ranks_only
        for fault, times, outcome in faults(Path(place)):
            lines.append(f"| {fault} | {times} | {outcome} |")
            print(lines[-1], flush=True)
        measured = threads(Path(place)) if args.part == "all" else ""
    minutes = (time.monotonic() - began) / 60
    if args.write and args.part == "ranks":
        args.write.write_text(with_rows(args.write.read_text(), lines[2:], minutes))
    elif args.write:
        text = "# Reliability\n\nFaults injected into real runs (AdaAD and AdaAD+IGDM, RES-8 on digits, CPU). "
        text += "A row is written only after its assertions hold.\n\n"
        footer = f"{measured}\n\nPrinted by `make test-faults` in {minutes:.0f} minutes: {machine()}."
        args.write.write_text(text + "\n".join([*lines[:2], *grouped(lines[2:])]) + f"\n\n{footer}\n")


def grouped(rows: list[str]) -> list[str]:
    """Merge neighbouring rows with the same outcome and add their counts; name a kind ("kind: detail") once."""
    merged = []
    for outcome, group in groupby((row.strip("| ").split(" | ") for row in rows), key=lambda cells: cells[2]):
        faults, times, _ = zip(*group, strict=True)
        details: dict[str, list[str]] = {}
        for kind, _, detail in (fault.partition(": ") for fault in faults):
            details.setdefault(kind, []).append(detail)
        names = [f"{kind}: {', '.join(found)}" if any(found) else kind for kind, found in details.items()]
        merged.append(f"| {'; '.join(names)} | {sum(map(int, times))} | {outcome} |")
    return merged


def machine() -> str:
    import torch

    from experiment.engine import cpu_name

    return f"{cpu_name()}, torch {torch.__version__}"


def with_rows(page: str, rows: list[str], minutes: float) -> str:
    """The page with these rows in place of its rows of torchrun, and a line that says where they come from."""
    kept = [line for line in page.splitlines() if not line.startswith(("| torchrun", "The rows of torchrun"))]
    last = max(i for i, line in enumerate(kept) if line.startswith("|"))
    note = f"The rows of torchrun were printed by `python tests/fault_run.py --part ranks` in {minutes:.0f} minutes: "
    kept[last + 1 : last + 1] = grouped(rows)
    return "\n".join(kept).rstrip() + f"\n\n{note}{machine()}.\n"


if __name__ == "__main__":
    main()
