"""SAAD: AdaAD+IGDM with a weight per image from the teacher's entropy (Lee, Chung, TMLR 2026).

attack  x_adv = argmax KL(T̃(x+δ) ‖ S(x+δ)), ‖δ‖∞ ≤ ε, from x + 0.001 N(0, 1); T̃ is T(x) with the true class's logit
        linearised, T_y(x) + ⟨∇T_y(x), δ⟩: one backward pass of the teacher per batch instead of one per step
weight  w = a (H(T(x_adv)) − its minimum in the batch), w̄ = w / its maximum; H: entropy, a: --entropy_factor
loss    mean of w (KL(T(x_adv) ‖ S(x_adv)) + α epoch/epochs L_IGDM) + b (1 − w̄) KL(T(x) ‖ S(x)); b: --clean_factor
"""

import torch

import attacks
import rslad_loss
from cifar100_models import build_model
from experiment import cli, data, evaluation, optim, teachers
from experiment.run import Run

RECIPE = {
    "method": "SAAD",
    "networks": {"teacher": "BDM", "student": "RES-18"},
    # The release: weight decay 2e-4, lr divided by 10 after 1/2 and 3/4 of the epochs. It evaluates the mean of the
    # weights from epoch 95 of 200 on: --swa_after 94.
    "optimisation": {"epochs": 200, "batch": 128, "lr": 0.1, "momentum": 0.9, "wd": 2e-4, "lr_milestones": None},
    "inner": {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10},
    # The release: α = 10 for CIFAR-100 and 1 for CIFAR-10, a = 5; its one published command, for CIFAR-10, has b = 0.
    "outer": {"alpha": 10.0, "entropy_factor": 5.0, "clean_factor": 0.0},
}


def linearised_attack(student, teacher, x, y, epsilon, step_size, steps):
    """Return x_adv and T(x); x (N, 3, H, W) in [0, 1], y (N,)."""

    def objective(x_adv, x, teacher_clean, slope, true_class):
        change = (slope * (x_adv - x)).flatten(1).sum(1, keepdim=True)
        return rslad_loss.kl_divergence(student(x_adv), teacher_clean + true_class * change, reduction="sum")

    with attacks.frozen(student, teacher), torch.enable_grad():
        centre = x.detach().requires_grad_()
        logits = rslad_loss.at_least_float32(teacher(centre))
        true_class = torch.zeros_like(logits).scatter_(1, y[:, None], 1)
        (slope,) = torch.autograd.grad((logits * true_class).sum(), [centre])
        given = (x, logits.detach(), slope, true_class)
        x_adv = attacks.ascend(objective, x, attacks.gaussian_start(x), epsilon, step_size, steps, given)
    return x_adv, logits.detach()


def kl(student_logits, teacher_logits):
    """KL(T ‖ S) of each image: (N, C), (N, C) -> (N,)."""
    return rslad_loss.kl_divergence(student_logits, teacher_logits, reduction="none").sum(1)


def training_loss(student, teacher, x, y, epoch, args):
    """Loss terms of one batch, which are summed; x (N, 3, H, W) in [0, 1], y (N,), epoch from 1."""
    x_adv, teacher_clean = linearised_attack(student, teacher, x, y, args.epsilon, args.step_size, args.steps)
    x_minus = 2 * x - x_adv
    with torch.no_grad(), attacks.frozen(teacher):
        teacher_adv, teacher_minus = (rslad_loss.at_least_float32(teacher(z)) for z in (x_adv, x_minus))
    # In the release's order (Fidelity note 2)
    student_adv, student_minus, student_clean = (rslad_loss.at_least_float32(student(z)) for z in (x_adv, x_minus, x))
    entropy = torch.special.entr(teacher_adv.softmax(1)).sum(1)
    weight = args.entropy_factor * (entropy - entropy.min())
    share = weight / weight.max().clamp(min=1e-8)
    igdm = args.alpha * epoch / args.epochs * kl(student_adv - student_minus, teacher_adv - teacher_minus)
    terms = {"saad": (weight * kl(student_adv, teacher_adv)).mean(), "igdm": (weight * igdm).mean()}
    terms["clean"] = args.clean_factor * ((1 - share) * kl(student_clean, teacher_clean)).mean()
    return terms


def main():
    """Train, evaluate and attack one student; the same command resumes."""
    args = cli.parse_args(__file__, RECIPE)
    run = Run(args, __file__, RECIPE)
    images = data.load_data(args.dataset, args.data_dir, run.device, **data.selection(args))
    teacher = teachers.load_teacher(args.teacher, images.num_classes, args.teacher_path, images.name, device=run.device)
    student = build_model(args.student, images.num_classes).to(run.device)
    optimizer = optim.sgd(student, args)
    run.start(images, student, optimizer, teacher)
    fast_student, fast_teacher = run.engine.accelerate(student), run.engine.accelerate(teacher)

    for epoch in run.epochs():
        optim.set_lr(optimizer, args, epoch)
        student.train()
        for x, y in run.batches(epoch):
            with run.engine.step():
                terms = training_loss(fast_student, fast_teacher, x, y, epoch, args)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            run.count(terms)
        evaluated = epoch > args.eval_after or epoch == args.epochs
        run.end_epoch(evaluation.monitor(fast_student, images, args.epsilon) if evaluated else {})
    run.finish(evaluation.autoattack)


if __name__ == "__main__":
    cli.guard(main)
