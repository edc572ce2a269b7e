"""Train a robust teacher of your own: TRADES (Zhang et al., ICML 2019) or PGD-AT (Madry et al., ICLR 2018).

The attack and the loss are those of examples/trades_cifar100.py and examples/pgd_at_cifar100.py (--objective).
In the method scripts, --teacher takes the run folder or its student.pt.
"""

from cifar100_models import build_model
from examples import pgd_at_cifar100, trades_cifar100
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
LOSSES = {"TRADES": trades_cifar100.training_loss, "PGD-AT": pgd_at_cifar100.training_loss}


def main():
    """Train, evaluate and attack one teacher; the same command resumes."""
    args = cli.parse_args(__file__, RECIPE)
    run = Run(args, __file__, RECIPE)
    images = data.load_data(args.dataset, args.data_dir, run.device, **data.selection(args))
    model = build_model(args.student, images.num_classes).to(run.device)
    optimizer = optim.sgd(model, args)
    run.start(images, model, optimizer)
    fast_model, training_loss = run.engine.accelerate(model), LOSSES[args.objective]

    for epoch in run.epochs():
        optim.set_lr(optimizer, args, epoch)
        model.train()
        for x, y in run.batches(epoch):
            with run.engine.step():
                terms = training_loss(fast_model, None, x, y, epoch, args)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            run.count(terms)
        evaluated = epoch > args.eval_after or epoch == args.epochs
        run.end_epoch(evaluation.monitor(fast_model, images, args.epsilon) if evaluated else {})
    run.finish(evaluation.autoattack)


if __name__ == "__main__":
    cli.guard(main)
