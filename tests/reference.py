"""A slow, obvious float64 reference of attacks and training steps of the scripts and the examples, from the equations.

It shares no code with the product: its own softmax, KL, attacks, SGD; passes written out in the documented order.
"""

import contextlib
import copy
import importlib
from types import SimpleNamespace

import torch

from experiment import optim
from experiment.cli import parse_args
from experiment.engine import Engine

SCRIPTS = ("adaad", "adaad_IGDM", "ard", "ard_IGDM", "rslad", "rslad_IGDM")
EXAMPLES = ("pgd_at", "pgd_at_IGDM", "trades", "trades_IGDM", "saad")
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


def margin(logits, y):
    own = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
    return (logits.masked_fill(own, -torch.inf).max(dim=1).values - logits[own]).mean()


def maximise(objective, x, x_adv, epsilon, step_size, steps):
    def project(z):
        return torch.min(torch.max(z, x - epsilon), x + epsilon).clamp(0, 1)

    for _ in range(steps):
        x_adv = x_adv.clone().detach().requires_grad_(True)
        objective(x_adv).backward()
        x_adv = project(x_adv.detach() + step_size * x_adv.grad.sign())
    return x_adv.detach() if steps else project(x_adv)


def reference_attack(name, student, teacher, x, y, args):
    """The inner maximisation on eval-mode copies, so that nothing of the student moves."""
    student, teacher = copy.deepcopy(student).eval(), copy.deepcopy(teacher).eval()
    e = args.epsilon
    if name in ("fgsm", "pgd_from_x"):
        start = x
    elif name in ("fgsm_random", "pgd", "pgd_at", "cw", "igdm"):
        start = (x + torch.empty_like(x).uniform_(-e, e)).clamp(0, 1)
    else:
        start = x + 0.001 * torch.randn(x.shape, device=x.device)
    target = teacher(x).detach()
    own_target = student(x).detach()
    objectives = {
        "cw": lambda z: margin(student(z), y),
        "trades": lambda z: kl(own_target, student(z)),
        "saad": lambda z: kl(linearised(teacher, x, y, z), student(z)),
        "rslad": lambda z: kl(target, student(z)),
        "adaad": lambda z: kl(teacher(z), student(z)),
        "igdm": lambda z: kl(teacher(z) - teacher(2 * x - z), student(z) - student(2 * x - z)),
    }
    objective = objectives.get(name, lambda z: cross_entropy(student(z), y))
    return maximise(objective, x, start, e, args.step_size, args.steps)


def linearised(teacher, x, y, z):
    """T(x) with T_y(x) + <grad T_y(x), z - x> for the true class y, image by image."""
    rows = []
    for i in range(len(x)):
        centre = x[i : i + 1].clone().requires_grad_(True)
        logits = teacher(centre)
        (slope,) = torch.autograd.grad(logits[0, y[i]], [centre])
        others = torch.arange(CLASSES, device=x.device) != y[i]
        moved = logits[0].detach() + (slope * (z[i : i + 1] - x[i : i + 1])).sum()
        rows.append(torch.where(others, logits[0].detach(), moved))
    return torch.stack(rows)


def entropies(logits):
    p = log_softmax(logits).exp()
    return -(p * p.log()).sum(dim=1)


def saad_loss(t, s, args):
    """Image by image: w (KL_adv + alpha epoch/epochs IGDM) + b (1 - w / max w) KL_clean; the mean over the batch."""
    h = entropies(t["adversarial"])
    w = [args.entropy_factor * (each - min(h)) for each in h]
    losses = []
    for i in range(len(h)):
        at = slice(i, i + 1)
        change = kl((t["adversarial"] - t["minus"])[at], (s["adversarial"] - s["minus"])[at])
        robust = kl(t["adversarial"][at], s["adversarial"][at]) + args.alpha * EPOCH / args.epochs * change
        clean = args.clean_factor * (1 - w[i] / max(w)) * kl(t["clean"][at], s["clean"][at])
        losses.append(w[i] * robust + clean)
    return sum(losses) / len(losses)


def reference_loss(method, student, teacher, x, y, args):
    """The loss with the passes in the documented order: plus, clean, minus, adversarial; RSLAD adversarial first.

    PGD-AT has no clean pass; SAAD has x_adv for plus, and the clean pass last.
    """
    igdm = method.endswith("_IGDM")
    base = method.removesuffix("_IGDM")
    x_adv = reference_attack(getattr(args, "attack", base), student, teacher, x, y, args)
    delta = x_adv - x
    inputs = {"adversarial": x_adv, "clean": x}
    order = ["clean", "adversarial"] if base != "rslad" else ["adversarial", "clean"]
    if igdm:
        inputs |= {"plus": x + args.beta * delta, "minus": x - args.gamma * delta}
        order = ["plus", "clean", "minus", "adversarial"]
        if base == "rslad":
            order = ["adversarial", "plus", "clean", "minus"]
    if base == "pgd_at":
        order.remove("clean")
    if base == "saad":
        inputs["minus"] = x - delta
        order = ["adversarial", "minus", "clean"]
    student.train()
    s = {name: student(inputs[name]) for name in order}
    with torch.no_grad():
        t = {name: teacher(value) for name, value in inputs.items()}
    target = t[getattr(args, "target", "adversarial")]
    if base == "adaad":
        loss = kl(t["adversarial"], s["adversarial"])
    elif base == "pgd_at":
        loss = cross_entropy(s["adversarial"], y)
    elif base == "trades":
        loss = cross_entropy(s["clean"], y) + args.trades_weight * kl(s["clean"], s["adversarial"])
    elif base == "saad":
        loss = saad_loss(t, s, args)
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


def script_of(method):
    return importlib.import_module(f"{'examples.' * (method in EXAMPLES)}{method}_cifar100")


def product_run(method, student, teacher, batches, args, wrap=lambda model: model, around=contextlib.nullcontext):
    """The script's own steps, as its main() makes them; `wrap` and `around` are the engine's, if wanted."""
    script = script_of(method)
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


def engine(**changes):
    default = {"device": "cpu", "precision": "fp32", "compile": 0, "batch": 6, "deterministic": 0, "seed": 0}
    return Engine(SimpleNamespace(**{**default, **changes}))


def settings(method, *flags):
    script = script_of(method)
    return parse_args(script.__file__, script.RECIPE, ["--steps", "3", "--device", "cpu", *flags])


def assert_same_network(ours, reference):
    for (name, a), (_, b) in zip(ours.state_dict().items(), reference.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)
