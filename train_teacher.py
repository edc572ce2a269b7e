"""Train a robust teacher of your own: TRADES (Zhang et al., ICML 2019) or PGD-AT (Madry et al., ICLR 2018).

TRADES  attack argmax KL(S(x) ‖ S(x+δ)) from x + 0.001 N(0, 1)    loss CE(S(x), y) + w KL(S(x) ‖ S(x_adv))
PGD-AT  attack argmax CE(S(x+δ), y) from a uniform start           loss CE(S(x_adv), y)

The run folder, and the student.pt in it, are what --teacher takes in the method scripts.
"""

import torch
import torch.nn.functional as F

import attacks
import rslad_loss
from cifar100_models import build_model
from experiment import cli, data, evaluation, optim
from experiment.run import Run

RECIPE = {
    "method": "adversarial training",
    "networks": {"student": "WRN-28-10"},
    # Rice et al., Overfitting in adversarially robust deep learning, ICML 2020: few epochs, weight decay 5e-4.
    "optimisation": {"epochs": 100, "batch": 128, "lr": 0.1, "momentum": 0.9, "wd": 5e-4, "lr_milestones": None},
    # TRADES paper, section 5.2, with Madry et al.'s budget; 1/lambda = 6.
    "inner": {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10},
    "outer": {"objective": "TRADES", "trades_weight": 6.0},
}


def training_loss(model, x, y, args):
    """Terms of the loss of one batch, to be summed; x (N, 3, H, W) in [0, 1], y (N,)."""
    if args.objective == "PGD-AT":
        x_adv = attacks.pgd(model, x, y, args.epsilon, args.step_size, args.steps)
        return {"robust": F.cross_entropy(rslad_loss.at_least_float32(model(x_adv)), y)}
    with torch.no_grad(), attacks.frozen(model):
        target = model(x)
    x_adv = attacks.rslad(model, target, x, args.epsilon, args.step_size, args.steps)
    clean = model(x)
    robust = rslad_loss.kl_divergence(model(x_adv), clean)  # gradient through both, as in TRADES' release
    return {"clean": F.cross_entropy(rslad_loss.at_least_float32(clean), y), "robust": args.trades_weight * robust}


def main():
    """Train, evaluate and attack one teacher; the same command again resumes."""
    args = cli.parse_args(__file__, RECIPE)
    run = Run(args, __file__, RECIPE)
    images = data.load_data(args.dataset, args.data_dir, run.device, **data.selection(args))
    model = build_model(args.student, images.num_classes).to(run.device)
    optimizer = optim.sgd(model, args)
    run.start(images, model, optimizer)
    fast_model = run.engine.accelerate(model)

    for epoch in run.epochs():
        optim.set_lr(optimizer, args, epoch)
        model.train()
        for x, y in run.batches(epoch):
            with run.engine.step():
                terms = training_loss(fast_model, x, y, args)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            run.count(terms)
        evaluated = epoch > args.eval_after or epoch == args.epochs
        run.end_epoch(evaluation.monitor(fast_model, images, args.epsilon) if evaluated else {})
    run.finish(evaluation.autoattack)


if __name__ == "__main__":
    cli.guard(main)
