"""The baseline of the benchmarks: a training step with the forward and backward passes of the published code.

Written for this project after a count of these passes. It also keeps the published code's style: contiguous NCHW, eager
float32, unfrozen networks, one pass per branch, the backward pass of zero-weighted terms, and a loss that the host
reads in every step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10
ALPHA, EPOCH, RAMP = 20.0, 1, 200


def kl(student_logits: Tensor, teacher_logits: Tensor, reduction: str = "batchmean") -> Tensor:
    """Compute KL(T || S) from softmax probabilities."""
    return F.kl_div(F.log_softmax(student_logits, dim=1), F.softmax(teacher_logits, dim=1), reduction=reduction)


def move(x_adv: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """One step of sign ascent, projected into the ball and into [0, 1]."""
    x_adv = x_adv.detach() + STEP_SIZE * torch.sign(gradient.detach())
    return torch.clamp(torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON), 0.0, 1.0)


def attack(base: str, student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Run the inner maximisation of ard, rslad or adaad; return x_adv and T(x) (None: computed later)."""
    teacher_clean = None
    if base != "adaad":
        with torch.no_grad():
            teacher_clean = teacher(x)
    if base == "ard":
        x_adv = torch.clamp(x + torch.empty_like(x).uniform_(-EPSILON, EPSILON), 0.0, 1.0)
    else:
        x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        if base == "ard":
            loss = F.cross_entropy(student(x_adv), y)
        elif base == "rslad":
            loss = kl(student(x_adv), teacher_clean, "sum")
        else:
            loss = kl(student(x_adv), teacher(x_adv), "sum")
        (gradient,) = torch.autograd.grad(loss, [x_adv])
        x_adv = move(x_adv, x, gradient)
    if teacher_clean is None:
        with torch.no_grad():
            teacher_clean = teacher(x)
    return x_adv.detach(), teacher_clean


def training_step(
    method: str, student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> float:
    """One optimizer step of `method`: ard, rslad or adaad, or one of these with _IGDM; returns the loss."""
    base, _, added = method.partition("_")
    student.eval()
    x_adv, teacher_clean = attack(base, student, teacher, x, y)
    student.train()
    optimizer.zero_grad()
    teacher_adv = None
    if base == "adaad" or (base == "rslad" and added):
        with torch.no_grad():
            teacher_adv = teacher(x_adv)
    student_clean = None
    if added:
        x_plus, x_minus = x + (x_adv - x), x - (x_adv - x)
        with torch.no_grad():
            teacher_change = teacher(x_plus) - teacher(x_minus)
        student_plus = student(x_plus)
        if base != "ard":
            student_clean = student(x)
        student_change = student_plus - student(x_minus)
    else:
        student_clean = student(x)
    student_adv = student(x_adv)
    if base == "ard":
        loss = kl(student_adv, teacher_clean)
        if student_clean is not None:
            loss = loss + 0.0 * F.cross_entropy(student_clean, y)
    elif base == "rslad":
        target = teacher_clean if teacher_adv is None else teacher_adv
        loss = 5 / 6 * kl(student_adv, target) + 1 / 6 * kl(student_clean, teacher_clean)
    else:
        loss = kl(student_adv, teacher_adv) + 0.0 * kl(student_clean, teacher_clean)
    if added:
        loss = loss + ALPHA * EPOCH / RAMP * kl(student_change, teacher_change)
    loss.backward()
    optimizer.step()
    return loss.item()


def pgd_correct(model: nn.Module, x: Tensor, y: Tensor, steps: int = 20, weight_gradients: bool = True) -> int:
    """Count the images of one batch that are correctly classified under PGD.

    `weight_gradients` calls ``loss.backward()``, as TRADES' evaluation does and many copied: it also computes weight
    gradients in every step, which are not used.
    """
    x_adv = torch.clamp(x + torch.empty_like(x).uniform_(-EPSILON, EPSILON), 0.0, 1.0)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(x_adv), y)
        if weight_gradients:
            model.zero_grad()
            loss.backward()
            gradient = x_adv.grad
        else:
            (gradient,) = torch.autograd.grad(loss, [x_adv])
        x_adv = move(x_adv, x, gradient)
    with torch.no_grad():
        return (model(x_adv).argmax(dim=1) == y).sum().item()
