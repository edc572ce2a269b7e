"""Put all faults into real runs and print the table of docs/reliability.md: python tests/fault_run.py --write FILE."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from fault_files import broken_teachers, damaged_checkpoints, odd_paths
from fault_kills import FAULTS, check, kill_at_random, real_file_systems, two_processes
from fault_ranks import stopped_ranks
from fault_server import ROOT, Row, Server, prepare


def everything(server: Server, home: Path) -> Iterator[Row]:
    """Yield (fault, times, outcome) of all faults at full length."""
    expected = prepare(server, home)
    yield kill_at_random(server, home, expected, 60)
    for fault in FAULTS:
        yield check(server, home, expected, fault, fault.times)
    yield from stopped_ranks(home, 3)
    yield from real_file_systems(server, home, expected)
    yield from damaged_checkpoints(server, home, expected, 10)
    yield two_processes(server, home)
    yield from broken_teachers(server, home)
    yield odd_paths(server, home)


def table(rows: list[Row]) -> str:
    """Merge neighbouring rows with the same outcome and add their counts; name a kind ("kind: detail") once."""
    lines = ["| fault | times | outcome |", "|---|---|---|"]
    for outcome, group in groupby(rows, key=lambda row: row[2]):
        faults, times, _ = zip(*group, strict=True)
        details: dict[str, list[str]] = {}
        for kind, _, detail in (fault.partition(": ") for fault in faults):
            details.setdefault(kind, []).append(detail)
        names = [f"{kind}: {', '.join(found)}" if any(found) else kind for kind, found in details.items()]
        lines.append(f"| {'; '.join(names)} | {sum(times)} | {outcome} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, help="write the table to this Markdown file")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["OMP_NUM_THREADS"] = "1"

    import torch

    from experiment.engine import cpu_name

    began, rows, server = time.monotonic(), [], Server()
    with tempfile.TemporaryDirectory() as home:
        try:
            for row in everything(server, Path(home)):
                rows.append(row)
                print(f"| {' | '.join(map(str, row))} |", flush=True)
        finally:
            server.close()
    minutes = (time.monotonic() - began) / 60
    machine = f"{cpu_name()}, torch {torch.__version__}"
    args.write.write_text(
        "# Reliability\n\nFaults injected into real runs (AdaAD and AdaAD+IGDM, RES-8 on digits, CPU). A row is "
        f"written only after its assertions hold.\n\n{table(rows)}\n\n"
        f"Printed by `make test-faults` in {minutes:.0f} minutes: {machine}.\n"
    )


if __name__ == "__main__":
    main()
