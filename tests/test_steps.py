"""The scripts' training steps against the slow float64 reference of tests/reference.py.

Tolerance: both sides compute in float64, in different orders; over three steps of a small ResNet that leaves some
1e-13, and a wrong pass, sign or weight leaves more than 1e-6.
"""

import copy

import pytest
import torch
from reference import EXAMPLES, SCRIPTS, assert_same_network, engine, product_run, reference_run, settings

METHODS = (*SCRIPTS, *EXAMPLES)
OTHER = [
    *("--beta", "0.7", "--gamma", "1.3", "--ce_weight", "0.5", "--clean_weight", "0.25"),
    *("--trades_weight", "3", "--clean_factor", "0.6", "--entropy_factor", "4"),
]


def flags_of(method, flags):
    """Those of the flags, each with one value, that the script has."""
    own = settings(method)
    return [part for i, flag in enumerate(flags[::2]) if hasattr(own, flag[2:]) for part in flags[2 * i : 2 * i + 2]]


CASES = [(method, flags_of(method, flags)) for method in METHODS for flags in ([], ["--preset", "paper"], OTHER)]
CASES = [case for i, case in enumerate(CASES) if case not in CASES[:i]]
CASES += [("adaad_IGDM", ["--attack", attack]) for attack in ("pgd", "rslad", "igdm")]
CASES += [("rslad_IGDM", ["--beta", "0.7", "--gamma", "1.3"])]


@pytest.mark.parametrize(("method", "flags"), CASES)
def test_weights_and_statistics_equal_the_reference(method, flags, networks, batches):
    """Of a plain step, and of one with the engine's accelerated networks."""
    student, teacher = networks
    args = settings(method, *flags)
    expected = copy.deepcopy(student)
    torch.manual_seed(5)
    reference_loss = reference_run(method, expected, copy.deepcopy(teacher), batches, args)
    machine = engine()
    for around in ({}, {"wrap": machine.accelerate, "around": machine.step}):
        ours = copy.deepcopy(student)
        torch.manual_seed(5)
        loss = product_run(method, ours, copy.deepcopy(teacher), batches, args, **around)
        assert loss == pytest.approx(reference_loss, rel=1e-9)
        assert_same_network(ours, expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_teachers_own_mode_does_not_matter(method, networks, batches):
    """A teacher left in train mode answers as in eval mode, and neither its statistics nor its mode move."""
    student, teacher = networks
    expected, careless = copy.deepcopy(student), copy.deepcopy(teacher).train()
    torch.manual_seed(5)
    product_run(method, expected, teacher, batches, settings(method))
    torch.manual_seed(5)
    product_run(method, student, careless, batches, settings(method))
    assert all(module.training for module in careless.modules())
    assert_same_network(careless, teacher)
    assert_same_network(student, expected)
