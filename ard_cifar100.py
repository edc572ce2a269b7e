"""ARD: adversarially robust distillation of a robust teacher T into a student S (Goldblum et al., AAAI 2020).

attack  x_adv = argmax CE(S(x+δ), y), ‖δ‖∞ ≤ ε, from a uniform start in the ball
loss    KL(T(x_adv) ‖ S(x_adv)) + λ CE(S(x_adv), y), λ = --ce_weight; --preset paper: KL(T(x) ‖ S(x_adv)), λ = 0
"""

import torch

import attacks
import rslad_loss
from cifar100_models import build_model
from experiment import cli, data, evaluation, optim, teachers
from experiment.run import Run

RECIPE = {
    "method": "ARD",
    "networks": {"teacher": "BDM", "student": "RES-18"},
    # IGDM paper, section 5.1 (RSLAD 300 epochs: its preset); lr is divided by 10 after 1/2 and 3/4 of the epochs.
    "optimisation": {"epochs": 200, "batch": 128, "lr": 0.1, "momentum": 0.9, "wd": 5e-4, "lr_milestones": None},
    # ARD paper, section 5, with the step 2/255 that the later papers use.
    "inner": {"attack": "pgd", "epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10},
    "outer": {"target": "adversarial", "ce_weight": 0.0},  # λ = 0 as published
    "preset paper": {
        # ARD paper, eq. 4, and IGDM paper: the target is T(x), at temperature 1.
        "target": "clean",
        "ce_weight": 0.0,
    },
}


def training_loss(student, teacher, x, y, epoch, args):
    """Loss terms of one batch, which are summed; x (N, 3, H, W) in [0, 1], y (N,), epoch from 1."""
    x_adv = attacks.perturb(args.attack, student, teacher, x, y, args.epsilon, args.step_size, args.steps)
    with torch.no_grad(), attacks.frozen(teacher):
        teacher_logits = teacher(x_adv if args.target == "adversarial" else x)
    with torch.no_grad():
        student(x)  # no loss term; updates the BatchNorm statistics (Fidelity note 2)
    student_adv = student(x_adv)
    terms = {"ard": rslad_loss.ard(student_adv, teacher_logits, y, args.ce_weight)}
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
