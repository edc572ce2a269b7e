"""Faults, a few of each kind; all of them, at length, with ``make test-faults`` or ``pytest -m faults``."""

import subprocess
import sys

import fault_files
import fault_inputs
import fault_kills
import fault_run
import fault_storage
import pytest


def all_of(rows):
    """Run through the kinds of a fault; their assertions are inside."""
    assert list(rows)


def test_kills_at_random_moments(small):
    kills, _ = fault_kills.kill_at_random(small.server, small.home, small.expected, 2, seed=7)
    assert kills >= 2


def test_no_space_left(small):
    kinds = fault_storage.storage(small.server, small.home, small.expected, 1)
    assert "last.pt" in next(kinds)[0]


def test_real_file_systems(small):
    all_of(fault_storage.real_mounts(small.server, small.home, small.expected))


def test_signal_in_evaluation_loses_nothing(small):
    fault_kills.interrupt(small.server, small.home, small.expected, 3)


def test_damaged_checkpoints(small):
    all_of(fault_files.damaged_checkpoints(small.server, small.home, small.expected, 1))


def test_second_process(small):
    fault_kills.two_processes(small.server, small.home)


def test_clock(small):
    fault_kills.clock_jumps(small.server, small.home, small.expected)


def test_numerical_faults(small):
    all_of(fault_inputs.numerical(small.server, small.home))


def test_broken_teachers(small):
    all_of(fault_inputs.broken_teachers(small.server, small.home))


def test_crafted_files(small):
    all_of(fault_files.crafted_files(small.server, small.home))


def test_fuzzed_files(small):
    all_of(fault_files.fuzz_files(small.server, small.home, 15))


def test_fuzzed_flags(small):
    fault_inputs.fuzz_flags(small.server, small.home, 40)


def test_odd_paths(small):
    fault_inputs.odd_paths(small.server, small.home)


@pytest.mark.faults
def test_everything():
    subprocess.run([sys.executable, fault_run.__file__], check=True)
