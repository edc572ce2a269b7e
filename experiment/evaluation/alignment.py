"""Gradient alignment: distance and cosine between the input gradients of student and teacher."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.evaluation.accuracy import attack_of
from experiment.evaluation.batches import per_image

_MEASURES = (
    "with respect to the input (0 to 1 scale); means over images of "
    "GD = ||g_student - g_teacher||_2 and GC = cos(g_student, g_teacher), which counts as 0 for a zero gradient"
)

GRADIENT_DEFINITION = f"g = gradient of softmax(logits)[true class] {_MEASURES}"
"""Printed with GD and GC, because the paper does not state of which scalar it takes the gradient."""

Scalar = Callable[[Tensor, Tensor], Tensor]

SCALARS: dict[str, tuple[str, Scalar]] = {
    "probability": ("softmax(logits)[true class]", lambda z, y: F.softmax(z, dim=1).gather(1, y[:, None]).squeeze(1)),
    "cross_entropy": (
        "cross-entropy(logits, true class) = -log of the probability",
        lambda z, y: F.cross_entropy(z, y, reduction="none"),
    ),
    "logit": ("logits[true class]", lambda z, y: z.gather(1, y[:, None]).squeeze(1)),
}
"""The scalars f whose input gradients are compared: definition, and f(logits, y) of every image, (N,)."""

REMAINDER_DEFINITION = (
    "remainder = mean |f(x + d) - f(x) - g . d| / mean |f(x + d) - f(x)|: the share of the change under the student's "
    "PGD-20 perturbation d that its first-order term does not explain; 0 for a network that is linear in the ball"
)


def input_gradients(
    model: nn.Module, x: Tensor, y: Tensor, scalars: tuple[str, ...] = ("probability",)
) -> tuple[list[Tensor], list[Tensor]]:
    """Return values (N,) and input gradients (N, C, H, W) of each scalar in float64, from one forward pass.

    float64, because squares of a confident network's small gradients underflow in float32.
    """
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        values = [SCALARS[name][1](logits, y) for name in scalars]
        sums = [value.sum() for value in values]
    found = [torch.autograd.grad(total, [x], retain_graph=total is not sums[-1])[0] for total in sums]
    return [value.detach().double() for value in values], [gradient.double() for gradient in found]


def gradient_alignment(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, batch: int = 128
) -> dict[str, float]:
    """Compute GD and GC between the input gradients of student and teacher, as defined in `GRADIENT_DEFINITION`.

    One forward and one backward pass per network.

    Returns:
        ``gd``: mean L2 distance (lower is closer to the teacher); ``gc``: mean cosine (higher is closer).

    Source: Lee, Cho, Kim, ICLR 2025, section 5 (GD, GC).
    """

    def compare(clean: Tensor, labels: Tensor, *networks: nn.Module) -> tuple[Tensor, Tensor]:
        return _distance_and_cosine(*(input_gradients(network, clean, labels)[1][0] for network in networks))

    gd, gc = per_image(compare, x, y, batch, 0, student, teacher)
    return {"gd": gd.mean().item(), "gc": gc.mean().item()}


def gradient_report(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, seed: int = 0
) -> dict[str, Any]:
    """Compute GD and GC for each of `SCALARS`, and how far from linear each network is in the ball.

    Args:
        epsilon: radius of the student's PGD-20 perturbation, for the remainders.

    Returns:
        Plain types: ``gd`` and ``gc`` of the probability and their ``definition``, as a run's result.json has them;
        ``scalars``: for each scalar ``gd``, ``gc``, ``remainder_student``, ``remainder_teacher``, ``definition``;
        ``alignment_definition``, ``remainder_definition``, ``examples``, ``epsilon``, ``seed``.
    """

    def compare(clean: Tensor, labels: Tensor, *networks: nn.Module) -> tuple[Tensor, ...]:
        x_adv = attack_of("pgd", epsilon)(networks[0], clean, labels)
        delta = (x_adv - clean).double()
        before = [input_gradients(network, clean, labels, tuple(SCALARS)) for network in networks]
        after = [network(x_adv) for network in networks]
        columns = []
        for i, (_, scalar) in enumerate(SCALARS.values()):
            columns += _distance_and_cosine(*(gradients[i] for _, gradients in before))
            for (values, gradients), logits_adv in zip(before, after, strict=True):
                change = scalar(logits_adv, labels).double() - values[i]
                columns += [(change - (gradients[i] * delta).flatten(1).sum(dim=1)).abs(), change.abs()]
        return (torch.stack(columns, dim=1),)

    (rows,) = per_image(compare, x, y, 128, seed, student, teacher, progress="gradients")
    scalars = {}
    for (name, (definition, _)), means in zip(SCALARS.items(), rows.mean(dim=0).view(-1, 6).tolist(), strict=True):
        gd, gc, unexplained_student, change_student, unexplained_teacher, change_teacher = means
        scalars[name] = {
            "gd": gd,
            "gc": gc,
            "remainder_student": unexplained_student / change_student if change_student else 0.0,
            "remainder_teacher": unexplained_teacher / change_teacher if change_teacher else 0.0,
            "definition": definition,
        }
    return {
        **{name: scalars["probability"][name] for name in ("gd", "gc")},
        "definition": GRADIENT_DEFINITION,
        "scalars": scalars,
        "alignment_definition": f"g = gradient of f {_MEASURES}",
        "remainder_definition": REMAINDER_DEFINITION,
        "examples": len(x),
        "epsilon": epsilon,
        "seed": seed,
    }


def _distance_and_cosine(of_student: Tensor, of_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """||g_student - g_teacher||_2 and cos(g_student, g_teacher) per image, 0 where a gradient is zero."""
    of_student, of_teacher = of_student.flatten(1), of_teacher.flatten(1)
    norms = of_student.norm(dim=1) * of_teacher.norm(dim=1)
    cosine = torch.where(norms > 0, (of_student * of_teacher).sum(dim=1) / norms, 0)
    return (of_student - of_teacher).norm(dim=1), cosine
