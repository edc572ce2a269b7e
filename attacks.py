"""Inner maximisation: one L-infinity ascent loop, and the attacks of ARD, RSLAD, AdaAD and IGDM built on it.

Conventions of every public attack here:
    x is (N, C, H, W) in [0, 1]; y is (N,) int64; epsilon and step_size are in the same units, pixels in [0, 1].
    Returns x_adv with the shape, dtype and device of x, detached, with |x_adv - x| <= epsilon and values in [0, 1].
    Networks run in eval mode with frozen parameters during the attack; the mode of every submodule and every
    requires_grad are restored afterwards, also after an exception. No ``.grad`` is changed.
    A random start is one draw per call from the global generator of x's device, in contiguous layout, so that the
    result does not depend on the memory format of x.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rslad_loss import at_least_float32, kl_divergence

EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10
"""The defaults of every attack: the budget on which the scripts train."""

INNER_MAXIMISATIONS = ("pgd", "rslad", "adaad", "igdm")
"""The names that ``perturb`` and ``--attack`` take; ``pgd`` is ARD's."""

_shard: ContextVar[tuple[int, int] | None] = ContextVar("shard", default=None)
_step: ContextVar[Callable[..., Tensor] | None] = ContextVar("step", default=None)


@contextmanager
def _set(variable: ContextVar, value: object) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def shard_of(first: int, total: int) -> AbstractContextManager[None]:
    """Draw random starts for `total` images and use the rows from `first` on.

    Ranks with the same generator state then give every image of the global batch the start of a single process.
    """
    return _set(_shard, (first, total))


def steps_by(step: Callable[..., Tensor]) -> AbstractContextManager[None]:
    """Let `ascend` use a faster implementation of `sign_step`."""
    return _set(_step, step)


@contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """Put the models in eval mode and turn off requires_grad of their parameters; restore each module's flags on exit.

    Otherwise a compiled graph would compute weight gradients even for ``autograd.grad(loss, [x])``.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        for module, _ in modes:
            # Set each flag directly: train() and eval() of a frozen teacher may ignore the call.
            module.training = False
        for parameter, _ in grads:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)


def _global_draw(x: Tensor, draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Draw noise of x's shape, or take x's rows of a draw for the global batch (see `shard_of`)."""
    shard = _shard.get()
    if shard is None:
        return draw(tuple(x.shape))
    first, total = shard
    return draw((total, *x.shape[1:]))[first : first + len(x)]


def uniform_start(x: Tensor, epsilon: float) -> Tensor:
    """x + U(-epsilon, epsilon), clamped to [0, 1]; one draw from the global generator."""
    if not epsilon >= 0:
        raise ValueError(f"epsilon {epsilon} is out of range (expected epsilon >= 0)")
    like_x = {"dtype": x.dtype, "device": x.device}
    noise = _global_draw(x, lambda shape: torch.empty(shape, **like_x).uniform_(-epsilon, epsilon))
    return (x + noise).clamp_(0, 1)


def gaussian_start(x: Tensor) -> Tensor:
    """x + 0.001 N(0, 1), not clamped, as in the released code of RSLAD and AdaAD; one float32 draw."""
    noise = _global_draw(x, lambda shape: torch.randn(shape, dtype=torch.float32, device=x.device))
    return (x + 0.001 * noise).to(x.dtype)


def project(x_adv: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """Clamp x_adv to the epsilon-ball around x, then to [0, 1], in place."""
    return torch.clamp(x_adv, min=x - epsilon, max=x + epsilon, out=x_adv).clamp_(0, 1)


def sign_step(
    objective: Callable[..., Tensor], x_adv: Tensor, x: Tensor, epsilon: float, step_size: float, given: tuple
) -> Tensor:
    """Take one step of `ascend`: move x_adv along the sign of the gradient of objective(x_adv, *given), and project."""
    x_adv = x_adv.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(x_adv, *given), [x_adv])
    with torch.no_grad():
        return project(x_adv + step_size * gradient.sign(), x, epsilon)


def ascend(
    objective: Callable[..., Tensor],
    x: Tensor,
    start: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    given: tuple[Tensor, ...] = (),
) -> Tensor:
    """L-infinity sign ascent on `objective` from `start`, projected after every step.

    Args:
        objective: maps x_adv (N, C, H, W) and `given` to a scalar, a sum over images. With a mean, rounding would let
            an image's path depend on the other images of its batch.
        x: (N, C, H, W) in [0, 1], the centre of the ball.
        start: (N, C, H, W), the first point; may be outside [0, 1].
        steps: number of gradient steps; 0 returns the projected start.
        given: further arguments of the objective, constant during the attack.

    Raises:
        ValueError: epsilon, step_size or steps is negative or NaN.

    Source: Madry et al., ICLR 2018, eq. 2; projection: epsilon-ball first, then [0, 1].
    """
    if not (epsilon >= 0 and step_size >= 0 and steps >= 0):
        raise ValueError(f"epsilon {epsilon}, step_size {step_size}, steps {steps}: all must be at least 0")
    x, x_adv = x.detach(), start.detach()
    step = _step.get() or sign_step
    with torch.enable_grad():
        for _ in range(steps):
            x_adv = step(objective, x_adv, x, epsilon, step_size, given)
    return x_adv.detach() if steps else project(x_adv.clone(), x, epsilon)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, epsilon: float = EPSILON, random_start: bool = False) -> Tensor:
    """Take one step of length epsilon on CE(model(x), y), from x or from a uniform start in the ball.

    Source: Goodfellow et al., ICLR 2015.
    """
    return pgd(model, x, y, epsilon, epsilon, 1, random_start)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float = EPSILON,
    step_size: float = STEP_SIZE,
    steps: int = STEPS,
    random_start: bool = True,
) -> Tensor:
    """argmax CE(model(x + delta), y): ARD's inner loop, and the PGD-20 of every evaluation.

    Source: Madry et al., ICLR 2018; uniform start in the ball, clamped to [0, 1], unless random_start is False.
    """

    def objective(x_adv: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(model(x_adv)), y, reduction="sum")

    with frozen(model):
        start = uniform_start(x, epsilon) if random_start else x
        return ascend(objective, x, start, epsilon, step_size, steps, (y,))


def cw(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float = EPSILON, step_size: float = STEP_SIZE, steps: int = STEPS
) -> Tensor:
    """argmax max_{j != y} model(x + delta)_j - model(x + delta)_y, uniform start: the L-infinity C&W attack.

    Source: the margin loss of Carlini & Wagner, S&P 2017 (f_6 at kappa = infinity), maximised by PGD as in
    the distillation literature.
    """

    def objective(x_adv: Tensor, y: Tensor) -> Tensor:
        logits = at_least_float32(model(x_adv))
        true = logits.gather(1, y[:, None])
        others = logits.scatter(1, y[:, None], float("-inf"))
        return (others.amax(dim=1, keepdim=True) - true).sum()

    with frozen(model):
        return ascend(objective, x, uniform_start(x, epsilon), epsilon, step_size, steps, (y,))


def rslad(
    student: nn.Module,
    teacher_logits: Tensor,
    x: Tensor,
    epsilon: float = EPSILON,
    step_size: float = STEP_SIZE,
    steps: int = STEPS,
) -> Tensor:
    """argmax KL(T(x) || S(x + delta)), started at x + 0.001 N(0, 1).

    Args:
        teacher_logits: (N, C), T(x), constant during the attack.

    Source: Zi et al., ICCV 2021, eq. 9.
    """
    teacher_logits = teacher_logits.detach()

    def objective(x_adv: Tensor, teacher_logits: Tensor) -> Tensor:
        return kl_divergence(student(x_adv), teacher_logits, reduction="sum")

    with frozen(student):
        return ascend(objective, x, gaussian_start(x), epsilon, step_size, steps, (teacher_logits,))


def adaad(
    student: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    epsilon: float = EPSILON,
    step_size: float = STEP_SIZE,
    steps: int = STEPS,
    teacher_every: int = 1,
) -> Tensor:
    """argmax KL(T(x + delta) || S(x + delta)), started at x + 0.001 N(0, 1).

    The gradient flows through the teacher as well as the student.

    Args:
        teacher_every: K >= 1; the teacher is evaluated, forward and backward, at the steps 0, K, 2K, ... only. In
            between, its logits and its share of the gradient are kept (see `_with_kept_teacher`). 1 is AdaAD.

    Raises:
        ValueError: teacher_every is below 1.

    Source: Huang et al., CVPR 2023, eq. 5.
    """
    if teacher_every < 1:
        raise ValueError(f"teacher_every {teacher_every} is out of range (expected a whole number from 1)")

    def objective(x_adv: Tensor) -> Tensor:
        return kl_divergence(student(x_adv), teacher(x_adv), reduction="sum")

    if teacher_every > 1:
        objective = _with_kept_teacher(student, teacher, teacher_every)
    with frozen(student, teacher):
        return ascend(objective, x, gaussian_start(x), epsilon, step_size, steps)


def _with_kept_teacher(student: nn.Module, teacher: nn.Module, teacher_every: int) -> Callable[[Tensor], Tensor]:
    """AdaAD's objective with a teacher that is evaluated at every K-th step only, for one call of `ascend`.

    The gradient at step k is J_S(x_k)^T dKL/dS at S(x_k) and T(x_j), plus the teacher's share, J_T(x_j)^T dKL/dT at
    S(x_j) and T(x_j); j = K floor(k / K) is the last step at which the teacher was evaluated. The share is constant
    between two evaluations, so it enters as a linear term.

    Source: ours. Related: YOPO (Zhang et al., NeurIPS 2019) keeps a network's costate over several steps; SAAD (Lee &
    Chung, TMLR 2026) linearises the teacher once per batch, in the true class's logit.
    """
    step = itertools.count()
    teacher_logits = teacher_share = None

    def objective(x_adv: Tensor) -> Tensor:
        nonlocal teacher_logits, teacher_share
        student_logits = student(x_adv)
        if next(step) % teacher_every == 0:
            x_teacher = x_adv.detach().requires_grad_()
            teacher_logits = teacher(x_teacher)
            divergence = kl_divergence(student_logits.detach(), teacher_logits, reduction="sum")
            (teacher_share,) = torch.autograd.grad(divergence, [x_teacher])
            teacher_logits = teacher_logits.detach()
        return kl_divergence(student_logits, teacher_logits, reduction="sum") + (teacher_share * x_adv).sum()

    return objective


def igdm(
    student: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    epsilon: float = EPSILON,
    step_size: float = STEP_SIZE,
    steps: int = STEPS,
) -> Tensor:
    """argmax L_IGDM with beta = gamma = 1: KL(T(x+d) - T(x-d) || S(x+d) - S(x-d)), uniform start.

    The gradient reaches x_adv through all four branches, the minus branches being evaluated at 2x - x_adv.

    Source: Lee, Cho, Kim, ICLR 2025 (IGDM used as the inner loss).
    """

    def objective(x_adv: Tensor, x: Tensor) -> Tensor:
        # Both branches in one batch: networks are in eval mode, so images do not mix.
        both = torch.cat([x_adv, 2 * x - x_adv])
        student_plus, student_minus = at_least_float32(student(both)).chunk(2)
        teacher_plus, teacher_minus = at_least_float32(teacher(both)).chunk(2)
        return kl_divergence(student_plus - student_minus, teacher_plus - teacher_minus, reduction="sum")

    with frozen(student, teacher):
        return ascend(objective, x, uniform_start(x, epsilon), epsilon, step_size, steps, (x,))


def perturb(
    attack: str,
    student: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float = EPSILON,
    step_size: float = STEP_SIZE,
    steps: int = STEPS,
    teacher_clean: Tensor | None = None,
    teacher_every: int = 1,
) -> Tensor:
    """Run the inner maximisation that ``--attack`` selects, one of INNER_MAXIMISATIONS.

    ``rslad`` computes T(x), (N, C), unless `teacher_clean` gives it.
    """
    budget = epsilon, step_size, steps
    if attack == "pgd":
        return pgd(student, x, y, *budget)
    if attack == "rslad":
        if teacher_clean is None:
            with torch.no_grad(), frozen(teacher):
                teacher_clean = teacher(x)
        return rslad(student, teacher_clean, x, *budget)
    if attack == "adaad":
        return adaad(student, teacher, x, *budget, teacher_every)
    if attack == "igdm":
        return igdm(student, teacher, x, *budget)
    raise ValueError(f"attack {attack!r} is not one of {', '.join(INNER_MAXIMISATIONS)}")
