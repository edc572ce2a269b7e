"""An attack's step on a CUDA graph's static buffers is the same step; the capture itself is tests/test_gpu.py's."""

import copy

import pytest
import torch
from reference import product_run, settings
from test_accelerate import engine

import attacks
from experiment.engine.attack_step import GraphedStep


def graphed(networks):
    """An engine whose steps use the graph's buffers, as it does on CUDA with --compile 1; and both fast networks."""
    machine = engine()
    fast = [machine.accelerate(network) for network in networks]
    machine._attack_step = GraphedStep(fast, 6)
    return machine, *fast


def run(method, networks, batches, *flags, graph):
    """The student after the method's steps, and the number of captured steps."""
    student, teacher = copy.deepcopy(networks)
    machine, fast_student, fast_teacher = graphed((student, teacher))
    step = machine._attack_step
    if not graph:
        machine._attack_step = None
    fast = {id(student): fast_student, id(teacher): fast_teacher}
    torch.manual_seed(5)
    around = {"wrap": lambda model: fast[id(model)], "around": machine.step}
    product_run(method, student, teacher, batches, settings(method, *flags), **around)
    return student, len(step._captured)


@pytest.mark.parametrize(
    ("method", "flags", "captured"),
    [
        ("ard_IGDM", (), 1),
        ("rslad", (), 1),
        ("adaad_IGDM", (), 1),
        ("adaad_IGDM", ("--attack", "igdm"), 1),
        ("adaad", ("--teacher_every", "3"), 0),  # its objective keeps the teacher's logits from step to step
    ],
)
def test_replayed_buffers_are_the_same_step(method, flags, captured, networks, batches):
    plain, _ = run(method, networks, batches, *flags, graph=False)
    ours, found = run(method, networks, batches, *flags, graph=True)
    assert found == captured
    for (name, a), (_, b) in zip(ours.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_replay_leaves_earlier_results_alone(networks):
    """x_adv of the step before, and logits remembered for it, belong to the caller."""
    machine, student, teacher = graphed(networks)
    x, other = torch.rand(2, 6, 3, 8, 8, dtype=torch.float64)
    with machine.step():
        first = attacks.adaad(student, teacher, x)
        kept = first.clone()
        attacks.adaad(student, teacher, other)
    assert torch.equal(first, kept)
