"""Gradient alignment: do the student's input gradients follow the teacher's?"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.evaluation.batches import sum_over_batches

GRADIENT_DEFINITION = (
    "g = gradient of softmax(logits)[true class] with respect to the input (0 to 1 scale); means over images of "
    "GD = ||g_student - g_teacher||_2 and GC = cos(g_student, g_teacher), which counts as 0 for a zero gradient"
)
"""To be printed beside GD and GC: the paper does not say of which scalar it takes the gradient."""


def gradient_alignment(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, batch: int = 128
) -> dict[str, float]:
    """GD and GC between the input gradients of student and teacher, as `GRADIENT_DEFINITION` says.

    Returns:
        ``gd``: mean L2 distance (lower: the student follows the teacher); ``gc``: mean cosine (higher).

    Source: Lee, Cho, Kim, ICLR 2025, section 5 (GD, GC).
    """

    def gradient(model: nn.Module, clean: Tensor, labels: Tensor) -> Tensor:
        clean = clean.clone().requires_grad_()
        with torch.enable_grad():
            true = F.softmax(model(clean), dim=1).gather(1, labels[:, None]).sum()
        # float64: a confident network's gradients are so small that their squares underflow in float32.
        return torch.autograd.grad(true, [clean])[0].double().flatten(1)

    def sums(clean: Tensor, labels: Tensor) -> Tensor:
        of_student, of_teacher = gradient(student, clean, labels), gradient(teacher, clean, labels)
        norms = of_student.norm(dim=1) * of_teacher.norm(dim=1)
        cosine = torch.where(norms > 0, (of_student * of_teacher).sum(dim=1) / norms, 0)
        return torch.stack([(of_student - of_teacher).norm(dim=1).sum(), cosine.sum()])

    gd, gc = (sum_over_batches(sums, x, y, batch, 0, student, teacher) / len(x)).tolist()
    return {"gd": gd, "gc": gc}
