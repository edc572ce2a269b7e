"""The scripts' training steps against the slow float64 reference of tests/reference.py.

Tolerance: both sides compute in float64, in different orders; over three steps of a small ResNet that leaves some
1e-13, and a wrong pass, sign or weight leaves more than 1e-6.
"""

import copy
import itertools

import pytest
import torch
from reference import EXAMPLES, SCRIPTS, assert_same_network, product_run, reference_run, settings

METHODS = (*SCRIPTS, *EXAMPLES)
FLAGS = {
    "default": [],
    "paper": ["--preset", "paper"],
    "other": [
        *("--beta", "0.7", "--gamma", "1.3", "--ce_weight", "0.5", "--clean_weight", "0.25"),
        *("--trades_weight", "3", "--clean_factor", "0.6", "--entropy_factor", "4"),
    ],
}


def flags_for(method, kind):
    """The flags of a case that the script has."""
    own = settings(method)
    pairs = list(zip(FLAGS[kind][::2], FLAGS[kind][1::2], strict=True))
    return [part for flag, value in pairs if hasattr(own, flag[2:]) for part in (flag, value)]


def cases():
    """Every method with every kind of flags that it has."""
    return [
        (method, kind)
        for method, kind in itertools.product(METHODS, FLAGS)
        if flags_for(method, kind) or kind == "default"
    ]


@pytest.mark.parametrize(("method", "kind"), cases())
def test_weights_and_statistics_equal_the_reference(method, kind, networks, batches):
    student, teacher = networks
    args = settings(method, *flags_for(method, kind))
    expected = copy.deepcopy(student)
    torch.manual_seed(5)
    reference_loss_value = reference_run(method, expected, copy.deepcopy(teacher), batches, args)
    torch.manual_seed(5)
    loss = product_run(method, student, teacher, batches, args)
    assert loss == pytest.approx(reference_loss_value, rel=1e-9)
    assert_same_network(student, expected)


@pytest.mark.parametrize("attack", ["pgd", "rslad", "adaad", "igdm"])
def test_every_attack_choice_equals_the_reference(attack, networks, batches):
    student, teacher = networks
    args = settings("adaad_IGDM", "--attack", attack)
    expected = copy.deepcopy(student)
    torch.manual_seed(5)
    reference_run("adaad_IGDM", expected, copy.deepcopy(teacher), batches, args)
    torch.manual_seed(5)
    product_run("adaad_IGDM", student, teacher, batches, args)
    assert_same_network(student, expected)


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


def test_the_reference_notices_what_it_must(networks, batches):
    """The tolerance is not so wide that a wrong pass fits in: one weight off is seen."""
    (student, teacher), method = networks, "adaad_IGDM"
    args = settings(method)
    expected = copy.deepcopy(student)
    torch.manual_seed(5)
    reference_run(method, expected, copy.deepcopy(teacher), batches, args)
    torch.manual_seed(5)
    args.wd *= 1.0001
    product_run(method, student, teacher, batches, args)
    with pytest.raises(AssertionError):
        assert_same_network(student, expected)
