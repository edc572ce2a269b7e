"""A slow, obvious float64 reference of the six training steps, written from the equations.

It shares no code with the product: its own softmax, KL, attacks, SGD; passes written out in the documented order.
"""

import contextlib
import copy
import importlib

import torch

from experiment import optim
from experiment.cli import parse_args

SCRIPTS = ("adaad", "adaad_IGDM", "ard", "ard_IGDM", "rslad", "rslad_IGDM")
CLASSES, EPOCH = 10, 7
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def log_softmax(z):
    z = z - z.max(dim=1, keepdim=True).values
    return z - z.exp().sum(dim=1, keepdim=True).log()


def kl(teacher, student):
    """KL(T || S), mean over the batch."""
    p = log_softmax(teacher).exp()
    return (p * (log_softmax(teacher) - log_softmax(student))).sum() / len(teacher)


def cross_entropy(logits, y):
    return -log_softmax(logits)[torch.arange(len(y), device=y.device), y].mean()


def maximise(objective, x, x_adv, epsilon, step_size, steps):
    for _ in range(steps):
        x_adv = x_adv.clone().detach().requires_grad_(True)
        objective(x_adv).backward()
        x_adv = x_adv.detach() + step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
    return x_adv.detach()


def reference_attack(name, student, teacher, x, y, args):
    """The inner maximisation on eval-mode copies, so that nothing of the student moves."""
    student, teacher = copy.deepcopy(student).eval(), copy.deepcopy(teacher).eval()
    e = args.epsilon
    if name in ("pgd", "igdm"):
        start = (x + torch.empty_like(x).uniform_(-e, e)).clamp(0, 1)
    else:
        start = x + 0.001 * torch.randn(x.shape, device=x.device)
    target = teacher(x).detach()
    objectives = {
        "pgd": lambda z: cross_entropy(student(z), y),
        "rslad": lambda z: kl(target, student(z)),
        "adaad": lambda z: kl(teacher(z), student(z)),
        "igdm": lambda z: kl(teacher(z) - teacher(2 * x - z), student(z) - student(2 * x - z)),
    }
    return maximise(objectives[name], x, start, e, args.step_size, args.steps)


def reference_loss(method, student, teacher, x, y, args):
    """The loss with the passes in the documented order: plus, clean, minus, adversarial; RSLAD adversarial first."""
    igdm = method.endswith("_IGDM")
    base = method.removesuffix("_IGDM")
    x_adv = reference_attack(args.attack, student, teacher, x, y, args)
    delta = x_adv - x
    inputs = {"adversarial": x_adv, "clean": x}
    order = ["clean", "adversarial"] if base != "rslad" else ["adversarial", "clean"]
    if igdm:
        inputs |= {"plus": x + args.beta * delta, "minus": x - args.gamma * delta}
        order = ["plus", "clean", "minus", "adversarial"]
        if base == "rslad":
            order = ["adversarial", "plus", "clean", "minus"]
    student.train()
    s = {name: student(inputs[name]) for name in order}
    with torch.no_grad():
        t = {name: teacher(value) for name, value in inputs.items()}
    target = t[getattr(args, "target", "adversarial")]
    if base == "adaad":
        loss = kl(t["adversarial"], s["adversarial"])
    elif base == "ard":
        loss = kl(target, s["adversarial"]) + args.ce_weight * cross_entropy(s["adversarial"], y)
    else:
        w = args.clean_weight
        loss = args.loss_scale * ((1 - w) * kl(target, s["adversarial"]) + w * kl(t["clean"], s["clean"]))
    if igdm:
        ramp = args.alpha * EPOCH / args.ramp_epochs
        loss = loss + ramp * kl(t["plus"] - t["minus"], s["plus"] - s["minus"])
    return loss


def reference_run(method, student, teacher, batches, args):
    velocity = [torch.zeros_like(p) for p in student.parameters()]
    for x, y in batches:
        loss = reference_loss(method, student, teacher, x, y, args)
        grads = torch.autograd.grad(loss, list(student.parameters()))
        with torch.no_grad():
            for p, g, v in zip(student.parameters(), grads, velocity, strict=True):
                v.mul_(args.momentum).add_(g + args.wd * p)
                p.sub_(args.lr * v)
    return loss.item()


def product_run(method, student, teacher, batches, args, wrap=lambda model: model, around=contextlib.nullcontext):
    """The script's own steps, as its main() makes them; `wrap` and `around` are the engine's, if wanted."""
    script = importlib.import_module(f"{method}_cifar100")
    optimizer = optim.sgd(student, args)
    optim.set_lr(optimizer, args, EPOCH)
    fast_student, fast_teacher = wrap(student), wrap(teacher)
    student.train()
    for x, y in batches:
        with around():
            terms = script.training_loss(fast_student, fast_teacher, x, y, EPOCH, args)
        optimizer.zero_grad()
        loss = sum(terms.values())
        loss.backward()
        optimizer.step()
    return loss.item()


def settings(method, *flags):
    script = importlib.import_module(f"{method}_cifar100")
    return parse_args(script.__file__, script.RECIPE, ["--steps", "3", "--device", "cpu", *flags])


def assert_same_network(ours, reference):
    for (name, a), (_, b) in zip(ours.state_dict().items(), reference.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)
