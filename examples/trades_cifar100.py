"""TRADES: adversarial training of a network S that weighs clean against robust accuracy (Zhang et al., ICML 2019).

attack  x_adv = argmax KL(S(x) ‖ S(x+δ)), ‖δ‖∞ ≤ ε, from x + 0.001 N(0, 1)
loss    CE(S(x), y) + w KL(S(x) ‖ S(x_adv)), w = --trades_weight; the gradient flows through S(x) and S(x_adv)
"""

import torch
import torch.nn.functional as F

import attacks
import rslad_loss
from cifar100_models import build_model
from experiment import cli, data, evaluation, optim
from experiment.run import Run

RECIPE = {
    "method": "TRADES",
    "networks": {"student": "RES-18"},
    # Those of the six distillation scripts; lr is divided by 10 after 1/2 and 3/4 of the epochs.
    "optimisation": {"epochs": 200, "batch": 128, "lr": 0.1, "momentum": 0.9, "wd": 5e-4, "lr_milestones": None},
    # TRADES paper, section 5.2, with Madry et al.'s step size; trades_weight is its 1/λ.
    "inner": {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10},
    "outer": {"trades_weight": 6.0},
}


def training_loss(student, teacher, x, y, epoch, args):
    """Loss terms of one batch, which are summed; x (N, 3, H, W) in [0, 1], y (N,), epoch from 1."""
    with torch.no_grad(), attacks.frozen(student):
        target = student(x)  # in eval mode: the attack's target, constant
    x_adv = attacks.rslad(student, target, x, args.epsilon, args.step_size, args.steps)
    student_clean = student(x)
    student_adv = student(x_adv)
    robust = rslad_loss.kl_divergence(student_adv, student_clean)  # gradient through both, as in TRADES' release
    terms = {"clean": F.cross_entropy(rslad_loss.at_least_float32(student_clean), y)}
    terms["robust"] = args.trades_weight * robust
    return terms


def main():
    """Train, evaluate and attack one student; the same command resumes."""
    args = cli.parse_args(__file__, RECIPE)
    run = Run(args, __file__, RECIPE)
    images = data.load_data(args.dataset, args.data_dir, run.device, **data.selection(args))
    student = build_model(args.student, images.num_classes).to(run.device)
    teacher = None  # TRADES has none
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
