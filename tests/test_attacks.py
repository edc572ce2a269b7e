"""Attacks against a slow reference written from the equations, and the properties that every attack has.

No tolerance where none is stated: after its start an attack only adds and clamps the same float64 numbers in the same
order, and takes only the sign of a gradient from the network. Networks are smooth, so that no gradient is so near to 0
that rounding decides its sign.
"""

import copy
import functools
import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_attack
from torch import nn

import attacks

CLASSES = 5
EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 4


class SmoothNet(nn.Module):
    """Smooth in its input; BatchNorm and dropout show a wrong mode."""

    def __init__(self, channels=3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Tanh(),
            nn.Dropout(0.5),
            nn.Conv2d(6, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.Tanh(),
        )
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.linear(self.features(x).mean(dim=(2, 3)))


@functools.cache
def _network(seed, dtype, channels):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmoothNet(channels)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.1, 0.5)
        with torch.no_grad():
            net.linear.weight.mul_(6)
    return net.to(dtype)


def network(seed, dtype=torch.float64, channels=3):
    """A SmoothNet in train mode with the statistics of a trained one."""
    return copy.deepcopy(_network(seed, dtype, channels))


def images(n=4, seed=3, dtype=torch.float64, channels=3, side=7):
    """Random images and labels; the first rows of each are black and white, where the ball leaves [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, side, side, generator=generator, dtype=torch.float64).to(dtype)
    x[:, :, 0], x[:, :, 1] = 0, 1
    return x, torch.randint(CLASSES, (n,), generator=generator)


@pytest.fixture
def setting():
    return network(0), network(1), *images()


# Called with student, teacher, x, y, and the budget: epsilon, step_size, steps.
ATTACKS = {
    "fgsm": lambda s, t, x, y, e, a, k: attacks.fgsm(s, x, y, e),
    "fgsm_random": lambda s, t, x, y, e, a, k: attacks.fgsm(s, x, y, e, random_start=True),
    "pgd": lambda s, t, x, y, *budget: attacks.pgd(s, x, y, *budget),
    "pgd_from_x": lambda s, t, x, y, *budget: attacks.pgd(s, x, y, *budget, random_start=False),
    "cw": lambda s, t, x, y, *budget: attacks.cw(s, x, y, *budget),
    "rslad": lambda s, t, x, y, *budget: attacks.perturb("rslad", s, t, x, y, *budget),
    "adaad": lambda s, t, x, y, *budget: attacks.adaad(s, t, x, *budget),
    "igdm": lambda s, t, x, y, *budget: attacks.igdm(s, t, x, *budget),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)


def run(name, student, teacher, x, y, epsilon=EPSILON, step_size=STEP_SIZE, steps=STEPS, seed=7):
    torch.manual_seed(seed)
    return ATTACKS[name](student, teacher, x, y, epsilon, step_size, steps)


@every_attack
@pytest.mark.parametrize("steps", [0, STEPS])
def test_equals_the_slow_reference(name, steps, setting):
    student, teacher, x, y = setting
    x_adv = run(name, student, teacher, x, y, steps=steps)
    step_size, steps = (EPSILON, 1) if name.startswith("fgsm") else (STEP_SIZE, steps)
    budget = SimpleNamespace(epsilon=EPSILON, step_size=step_size, steps=steps)
    torch.manual_seed(7)
    assert torch.equal(x_adv, reference_attack(name, student, teacher, x, y, budget))
    assert x_adv.data_ptr() != x.data_ptr()


def test_the_default_budget_is_the_papers():
    """8/255 in 10 steps of 2/255 (FGSM: one step of 8/255)."""
    budget = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10}
    for name in ("fgsm", "pgd", "cw", "rslad", "adaad", "igdm", "perturb"):
        parameters = inspect.signature(getattr(attacks, name)).parameters
        found = {key: parameters[key].default for key in budget if key in parameters}
        assert found == ({"epsilon": 8 / 255} if name == "fgsm" else budget)


@pytest.mark.parametrize("bad", [{"epsilon": -0.1}, {"step_size": -0.1}, {"steps": -1}, {"epsilon": float("nan")}])
def test_a_negative_budget_is_an_error(bad, setting):
    student, teacher, x, y = setting
    for attack, arguments in ((attacks.pgd, (student, x, y)), (attacks.adaad, (student, teacher, x))):
        with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
            attack(*arguments, **bad)


def test_perturb_names_the_attacks_that_it_knows(setting):
    with pytest.raises(ValueError, match=r"^attack 'fgsm' is not one of pgd, rslad, adaad, igdm$"):
        attacks.perturb("fgsm", *setting)


# Properties of every attack


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    channels = draw(st.sampled_from([1, 3]))
    x, y = images(draw(st.integers(1, 4)), draw(st.integers(0, 50)), dtype, channels, draw(st.integers(5, 9)))
    nets = [network(seed, dtype, channels) for seed in (0, 1)]
    epsilon = draw(st.sampled_from([0.0, 1 / 255, 8 / 255, 0.3, 1.0]) | st.floats(0, 1))
    step_size = draw(st.sampled_from([0.0, 2 / 255]) | st.floats(0, 1))
    return (*nets, x, y, epsilon, step_size, draw(st.integers(0, 3)), draw(st.integers(0, 100)))


@every_attack
@given(case=cases())
@settings(max_examples=30, deadline=None)
def test_x_adv_is_in_the_ball_and_in_range(name, case):
    x, epsilon = case[2], case[4]
    before = x.clone()
    x_adv = run(name, *case)
    assert (x_adv.shape, x_adv.dtype, x_adv.requires_grad) == (x.shape, x.dtype, False)
    assert torch.equal(x, before)
    # The bounds as the attack computes them, in x's precision: no tolerance.
    assert (x_adv >= x - epsilon).all()
    assert (x_adv <= x + epsilon).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@every_attack
@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 1, 4, 6)])
def test_shards_of_a_batch_are_attacked_like_the_batch(name, cuts):
    """Ranks that hold slices of the global batch draw its rows, and no image depends on the others of its batch."""
    student, teacher = network(0), network(1)
    x, y = images(6)
    whole = run(name, student, teacher, x, y)
    state = torch.get_rng_state()
    parts = []
    for begin, end in itertools.pairwise(cuts):
        with attacks.shard_of(begin, 6):
            parts.append(run(name, student, teacher, x[begin:end], y[begin:end]))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat(parts), whole)
    # The setting ends with the block, also after an error inside.
    with pytest.raises(RuntimeError, match="a rank died"), attacks.shard_of(2, 6):
        raise RuntimeError("a rank died")
    assert torch.equal(run(name, student, teacher, x, y), whole)


class Changed(nn.Module):
    """A network whose logits are changed."""

    def __init__(self, net, change):
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x):
        return self.change(self.net(x))


@every_attack
def test_objectives_of_half_precision_logits_are_computed_in_float32(name):
    """As under autocast."""
    x, y = images(dtype=torch.float32)
    nets = network(0, torch.float32), network(1, torch.float32)
    half = [Changed(net, lambda z: z.bfloat16()) for net in nets]
    wide = [Changed(net, lambda z: z.bfloat16().float()) for net in nets]
    x_adv = run(name, *half, x, y)
    assert x_adv.dtype == torch.float32
    assert torch.equal(x_adv, run(name, *wide, x, y))


@every_attack
def test_memory_format_does_not_matter(name, setting):
    student, teacher, x, y = setting
    expected = run(name, student, teacher, x, y)
    assert torch.equal(run(name, student, teacher, x.to(memory_format=torch.channels_last), y), expected)
    # A view with strides of its own.
    assert torch.equal(run(name, student, teacher, x.transpose(2, 3).contiguous().transpose(2, 3), y), expected)


@every_attack
def test_gradients_of_x_and_grad_mode_do_not_matter(name, setting):
    student, teacher, x, y = setting
    expected = run(name, student, teacher, x, y)
    leaf = x.clone().requires_grad_()
    x_adv = run(name, student, teacher, leaf, y)
    assert torch.equal(x_adv, expected)
    assert (x_adv.requires_grad, leaf.requires_grad, leaf.grad) == (False, True, None)
    with torch.no_grad():
        assert torch.equal(run(name, student, teacher, x, y), expected)
        assert not torch.is_grad_enabled()


# Side effects


def mixed(net):
    """Train mode with a BatchNorm in eval mode, partly frozen, with a gradient on one parameter."""
    net.train()
    net.features[1].eval()
    net.features[4].weight.requires_grad_(False)
    net.linear.bias.grad = torch.full_like(net.linear.bias, 3.0)
    return net


def evaluating(net):
    """Eval mode with dropout in train mode, as for Monte Carlo dropout; the frozen parameters of a teacher."""
    net.eval().requires_grad_(False)
    net.features[3].train()
    return net


class Stubborn(SmoothNet):
    """Ignores train() and eval(), as a frozen teacher may."""

    def train(self, mode=True):
        return self


def stubborn(net):
    net.__class__ = Stubborn
    return net


def snapshot(*nets):
    seen = []
    for net in nets:
        seen += [(name, module.training) for name, module in net.named_modules()]
        for name, parameter in net.named_parameters():
            grad = None if parameter.grad is None else (id(parameter.grad), parameter.grad.tolist())
            seen.append((name, parameter.requires_grad, grad))
        seen += [(name, value.tolist()) for name, value in net.state_dict().items()]
    return seen


@every_attack
@pytest.mark.parametrize("state", [mixed, evaluating, stubborn])
def test_modes_gradients_and_statistics_are_restored(name, state, setting):
    student, teacher, x, y = setting
    expected = run(name, student, teacher, x, y)
    before = snapshot(state(student), state(teacher))
    x_adv = run(name, student, teacher, x, y)
    assert snapshot(student, teacher) == before
    assert torch.equal(x_adv, expected)  # all of it is in eval mode during the attack


@pytest.mark.parametrize("name", ["adaad", "igdm"])
def test_a_network_may_be_its_own_teacher(name, setting):
    student, _, x, y = setting
    before = snapshot(mixed(student))
    run(name, student, student, x, y)
    assert snapshot(student) == before


# AdaAD with a teacher that is evaluated at every K-th step only


class CountedNet(nn.Module):
    """Counts forward and backward passes of a linear network with random weights."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(CLASSES, 3 * 7 * 7, dtype=torch.float64, generator=generator)
        self.forwards = self.backwards = 0

    def forward(self, x):
        self.forwards += 1
        z = x.flatten(1) @ self.matrix.T
        if z.requires_grad:
            z.register_hook(self._count)
        return z

    def _count(self, gradient):
        self.backwards += 1


def kept_teacher_reference(student, teacher, x, every):
    """The attack with a kept teacher, written out for linear networks, whose Jacobians are their matrices."""
    z = x + 0.001 * torch.randn(x.shape)
    for k in range(STEPS):
        s = student(z).log_softmax(1)
        if k % every == 0:
            t = teacher(z).log_softmax(1)
            p = t.exp()
            dkl_dt = p * (t - s - (p * (t - s)).sum(1, keepdim=True))
        gradient = (s.exp() - p) @ student.matrix + dkl_dt @ teacher.matrix
        z = z + STEP_SIZE * gradient.sign().view_as(x)
        z = torch.min(torch.max(z, x - EPSILON), x + EPSILON).clamp(0, 1)
    return z


@pytest.mark.parametrize(("every", "evaluations"), [(1, 4), (2, 2), (3, 2), (4, 1), (100, 1)])
def test_kept_teacher_equals_the_closed_form_of_linear_networks(every, evaluations):
    x, _ = images()
    torch.manual_seed(5)
    expected = kept_teacher_reference(CountedNet(1), CountedNet(2), x, every)
    student, teacher = CountedNet(1), CountedNet(2)
    torch.manual_seed(5)
    x_adv = attacks.adaad(student, teacher, x, EPSILON, STEP_SIZE, STEPS, every)
    assert torch.equal(x_adv, expected)
    assert (teacher.forwards, teacher.backwards) == (evaluations, evaluations)
    assert (student.forwards, student.backwards) == (STEPS, STEPS)


@pytest.mark.parametrize("every", [0, -1])
def test_teacher_every_starts_at_one(every):
    x, _ = images()
    with pytest.raises(ValueError, match=f"teacher_every {every} is out of range"):
        attacks.adaad(network(1), network(2), x, teacher_every=every)
