"""Outer losses of ARD, RSLAD, AdaAD and IGDM: pure functions of logits.

Every function takes logits of shape (N, C), reduces to a scalar by the mean over the batch (``batchmean``: sum
over classes, mean over images) and computes in at least float32, whatever precision the networks ran in.
Gradients flow into every argument that requires them; pass targets without a graph.
The file has the name that it has in RSLAD's released code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """Convert half-precision logits to float32; return float32 and float64 unchanged."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, reduction: str = "batchmean") -> Tensor:
    """KL(T || S) = mean over images of sum_c softmax(T)_c (log softmax(T)_c - log softmax(S)_c).

    Args:
        student_logits: (N, C), any real values.
        teacher_logits: (N, C), any real values.
        reduction: ``sum`` adds over images, as attacks do; ``none`` returns the (N, C) terms.

    Returns:
        Scalar >= 0 up to rounding.

    Raises:
        ValueError: the shapes differ (a single teacher row would otherwise be broadcast).

    Source: Hinton et al. 2015 at temperature 1; ``kl_div(log_softmax(S), softmax(T), batchmean)``.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}: shapes differ"
        )
    log_student = F.log_softmax(at_least_float32(student_logits), dim=1)
    # log_target: where a teacher probability underflows to 0, the gradient of the target would be log(0) = -inf, and
    # AdaAD's attack, which differentiates the teacher too, would produce NaN.
    log_teacher = F.log_softmax(at_least_float32(teacher_logits), dim=1)
    return F.kl_div(log_student, log_teacher, reduction=reduction, log_target=True)


def ard(student_adv: Tensor, teacher_logits: Tensor, y: Tensor, ce_weight: float = 0.0) -> Tensor:
    """KL(T || S(x_adv)) + ce_weight * CE(S(x_adv), y).

    Args:
        student_adv: (N, C), the student's logits at x_adv.
        teacher_logits: (N, C), T(x_adv), or T(x) as in the paper (``--target``).
        y: (N,) int64 labels in [0, C); used only if ce_weight is not 0.
        ce_weight: lambda >= 0; the published CIFAR runs use 0.

    Returns:
        Scalar.

    Source: Goldblum et al., Adversarially Robust Distillation, AAAI 2020, eq. 4, at temperature 1.
    """
    student_adv = at_least_float32(student_adv)
    loss = kl_divergence(student_adv, teacher_logits)
    if ce_weight:
        loss = loss + ce_weight * F.cross_entropy(student_adv, y)
    return loss


def rslad(
    student_adv: Tensor,
    teacher_logits: Tensor,
    student_clean: Tensor | None = None,
    clean_weight: float = 0.0,
    loss_scale: float = 1.0,
    *,
    teacher_clean: Tensor | None = None,
) -> Tensor:
    """loss_scale * ((1 - clean_weight) KL(T || S(x_adv)) + clean_weight KL(T(x) || S(x))).

    Args:
        student_adv: (N, C), the student's logits at x_adv.
        teacher_logits: (N, C), T(x_adv), or T(x) as in the paper (``--target``).
        student_clean: (N, C), S(x); needed only if clean_weight is not 0.
        clean_weight: share of the clean term in [0, 1]; 1/6 in the paper.
        loss_scale: factor of the whole loss; 0.1 in the released code, which averages over N x 100 entries and
            multiplies by 10. It also acts as a learning rate, and IGDM's alpha is relative to it.
        teacher_clean: (N, C), T(x); default teacher_logits.

    Returns:
        Scalar.

    Raises:
        ValueError: clean_weight is not 0 and student_clean is missing.

    Source: Zi et al., Revisiting Adversarial Robustness Distillation (RSLAD), ICCV 2021, eq. 8.
    """
    if not clean_weight:
        return loss_scale * kl_divergence(student_adv, teacher_logits)
    if student_clean is None:
        raise ValueError(f"rslad: clean_weight {clean_weight} needs student_clean, the logits S(x)")
    clean_term = kl_divergence(student_clean, teacher_logits if teacher_clean is None else teacher_clean)
    return loss_scale * ((1 - clean_weight) * kl_divergence(student_adv, teacher_logits) + clean_weight * clean_term)


def adaad(student_adv: Tensor, teacher_adv: Tensor) -> Tensor:
    """KL(T(x_adv) || S(x_adv)).

    Args:
        student_adv: (N, C), the student's logits at x_adv.
        teacher_adv: (N, C), the teacher's logits at the same x_adv.

    Returns:
        Scalar.

    Source: Huang et al., Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation
    (AdaAD), CVPR 2023, eq. 6, with the clean term's weight 0 as in the published runs.
    """
    return kl_divergence(student_adv, teacher_adv)


def igdm(student_plus: Tensor, student_minus: Tensor, teacher_plus: Tensor, teacher_minus: Tensor) -> Tensor:
    """KL(T(x + beta delta) - T(x - gamma delta) || S(x + beta delta) - S(x - gamma delta)).

    The softmax is taken of the logit differences. To first order they are <input gradient, (beta + gamma) delta>, so
    matching them matches the input gradients along delta without computing them.

    Args:
        student_plus: (N, C), the student's logits at x + beta delta.
        student_minus: (N, C), the student's logits at x - gamma delta.
        teacher_plus: (N, C), the teacher's logits at x + beta delta.
        teacher_minus: (N, C), the teacher's logits at x - gamma delta.

    Returns:
        Scalar; gradients reach both student branches, with opposite signs.

    Source: Lee, Cho, Kim, Indirect Gradient Matching for Adversarial Robust Distillation, ICLR 2025, eq. 9.
    """
    # Convert half precision before the subtraction, which would otherwise lose the small difference.
    student_change = at_least_float32(student_plus) - at_least_float32(student_minus)
    teacher_change = at_least_float32(teacher_plus) - at_least_float32(teacher_minus)
    return kl_divergence(student_change, teacher_change)
