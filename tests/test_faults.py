"""A few of each kind of fault; all of them, at length, with ``make test-faults``."""

import fault_files
import fault_kills
import pytest

SHORT = (
    "SIGKILL: inside an optimizer step",
    "SIGKILL: writing last.pt",
    "SIGKILL: writing an AutoAttack chunk",
    "no space left: last.pt",
    "no space left: an AutoAttack chunk",
    "fsync fails (I/O error)",
    "SIGTERM",
    "Ctrl-C",
    "hang-up",
    "SIGUSR1",
)
TABLE = [fault for fault in fault_kills.FAULTS if fault.kind in SHORT or fault.times == 1]


@pytest.mark.parametrize("fault", TABLE, ids=lambda fault: fault.kind)
def test_fault(small, fault):
    fault_kills.check(small.server, small.home, small.expected, fault, 1)


def test_kills_at_random_moments(small):
    assert fault_kills.kill_at_random(small.server, small.home, small.expected, 2)


def test_real_file_systems(small):
    assert list(fault_kills.real_file_systems(small.server, small.home, small.expected))


def test_damaged_checkpoints(small):
    assert list(fault_files.damaged_checkpoints(small.server, small.home, small.expected, 1))


def test_broken_teachers(small):
    assert list(fault_files.broken_teachers(small.server, small.home))


@pytest.mark.parametrize("fault", [fault_kills.two_processes, fault_files.odd_paths])
def test_second_process_and_odd_paths(small, fault):
    fault(small.server, small.home)
