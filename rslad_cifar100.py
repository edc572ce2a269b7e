"""RSLAD: robust soft label adversarial distillation of a teacher T into a student S (Zi et al., ICCV 2021).

attack  x_adv = argmax KL(T(x) ‖ S(x+δ)), ‖δ‖∞ ≤ ε, from x + 0.001 N(0, 1)
loss    KL(T(x_adv) ‖ S(x_adv)); --preset paper: 0.1 (5/6 KL(T(x) ‖ S(x_adv)) + 1/6 KL(T(x) ‖ S(x)))
"""

import torch

import attacks
import rslad_loss
from cifar100_models import build_model
from experiment import cli, data, evaluation, optim, teachers
from experiment.run import Run

RECIPE = {
    "method": "RSLAD",
    "networks": {"teacher": "BDM", "student": "RES-18"},
    # IGDM paper, section 5.1 (RSLAD 300 epochs: its preset); lr is divided by 10 after 1/2 and 3/4 of the epochs.
    "optimisation": {"epochs": 200, "batch": 128, "lr": 0.1, "momentum": 0.9, "wd": 5e-4, "lr_milestones": None},
    "inner": {"attack": "rslad", "epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10},  # RSLAD paper, section 4.1
    "outer": {"target": "adversarial", "clean_weight": 0.0, "loss_scale": 1.0},  # as documented
    "preset paper": {
        # RSLAD paper, eq. 8 and section 4.1; the release's loss is 0.1 of the batch mean.
        "epochs": 300,
        "lr_milestones": [215, 260, 285],
        "target": "clean",
        "clean_weight": 1 / 6,
        "loss_scale": 0.1,
    },
}


def training_loss(student, teacher, x, y, epoch, args):
    """Loss terms of one batch, which are summed; x (N, 3, H, W) in [0, 1], y (N,), epoch from 1."""
    budget = (args.epsilon, args.step_size, args.steps)
    with torch.no_grad(), attacks.frozen(teacher):  # the attack enables the gradients that it needs
        teacher_clean = teacher(x)  # used by the attack and the loss
        x_adv = attacks.perturb(args.attack, student, teacher, x, y, *budget, teacher_clean)
        teacher_logits = teacher(x_adv) if args.target == "adversarial" else teacher_clean
    student_adv = student(x_adv)  # first, as in RSLAD's released code (Fidelity note 2)
    with torch.set_grad_enabled(args.clean_weight > 0):
        student_clean = student(x)  # needed for the BatchNorm statistics even without a loss term
    weights = {"clean_weight": args.clean_weight, "loss_scale": args.loss_scale, "teacher_clean": teacher_clean}
    terms = {"rslad": rslad_loss.rslad(student_adv, teacher_logits, student_clean, **weights)}
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
