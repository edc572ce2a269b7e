"""Kills, signals, a second process, and the clock."""

import json
import random
import shutil
import signal
from pathlib import Path

from fault_server import SCRIPTS, SECONDS, SMALL, Server, reproduces, result_of


def kill_at_random(server: Server, home: Path, expected: dict, times: int, seed: int = 0) -> tuple[int, str]:
    """SIGKILL after a random time, again and again until the run is done; then the next run."""
    rng, kills, runs = random.Random(seed), 0, 0
    while kills < times:
        script, name = SCRIPTS[runs % 2], f"killed_{seed}_{runs}"
        runs += 1
        for _ in range(200):
            outcome = server.run(script, [*SMALL, "--run_name", name], home, kill_after=rng.uniform(0.05, 2.5))
            if outcome.status == 0:
                break
            assert outcome.status == -signal.SIGKILL, outcome.err
            kills += 1
        assert result_of(home / "runs" / name) == expected[script], name
        shutil.rmtree(home / "runs" / name)
    return kills, f"{runs} runs resumed to the end; weights, metrics and AutoAttack bit-identical"


POINTS = {
    "inside the attack": ("attack", 2, 23),
    "inside an optimizer step": ("step", 1, 11),
    "writing last.pt": ("write:last.pt", 1, 600_000),
    "before renaming last.pt": ("replace:last.pt", 1, 14),
    "after renaming last.pt": ("replace:last.pt", 1, 14),
    "renaming previous.pt": ("replace:previous.pt", 1, 13),
    "writing metrics.jsonl": ("write:metrics.jsonl", 1, 150),
    "writing config.json": ("write:config.json", 1, 900),
    "inside PGD-20": ("attack", 25, 44),
    "inside AutoAttack": ("autoattack", 1, 2),
    "writing an AutoAttack chunk": ("write:chunk-00001.json", 1, 500),
    "writing student.pt": ("write:student.pt", 1, 300_000),
    "writing result.json": ("write:result.json", 1, 900),
}


def kill_at_points(server: Server, home: Path, expected: dict, times: int, points: list[str], seed: int = 1):
    """SIGKILL at chosen places, at a random one of their occurrences; yields (place, how often, what happened)."""
    rng = random.Random(seed)
    for place in points:
        point, low, high = POINTS[place]
        for i in range(times):
            script, name = SCRIPTS[i % 2], f"point_{points.index(place)}_{i}"
            action = "kill after" if place.startswith("after") else "kill"
            fault = (point, rng.randint(low, high), action)
            server.run(script, [*SMALL, "--run_name", name], home, faults=[fault]).expect(-signal.SIGKILL)
            reproduces(server, script, home, name, expected[script])
            shutil.rmtree(home / "runs" / name)
        yield f"SIGKILL: {place}", times, "resumed, bit-identical"


def interrupt(server: Server, home: Path, expected: dict, times: int, seed: int = 2) -> tuple[int, str]:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 in attacks, steps, PGD-20 and AutoAttack; every other one comes twice."""
    rng, places = random.Random(seed), (("attack", 2, 23), ("step", 1, 12), ("evaluation", 1, 1), ("autoattack", 1, 2))
    for i in range(times):
        script, name = SCRIPTS[i % 2], f"signal_{seed}_{i}"
        point, low, high = places[i % len(places)]
        action = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGTERM")[i % 5]
        # A checkpoint a day: what is saved is saved because of the signal.
        flags = [*SMALL, "--checkpoint_minutes", "1440", "--run_name", name]
        fault = (point, rng.randint(low, high), action + " twice" * (i % 2))
        server.run(script, flags, home, faults=[fault]).expect(75, f"stopped by {action}.*resumes")
        if point == "evaluation":  # PGD-20 comes after the last step: nothing of the epoch may be lost
            assert (
                "resumed  in epoch 2 after step 6 of 6"
                in server.run(script, flags, home, faults=[("start", 1, "")]).out
            )
        reproduces(server, script, home, name, expected[script], flags)
        shutil.rmtree(home / "runs" / name)
    return times, "one line, exit status 75, state saved; resumed, bit-identical"


def two_processes(server: Server, home: Path) -> tuple[int, str]:
    """A second process on the folder of a running one."""
    from experiment.run import folder

    (home / "runs" / "shared").mkdir(parents=True, exist_ok=True)
    held = folder.lock(home / "runs" / "shared")
    try:
        server.run(SCRIPTS[0], [*SMALL, "--run_name", "shared"], home).expect(2, "in use by another process")
    finally:
        held.release()
    server.run(SCRIPTS[0], [*SMALL, "--run_name", "shared"], home, faults=[("start", 1, "")]).expect(2, "admitted")
    return 1, "the second stops, exit status 2"


def clock_jumps(server: Server, home: Path, expected: dict) -> tuple[int, str]:
    """The wall clock set by up to 30 years at every reading."""
    name, script = "clock", SCRIPTS[1]
    server.run(script, [*SMALL, "--run_name", name], home, faults=[("clock", 1, "")]).expect(0)
    assert result_of(home / "runs" / name) == expected[script]
    seconds = json.loads((home / "runs" / name / "result.json").read_text())["seconds"]
    assert all(0 <= value < SECONDS for value in seconds.values()), seconds
    return 1, "no effect (durations use the monotonic clock)"
