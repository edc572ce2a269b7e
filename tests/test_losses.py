"""Outer losses against closed forms, finite differences and the form that RSLAD's release has.

Tolerances: float64 sums of at most a few hundred terms agree to 1e-12; float32 ones to 1e-5.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rslad_loss

CLOSE = {"rel": 1e-12, "abs": 1e-12}
HALF = (torch.bfloat16, torch.float16)


def logits(*shape, seed=0, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def slow_kl(student_rows, teacher_rows):
    """Mean over rows of sum_c p_c log(p_c / q_c), in plain Python."""
    total = 0.0
    for student, teacher in zip(student_rows, teacher_rows, strict=True):
        q_sum, p_sum = sum(map(math.exp, student)), sum(map(math.exp, teacher))
        for s, t in zip(student, teacher, strict=True):
            p, q = math.exp(t) / p_sum, math.exp(s) / q_sum
            total += p * (math.log(p) - math.log(q))
    return total / len(teacher_rows)


values = st.floats(-20, 20)
rows = st.integers(2, 6).flatmap(
    lambda classes: st.lists(
        st.tuples(*[st.lists(values, min_size=classes, max_size=classes)] * 2), min_size=1, max_size=4
    )
)


# kl_divergence


def test_kl_of_two_classes_by_hand():
    # softmax of (0, log 3) is (1/4, 3/4), of (0, 0) is (1/2, 1/2).
    teacher, student = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert rslad_loss.kl_divergence(student, teacher).item() == pytest.approx(forward, rel=1e-6)
    assert rslad_loss.kl_divergence(teacher, student).item() == pytest.approx(backward, rel=1e-6)


def test_kl_is_the_mean_over_images_of_the_sum_over_classes():
    student, teacher = logits(4, 7, seed=1), logits(4, 7, seed=2)
    each = [rslad_loss.kl_divergence(student[i : i + 1], teacher[i : i + 1]).item() for i in range(4)]
    assert rslad_loss.kl_divergence(student, teacher).item() == pytest.approx(sum(each) / 4, **CLOSE)


@given(rows)
@settings(max_examples=60, deadline=None)
def test_kl_equals_a_plain_python_loop(pairs):
    student, teacher = [s for s, _ in pairs], [t for _, t in pairs]
    loss = rslad_loss.kl_divergence(
        torch.tensor(student, dtype=torch.float64), torch.tensor(teacher, dtype=torch.float64)
    )
    # The two logarithms of the loop cancel: up to 40 in size, so some 1e-14 is lost.
    assert loss.item() == pytest.approx(slow_kl(student, teacher), rel=1e-10, abs=1e-12)
    assert loss.item() >= -1e-12


def test_kl_equals_the_documented_formula():
    student, teacher = logits(5, 10, seed=1), logits(5, 10, seed=2)
    formula = F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="batchmean")
    assert rslad_loss.kl_divergence(student, teacher).item() == pytest.approx(formula.item(), **CLOSE)


@given(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=8), st.floats(-100, 100))
@settings(max_examples=60, deadline=None)
def test_kl_of_identical_logits_is_zero_and_a_shift_does_not_matter(row, shift):
    z = torch.tensor([row], dtype=torch.float64)
    assert rslad_loss.kl_divergence(z, z).item() == 0
    # Logits of 1e4 are stored to 1e-12.
    assert rslad_loss.kl_divergence(z + shift, z).item() == pytest.approx(0, abs=1e-10)


# ard


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
def test_ard_adds_lambda_times_the_cross_entropy(weight):
    student, teacher, y = logits(3, 4, seed=1), logits(3, 4, seed=2), torch.tensor([0, 3, 1])
    ce = 0.0
    for row, label in zip(student.tolist(), y.tolist(), strict=True):
        ce += math.log(sum(map(math.exp, row))) - row[label]
    expected = slow_kl(student.tolist(), teacher.tolist()) + weight * ce / 3
    assert rslad_loss.ard(student, teacher, y, weight).item() == pytest.approx(expected, **CLOSE)


def test_ard_has_no_cross_entropy_by_default():
    student, teacher, y = logits(3, 4, seed=1), logits(3, 4, seed=2), torch.tensor([0, 3, 1])
    assert torch.equal(rslad_loss.ard(student, teacher, y), rslad_loss.kl_divergence(student, teacher))


# rslad


def test_rslad_paper_weights_equal_the_release():
    """The release: 10 x the mean over N x 100 entries; 5/6 adversarial and 1/6 clean, both against T(x)."""
    student_adv, student_clean, teacher_clean = (logits(6, 100, seed=seed) for seed in (1, 2, 3))

    def mean_over_entries(student):
        p, log_p = F.softmax(teacher_clean, dim=1), F.log_softmax(teacher_clean, dim=1)
        return (p * (log_p - F.log_softmax(student, dim=1))).mean()

    release = 10 * (5 / 6 * mean_over_entries(student_adv) + 1 / 6 * mean_over_entries(student_clean))
    loss = rslad_loss.rslad(student_adv, teacher_clean, student_clean, 1 / 6, 0.1)
    assert loss.item() == pytest.approx(release.item(), **CLOSE)


def test_rslad_default_is_the_plain_divergence():
    student, teacher = logits(3, 4, seed=1), logits(3, 4, seed=2)
    assert torch.equal(rslad_loss.rslad(student, teacher), rslad_loss.kl_divergence(student, teacher))
    # A clean pass without weight is not part of the loss.
    clean = logits(3, 4, seed=3).requires_grad_()
    assert torch.equal(rslad_loss.rslad(student, teacher, clean), rslad_loss.kl_divergence(student, teacher))
    assert not rslad_loss.rslad(student, teacher, clean).requires_grad


@given(st.floats(0, 1), st.floats(0.01, 10))
@settings(max_examples=40, deadline=None)
def test_rslad_weighs_each_term_against_its_own_target(weight, scale):
    student_adv, student_clean, teacher_adv, teacher_clean = (logits(3, 5, seed=seed) for seed in (1, 2, 3, 4))
    loss = rslad_loss.rslad(student_adv, teacher_adv, student_clean, weight, scale, teacher_clean=teacher_clean)
    robust = slow_kl(student_adv.tolist(), teacher_adv.tolist())
    clean = slow_kl(student_clean.tolist(), teacher_clean.tolist())
    assert loss.item() == pytest.approx(scale * ((1 - weight) * robust + weight * clean), **CLOSE)


def test_rslad_without_the_clean_logits_it_needs_is_refused():
    with pytest.raises(ValueError, match=r"clean_weight 0\.5 needs student_clean") as caught:
        rslad_loss.rslad(logits(2, 3), logits(2, 3), None, 0.5)
    assert "\n" not in str(caught.value)


# adaad


def test_adaad_is_the_divergence_at_the_adversarial_point():
    student, teacher = logits(3, 4, seed=1), logits(3, 4, seed=2)
    assert rslad_loss.adaad(student, teacher).item() == pytest.approx(
        slow_kl(student.tolist(), teacher.tolist()), **CLOSE
    )


# igdm


def branches(n=3, classes=5, **options):
    return [logits(n, classes, seed=seed, **options) for seed in (1, 2, 3, 4)]


def test_igdm_is_the_divergence_of_the_differences():
    plus, minus, teacher_plus, teacher_minus = branches()
    expected = slow_kl((plus - minus).tolist(), (teacher_plus - teacher_minus).tolist())
    assert rslad_loss.igdm(plus, minus, teacher_plus, teacher_minus).item() == pytest.approx(expected, **CLOSE)


@given(st.integers(0, 3), st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_igdm_ignores_a_constant_added_to_all_logits_of_a_branch(branch, constant):
    before = branches()
    after = [z + constant if i == branch else z for i, z in enumerate(before)]
    # Logits of 50 are stored to 1e-14, and KL's slope is at most the spread of the logits, some 20.
    assert rslad_loss.igdm(*after).item() == pytest.approx(rslad_loss.igdm(*before).item(), rel=1e-11)


def test_igdm_ignores_what_both_branches_of_a_network_share():
    plus, minus, teacher_plus, teacher_minus = branches()
    shared = logits(3, 5, seed=9, scale=30)
    loss = rslad_loss.igdm(plus, minus, teacher_plus, teacher_minus).item()
    shifted = rslad_loss.igdm(plus + shared, minus + shared, teacher_plus, teacher_minus).item()
    assert shifted == pytest.approx(loss, rel=1e-11)
    shifted = rslad_loss.igdm(plus, minus, teacher_plus + shared, teacher_minus + shared).item()
    assert shifted == pytest.approx(loss, rel=1e-11)


def test_igdm_is_zero_where_the_changes_agree():
    plus, minus, teacher_plus, _ = branches()
    loss = rslad_loss.igdm(plus, minus, teacher_plus, teacher_plus - (plus - minus))
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_igdm_sends_opposite_gradients_to_the_two_student_branches():
    plus, minus, teacher_plus, teacher_minus = branches()
    plus.requires_grad_()
    minus.requires_grad_()
    rslad_loss.igdm(plus, minus, teacher_plus, teacher_minus).backward()
    # d KL(T || S) / d logits = softmax(S) - softmax(T), over the batch.
    student_p = F.softmax((plus - minus).detach(), dim=1)
    expected = (student_p - F.softmax(teacher_plus - teacher_minus, dim=1)) / len(plus)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(plus.grad, expected, rtol=0, atol=1e-15)
    assert torch.equal(minus.grad, -plus.grad)


# gradients of all


def both(student, teacher):
    """The losses as functions of two students' and two teachers' logits, at weights that use every term."""
    y = torch.tensor([0, 2, 1])[: len(student[0])]
    return {
        "kl": rslad_loss.kl_divergence(student[0], teacher[0]),
        "ard": rslad_loss.ard(student[0], teacher[0], y, 0.7),
        "rslad": rslad_loss.rslad(student[0], teacher[0], student[1], 1 / 6, 0.1, teacher_clean=teacher[1]),
        "adaad": rslad_loss.adaad(student[0], teacher[0]),
        "igdm": rslad_loss.igdm(student[0], student[1], teacher[0], teacher[1]),
    }


LOSSES = ("kl", "ard", "rslad", "adaad", "igdm")
TWO_STUDENTS = ("rslad", "igdm")


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
    inputs = [z.requires_grad_() for z in branches(scale=1.0)]

    def loss(a, b, c, d):
        return both((a, b), (c, d))[name]

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_targets_without_a_graph_are_left_alone(name):
    student, teacher = [z.requires_grad_() for z in branches()[:2]], branches()[2:]
    loss = both(student, teacher)[name]
    loss.backward()
    assert loss.shape == ()
    assert all(z.grad is None for z in teacher)
    assert not any(z.requires_grad for z in teacher)
    assert student[0].grad.abs().max() > 0
    assert (student[1].grad is not None) == (name in TWO_STUDENTS)
    assert not both([z.detach() for z in student], teacher)[name].requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_targets_that_ask_for_them(name):
    student, teacher = branches()[:2], [z.requires_grad_() for z in branches()[2:]]
    both(student, teacher)[name].backward()
    assert teacher[0].grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_saturated_logits_give_finite_loss_and_gradients(name, dtype):
    # One class 1e4 above the others, a different one for student and teacher: softmax underflows to 0 in both.
    student = [(1e4 * F.one_hot(torch.tensor([0, 1, 2]), 5)).to(dtype).requires_grad_() for _ in range(2)]
    teacher = [(1e4 * F.one_hot(torch.tensor([3, 1, 4]), 5)).to(dtype).requires_grad_() for _ in range(2)]
    teacher[1].data.neg_()
    student[1].data.mul_(-2)
    loss = both(student, teacher)[name]
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 100
    for z in (*student, *teacher):
        assert z.grad is None or torch.isfinite(z.grad).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    half = [z.to(dtype).requires_grad_() for z in branches()]
    wide = [z.detach().float().requires_grad_() for z in half]
    loss, expected = both(half[:2], half[2:])[name], both(wide[:2], wide[2:])[name]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert half[0].grad.dtype == dtype
    # Each of ARD's two terms hands its gradient, below 1 in size, back in half precision, and so is their sum.
    torch.testing.assert_close(half[0].grad.float(), wide[0].grad, rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALF)
def test_igdm_widens_before_it_subtracts(dtype):
    """Small changes of large logits: a difference taken in half precision would be rounded away."""
    # Each value fits into the eight bits of a bfloat16; the differences do not.
    plus, minus = torch.tensor([[1.5, 96.5, 3.0]], dtype=dtype), torch.tensor([[1 / 512, 1 / 64, -96.0]], dtype=dtype)
    teacher = torch.zeros(1, 3, dtype=dtype)
    exact = slow_kl((plus.double() - minus.double()).tolist(), [[0.0] * 3])
    rounded = slow_kl((plus - minus).double().tolist(), [[0.0] * 3])
    assert abs(rounded - exact) > 1e-3
    assert rslad_loss.igdm(plus, minus, teacher, teacher).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_kept(dtype):
    z = logits(2, 3, dtype=dtype)
    assert rslad_loss.at_least_float32(z) is z
    assert rslad_loss.kl_divergence(z, z).dtype == dtype


def test_rows_and_classes_must_match():
    """One row of teacher logits must not silently serve a batch of students."""
    for teacher in (logits(1, 4), logits(3, 5)):
        with pytest.raises(ValueError, match=r"\(3, 4\)"):
            rslad_loss.kl_divergence(logits(3, 4), teacher)
