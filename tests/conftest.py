"""Fixtures that several test files use."""

from types import SimpleNamespace

import evaluation_cases
import fault_server
import pytest
import torch
from reference import CLASSES

from cifar100_models import build_model

STEPS, BATCH = 3, 6


@pytest.fixture
def networks():
    torch.manual_seed(0)
    student = build_model("RES-8", CLASSES).double()
    teacher = build_model("RES-20", CLASSES).double()
    # Statistics of real use: a teacher and a student with fresh running statistics differ little between modes.
    with torch.no_grad():
        for _ in range(20):
            teacher(torch.rand(16, 3, 8, 8, dtype=torch.float64))
            student(torch.rand(16, 3, 8, 8, dtype=torch.float64))
    return student, teacher.eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A server that runs scripts in forks, a home folder with a teacher in it, and the uninterrupted runs' results."""
    server, home = fault_server.Server(), tmp_path_factory.mktemp("home")
    try:
        yield SimpleNamespace(server=server, home=home, expected=fault_server.prepare(server, home))
    finally:
        server.close()


@pytest.fixture
def quick_autoattack(monkeypatch):
    return evaluation_cases.quicken(monkeypatch)
