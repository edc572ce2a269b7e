"""Faults, a few of each kind; all of them, at length, with ``make test-faults`` or ``pytest -m faults``."""

import subprocess
import sys

import fault_run
import pytest


def held(rows):
    """Run through the kinds of a fault; their assertions are inside."""
    assert list(rows)


def test_kills_at_random_moments(small):
    kills, _ = fault_run.kill_at_random(small.server, small.home, small.expected, 2, seed=7)
    assert kills >= 2


def test_no_space_left(small):
    kinds = fault_run.storage(small.server, small.home, small.expected, 1)
    assert "last.pt" in next(kinds)[0]


def test_real_file_systems(small):
    held(fault_run.real_mounts(small.server, small.home, small.expected))


def test_signal_in_evaluation_loses_nothing(small):
    fault_run.interrupt(small.server, small.home, small.expected, 3)


def test_damaged_checkpoints(small):
    held(fault_run.damaged_checkpoints(small.server, small.home, small.expected, 1))


def test_second_process(small):
    fault_run.two_processes(small.server, small.home)


def test_clock(small):
    fault_run.clock_jumps(small.server, small.home, small.expected)


def test_numerical_faults(small):
    held(fault_run.numerical(small.server, small.home))


def test_broken_teachers(small):
    held(fault_run.broken_teachers(small.server, small.home))


def test_crafted_files(small):
    held(fault_run.crafted_files(small.server, small.home))


def test_fuzzed_files(small):
    held(fault_run.fuzz_files(small.server, small.home, 15))


def test_fuzzed_flags(small):
    fault_run.fuzz_flags(small.server, small.home, 40)


def test_odd_paths(small):
    fault_run.odd_paths(small.server, small.home)


@pytest.mark.faults
def test_everything():
    subprocess.run([sys.executable, fault_run.__file__], check=True)
