"""The optimizer and the learning rate schedule, the same for every method."""

import argparse

import torch
from torch import nn

from experiment import UserError


def sgd(model: nn.Module, args: argparse.Namespace) -> torch.optim.SGD:
    """SGD with momentum and weight decay on every parameter, BatchNorm's and biases included, as published."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the network has no parameter that requires a gradient: there is nothing to train")
    fused = next(model.parameters()).is_cuda  # one kernel for all parameters
    return torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.wd, fused=fused or None
    )


def set_lr(optimizer: torch.optim.Optimizer, args: argparse.Namespace, epoch: int) -> None:
    """Set the learning rate of an epoch (from 1): ``lr``, divided by 10 after each epoch in ``lr_milestones``."""
    passed = sum(epoch > milestone for milestone in args.lr_milestones)
    for group in optimizer.param_groups:
        group["lr"] = args.lr * 0.1**passed
