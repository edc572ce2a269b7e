"""Outer losses against the float64 reference, finite differences and the form that RSLAD's release has.

Tolerance: float64 sums of at most a few hundred terms agree to 1e-12.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import cross_entropy, kl

import rslad_loss

CLOSE = {"rel": 1e-12, "abs": 1e-12}
Y = torch.tensor([0, 2, 1])


def logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def four(classes=5, scale=3.0):
    """Logits of two students and two teachers."""
    return [logits(3, classes, seed=seed, scale=scale) for seed in (1, 2, 3, 4)]


values = st.floats(-20, 20)
pairs = st.integers(2, 6).flatmap(
    lambda classes: st.lists(
        st.tuples(*[st.lists(values, min_size=classes, max_size=classes)] * 2), min_size=1, max_size=4
    )
)


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_kl_is_the_mean_over_images_of_the_sum_over_classes(pairs):
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in zip(*pairs, strict=True))
    loss = rslad_loss.kl_divergence(student, teacher).item()
    # The two logarithms cancel: up to 40 in size, so some 1e-14 is lost.
    assert loss == pytest.approx(kl(teacher, student).item(), rel=1e-10, abs=1e-12)


def test_kl_of_two_classes_by_hand():
    # softmax of (0, log 3) is (1/4, 3/4), of (0, 0) is (1/2, 1/2).
    teacher, student = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert rslad_loss.kl_divergence(student, teacher).item() == pytest.approx(forward, rel=1e-6)


def test_each_loss_is_its_equation():
    student, other, teacher, teacher_other = four()
    divergence, ce = kl(teacher, student), cross_entropy(student, Y)
    change = kl(teacher - teacher_other, student - other)
    for loss, expected in (
        (rslad_loss.ard(student, teacher, Y), divergence),
        (rslad_loss.ard(student, teacher, Y, 0.3), divergence + 0.3 * ce),
        (rslad_loss.rslad(student, teacher), divergence),
        (rslad_loss.rslad(student, teacher, other), divergence),
        (rslad_loss.adaad(student, teacher), divergence),
        (rslad_loss.igdm(student, other, teacher, teacher_other), change),
    ):
        assert loss.item() == pytest.approx(expected.item(), **CLOSE)


@given(st.floats(0, 1), st.floats(0.01, 10))
@settings(max_examples=40, deadline=None)
def test_rslad_weighs_each_term_against_its_own_target(weight, scale):
    student_adv, student_clean, teacher_adv, teacher_clean = four()
    loss = rslad_loss.rslad(student_adv, teacher_adv, student_clean, weight, scale, teacher_clean=teacher_clean)
    expected = scale * ((1 - weight) * kl(teacher_adv, student_adv) + weight * kl(teacher_clean, student_clean))
    assert loss.item() == pytest.approx(expected.item(), **CLOSE)


def test_rslad_without_the_clean_logits_that_it_needs_is_an_error():
    with pytest.raises(ValueError, match=r"clean_weight 0\.5 needs student_clean"):
        rslad_loss.rslad(logits(2, 3), logits(2, 3), None, 0.5)


def test_rows_and_classes_must_match():
    """One row of teacher logits must not silently serve a batch of students."""
    for teacher in (logits(1, 4), logits(3, 5)):
        with pytest.raises(ValueError, match=r"\(3, 4\)"):
            rslad_loss.kl_divergence(logits(3, 4), teacher)


# Gradients and precision of all

LOSSES = {
    "kl": lambda a, b, c, d: rslad_loss.kl_divergence(a, c),
    "ard": lambda a, b, c, d: rslad_loss.ard(a, c, Y, 0.7),
    "rslad": lambda a, b, c, d: rslad_loss.rslad(a, c, b, 1 / 6, 0.1, teacher_clean=d),
    "adaad": lambda a, b, c, d: rslad_loss.adaad(a, c),
    "igdm": rslad_loss.igdm,
}
"""At weights that use every term; a, b are students' logits and c, d teachers'."""
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_logits_give_finite_loss_and_gradients(name, dtype):
    # One class 1e4 above the others, a different one for student and teacher: softmax underflows to 0 in both.
    classes = (([0, 1, 2], 1), ([0, 1, 2], -2), ([3, 1, 4], 1), ([3, 1, 4], -1))
    inputs = [(1e4 * sign * F.one_hot(torch.tensor(hot), 5)).to(dtype).requires_grad_() for hot, sign in classes]
    loss = LOSSES[name](*inputs)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 100
    assert all(z.grad is None or torch.isfinite(z.grad).all() for z in inputs)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    """IGDM's small changes of large logits too: a difference in half precision would be rounded away."""
    half = [z.to(dtype).requires_grad_() for z in four()]
    wide = [z.detach().float().requires_grad_() for z in half]
    loss, expected = LOSSES[name](*half), LOSSES[name](*wide)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert half[0].grad.dtype == dtype
    # Each of ARD's two terms hands its gradient, below 1 in size, back in half precision, and so is their sum.
    torch.testing.assert_close(half[0].grad.float(), wide[0].grad, rtol=0, atol=torch.finfo(dtype).eps)
