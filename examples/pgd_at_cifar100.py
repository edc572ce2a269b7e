"""PGD-AT: adversarial training of a network S on its own adversarial images (Madry et al., ICLR 2018).

attack  x_adv = argmax CE(S(x+δ), y), ‖δ‖∞ ≤ ε, from a uniform start in the ball
loss    CE(S(x_adv), y)
"""

import torch.nn.functional as F

import attacks
import rslad_loss
from cifar100_models import build_model
from experiment import cli, data, evaluation, optim
from experiment.run import Run

RECIPE = {
    "method": "PGD-AT",
    "networks": {"student": "RES-18"},
    # Those of the six distillation scripts; lr is divided by 10 after 1/2 and 3/4 of the epochs.
    "optimisation": {"epochs": 200, "batch": 128, "lr": 0.1, "momentum": 0.9, "wd": 5e-4, "lr_milestones": None},
    # Madry et al., section 5, with 10 steps as in the distillation papers.
    "inner": {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10},
}


def training_loss(student, teacher, x, y, epoch, args):
    """Loss terms of one batch, which are summed; x (N, 3, H, W) in [0, 1], y (N,), epoch from 1."""
    x_adv = attacks.pgd(student, x, y, args.epsilon, args.step_size, args.steps)
    student_adv = student(x_adv)
    terms = {"robust": F.cross_entropy(rslad_loss.at_least_float32(student_adv), y)}
    return terms


def main():
    """Train, evaluate and attack one student; the same command resumes."""
    args = cli.parse_args(__file__, RECIPE)
    run = Run(args, __file__, RECIPE)
    images = data.load_data(args.dataset, args.data_dir, run.device, **data.selection(args))
    student = build_model(args.student, images.num_classes).to(run.device)
    teacher = None  # PGD-AT has none
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
