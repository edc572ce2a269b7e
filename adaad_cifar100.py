"""AdaAD: adaptive adversarial distillation of a robust teacher T into a student S (Huang et al., CVPR 2023).

attack  x_adv = argmax KL(T(x+δ) ‖ S(x+δ)), ‖δ‖∞ ≤ ε, through student and teacher, from x + 0.001 N(0, 1)
loss    KL(T(x_adv) ‖ S(x_adv))
"""

import torch

import attacks
import rslad_loss
from cifar100_models import build_model
from experiment import cli, data, evaluation, optim, teachers
from experiment.run import Run

RECIPE = {
    "method": "AdaAD",
    "networks": {"teacher": "BDM", "student": "RES-18"},
    # IGDM paper, section 5.1 (RSLAD 300 epochs: its preset); lr is divided by 10 after 1/2 and 3/4 of the epochs.
    "optimisation": {"epochs": 200, "batch": 128, "lr": 0.1, "momentum": 0.9, "wd": 5e-4, "lr_milestones": None},
    # AdaAD paper, section 4.1; the paper's attack evaluates the teacher at every step.
    "inner": {"attack": "adaad", "epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10, "teacher_every": 1},
    "preset paper": {
        # AdaAD as the IGDM paper ran it is the default recipe.
        "epochs": 200,
    },
}


def training_loss(student, teacher, x, y, epoch, args):
    """Loss terms of one batch, which are summed; x (N, 3, H, W) in [0, 1], y (N,), epoch from 1."""
    budget = args.epsilon, args.step_size, args.steps
    x_adv = attacks.perturb(args.attack, student, teacher, x, y, *budget, teacher_every=args.teacher_every)
    with torch.no_grad(), attacks.frozen(teacher):
        teacher_adv = teacher(x_adv)
    with torch.no_grad():
        student(x)  # no loss term; updates the BatchNorm statistics (Fidelity note 2)
    student_adv = student(x_adv)
    terms = {"adaad": rslad_loss.adaad(student_adv, teacher_adv)}
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
