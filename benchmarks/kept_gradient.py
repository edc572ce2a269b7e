"""How far the teacher's gradient turns during AdaAD's attack: why --teacher_every may exceed 1.

python -m benchmarks.kept_gradient RUN ...

Each RUN is a finished run of one of AdaAD's scripts. On its test images, along the attack that evaluates the teacher
once (--teacher_every as large as --steps), the teacher's share of the gradient at x_k, J_T(x_k)^T dKL/dT, is compared
with the one kept from x_0: their cosine, and the share of pixels with the same sign in the gradient of the whole
objective, which is what a step of the attack uses. A row per run, means over images.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attacks
from benchmarks import report
from experiment import cli, data, teachers
from experiment.files import read_json
from rslad_loss import kl_divergence


def measured(
    student: nn.Module, teacher: nn.Module, x: Tensor, epsilon: float, step_size: float, steps: int
) -> tuple[list[float], list[float]]:
    """Cosine and share of equal signs, (steps,) each, at the points of the attack; eval mode is the caller's."""
    kept: list[Tensor] = []
    cosines, equal_signs = [], []

    def objective(x_adv: Tensor) -> Tensor:
        x_teacher = x_adv.detach().requires_grad_()
        student_logits, teacher_logits = student(x_adv), teacher(x_teacher)
        divergence = kl_divergence(student_logits.detach(), teacher_logits, reduction="sum")
        (fresh,) = torch.autograd.grad(divergence, [x_teacher])
        teacher_logits = teacher_logits.detach()
        if not kept:
            kept.extend((fresh, teacher_logits))
        shares = [
            torch.autograd.grad(kl_divergence(student_logits, logits, reduction="sum"), [x_adv], retain_graph=True)[0]
            for logits in (kept[1], teacher_logits)
        ]
        cosines.append(F.cosine_similarity(kept[0].flatten(1), fresh.flatten(1)).mean().item())
        equal = (shares[0] + kept[0]).sign() == (shares[1] + fresh).sign()
        equal_signs.append(equal.float().mean().item())
        return kl_divergence(student_logits, kept[1], reduction="sum") + (kept[0] * x_adv).sum()

    with attacks.frozen(student, teacher):
        attacks.ascend(objective, x, attacks.gaussian_start(x), epsilon, step_size, steps)
    return cosines, equal_signs


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = cli.Parser("python -m benchmarks.kept_gradient", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a finished run of one of AdaAD's scripts")
    parser.add_argument("--examples", type=cli.positive_int, default=1000, help="the first N test images")
    args, rows = parser.parse_args(argv), []
    for run in args.runs:
        settings = read_json(Path(run, "config.json"))["settings"]
        images = data.load_data(settings["dataset"], settings["data_dir"], side=settings["side"])
        student = teachers.load_network(run).model
        teacher = teachers.load_teacher(settings["teacher"], dataset=settings["dataset"])
        torch.manual_seed(0)
        x = data.as_float(images.x_test[: args.examples])
        budget = settings["epsilon"], settings["step_size"], settings["steps"]
        for name, values in zip(("cosine", "equal signs"), measured(student, teacher, x, *budget), strict=True):
            rows.append([f"{run}, {name}", *(f"{value:.3f}" for value in values)])
    print(report.table(["run, measure", *(f"k = {k}" for k in range(len(rows[0]) - 1))], rows))


if __name__ == "__main__":
    cli.guard(main)
