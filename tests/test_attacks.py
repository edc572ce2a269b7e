"""Attacks against a slow reference written from the equations, and the properties that every one of them promises.

No tolerance where none is stated: after its start an attack only adds and clamps the same float64 numbers in the same
order, the sign of a gradient being all that it takes from the network. Networks here are smooth, so that no gradient is
so near to 0 that rounding decides its sign.
"""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attacks

CLASSES = 5
EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 4


class SmoothNet(nn.Module):
    """Smooth in its input; BatchNorm and dropout betray a wrong mode."""

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


def network(seed, dtype=torch.float64, channels=3):
    """A SmoothNet in train mode, with the statistics of a trained one; the global generator stays where it is."""
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


def images(n=4, seed=3, dtype=torch.float64, channels=3, side=7):
    """Random images and labels; the first rows of each are black and white, where the ball leaves [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, side, side, generator=generator, dtype=torch.float64).to(dtype)
    x[:, :, 0], x[:, :, 1] = 0, 1
    return x, torch.randint(CLASSES, (n,), generator=generator)


def test_the_default_budget_is_the_papers(setting):
    """8/255 in 10 steps of 2/255 (FGSM: one step of 8/255)."""
    student, teacher, x, y = setting
    logits = teacher.eval()(x).detach()
    budget = (8 / 255, 2 / 255, 10)
    calls = [
        (attacks.fgsm, (student, x, y), budget[:1]),
        (attacks.pgd, (student, x, y), budget),
        (attacks.cw, (student, x, y), budget),
        (attacks.rslad, (student, logits, x), budget),
        (attacks.adaad, (student, teacher, x), budget),
        (attacks.igdm, (student, teacher, x), budget),
        (attacks.perturb, ("rslad", student, teacher, x, y), budget),
    ]
    for attack, arguments, explicit in calls:
        torch.manual_seed(0)
        x_adv = attack(*arguments)
        torch.manual_seed(0)
        assert torch.equal(x_adv, attack(*arguments, *explicit)), attack.__name__


@pytest.mark.parametrize("bad", [{"epsilon": -0.1}, {"step_size": -0.1}, {"steps": -1}, {"epsilon": float("nan")}])
def test_a_negative_budget_is_refused(bad, setting):
    student, teacher, x, y = setting
    for attack, arguments in ((attacks.pgd, (student, x, y)), (attacks.adaad, (student, teacher, x))):
        with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
            attack(*arguments, **bad)


@pytest.fixture
def setting():
    x, y = images()
    return network(0), network(1), x, y


# What every attack is called with here: student, teacher, x, y, epsilon, step_size, steps.
ATTACKS = {
    "fgsm": lambda s, t, x, y, e, a, k: attacks.fgsm(s, x, y, e),
    "fgsm_random": lambda s, t, x, y, e, a, k: attacks.fgsm(s, x, y, e, random_start=True),
    "pgd": lambda s, t, x, y, e, a, k: attacks.pgd(s, x, y, e, a, k),
    "pgd_from_x": lambda s, t, x, y, e, a, k: attacks.pgd(s, x, y, e, a, k, random_start=False),
    "cw": lambda s, t, x, y, e, a, k: attacks.cw(s, x, y, e, a, k),
    "rslad": lambda s, t, x, y, e, a, k: attacks.rslad(s, teacher_clean(t, x), x, e, a, k),
    "adaad": lambda s, t, x, y, e, a, k: attacks.adaad(s, t, x, e, a, k),
    "igdm": lambda s, t, x, y, e, a, k: attacks.igdm(s, t, x, e, a, k),
}
UNIFORM, GAUSSIAN, NO_START = ("fgsm_random", "pgd", "cw", "igdm"), ("rslad", "adaad"), ("fgsm", "pgd_from_x")
WITH_TEACHER = ("adaad", "igdm")
every_attack = pytest.mark.parametrize("name", ATTACKS)


def teacher_clean(teacher, x):
    with torch.no_grad():
        return nn.Module.train(copy.deepcopy(teacher), False)(x)


def run(name, student, teacher, x, y, epsilon=EPSILON, step_size=STEP_SIZE, steps=STEPS, seed=7):
    torch.manual_seed(seed)
    return ATTACKS[name](student, teacher, x, y, epsilon, step_size, steps)


# The slow reference: each attack its own loop, softmax and logarithm written out, one image after the other.


def softmax(z):
    return z.exp() / z.exp().sum()


def cross_entropy(logits, y):
    return sum(-softmax(row)[label].log() for row, label in zip(logits, y, strict=True)) / len(logits)


def kl(teacher_logits, student_logits):
    total = 0
    for t, s in zip(teacher_logits, student_logits, strict=True):
        total = total + (softmax(t) * (softmax(t).log() - softmax(s).log())).sum()
    return total / len(teacher_logits)


def margin(logits, y):
    total = 0
    for row, label in zip(logits, y.tolist(), strict=True):
        total = total + max(row[j] for j in range(CLASSES) if j != label) - row[label]
    return total / len(logits)


def back(x_adv, x, epsilon):
    x_adv = torch.max(torch.min(x_adv, x + epsilon), x - epsilon)
    return torch.clamp(x_adv, 0, 1)


def gradient_at(x_adv, objective):
    x_adv = x_adv.detach().clone().requires_grad_()
    objective(x_adv).backward()
    return x_adv.grad


def uniform(x, epsilon):
    return torch.clamp(x + torch.empty_like(x).uniform_(-epsilon, epsilon), 0, 1)


def slow_fgsm(student, teacher, x, y, epsilon, step_size, steps):
    return back(x + epsilon * gradient_at(x, lambda z: cross_entropy(student(z), y)).sign(), x, epsilon)


def slow_fgsm_random(student, teacher, x, y, epsilon, step_size, steps):
    start = uniform(x, epsilon)
    return back(start + epsilon * gradient_at(start, lambda z: cross_entropy(student(z), y)).sign(), x, epsilon)


def slow_pgd(student, teacher, x, y, epsilon, step_size, steps):
    x_adv = uniform(x, epsilon)
    for _ in range(steps):
        gradient = gradient_at(x_adv, lambda z: cross_entropy(student(z), y))
        x_adv = back(x_adv + step_size * gradient.sign(), x, epsilon)
    return x_adv


def slow_pgd_from_x(student, teacher, x, y, epsilon, step_size, steps):
    x_adv = x
    for _ in range(steps):
        gradient = gradient_at(x_adv, lambda z: cross_entropy(student(z), y))
        x_adv = back(x_adv + step_size * gradient.sign(), x, epsilon)
    return x_adv


def slow_cw(student, teacher, x, y, epsilon, step_size, steps):
    x_adv = uniform(x, epsilon)
    for _ in range(steps):
        x_adv = back(x_adv + step_size * gradient_at(x_adv, lambda z: margin(student(z), y)).sign(), x, epsilon)
    return x_adv


def slow_rslad(student, teacher, x, y, epsilon, step_size, steps):
    target = teacher(x).detach()
    x_adv = x + 0.001 * torch.randn(x.shape)
    for _ in range(steps):
        x_adv = back(x_adv + step_size * gradient_at(x_adv, lambda z: kl(target, student(z))).sign(), x, epsilon)
    return x_adv


def slow_adaad(student, teacher, x, y, epsilon, step_size, steps):
    x_adv = x + 0.001 * torch.randn(x.shape)
    for _ in range(steps):
        x_adv = back(x_adv + step_size * gradient_at(x_adv, lambda z: kl(teacher(z), student(z))).sign(), x, epsilon)
    return x_adv


def igdm_objective(student, teacher, x, z):
    """With delta = z - x and beta = gamma = 1."""
    delta = z - x
    return kl(teacher(x + delta) - teacher(x - delta), student(x + delta) - student(x - delta))


def slow_igdm(student, teacher, x, y, epsilon, step_size, steps):
    x_adv = uniform(x, epsilon)
    for _ in range(steps):
        gradient = gradient_at(x_adv, lambda z: igdm_objective(student, teacher, x, z))
        x_adv = back(x_adv + step_size * gradient.sign(), x, epsilon)
    return x_adv


REFERENCE = {name: globals()[f"slow_{name}"] for name in ATTACKS}


@every_attack
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_slow_reference(name, seed):
    student, teacher = network(2 * seed), network(2 * seed + 1)
    x, y = images(seed=seed)
    torch.manual_seed(seed)
    expected = REFERENCE[name](
        copy.deepcopy(student).eval(), copy.deepcopy(teacher).eval(), x, y, EPSILON, STEP_SIZE, STEPS
    )
    x_adv = run(name, student, teacher, x, y, seed=seed)
    assert torch.equal(x_adv, expected)
    assert (x_adv - x).abs().max() > EPSILON / 2


@pytest.mark.parametrize("name", ["pgd", "rslad", "adaad", "igdm"])
def test_perturb_is_the_attack_of_that_name(name, setting):
    student, teacher, x, y = setting
    expected = run(name, student, teacher, x, y)
    torch.manual_seed(7)
    assert torch.equal(attacks.perturb(name, student, teacher, x, y, EPSILON, STEP_SIZE, STEPS), expected)
    assert name in attacks.INNER_MAXIMISATIONS


@pytest.mark.parametrize("name", ["ard", "PGD", "", "fgsm"])
def test_perturb_names_what_it_does_not_know(name, setting):
    student, teacher, x, y = setting
    with pytest.raises(ValueError, match="is not one of pgd, rslad, adaad, igdm") as caught:
        attacks.perturb(name, student, teacher, x, y, EPSILON, STEP_SIZE, STEPS)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


# Closed forms


@pytest.mark.parametrize("name", ["pgd", "pgd_from_x", "fgsm", "fgsm_random", "cw"])
@pytest.mark.parametrize("label", [0, 1])
def test_a_linear_model_is_driven_into_the_corner(name, label):
    """Two classes with logits (w x, 0): the best perturbation of class 0 is -epsilon sign(w), of 1 the opposite."""
    x, _ = images()
    w = torch.randn(x[0].numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    class Linear(nn.Module):
        def forward(self, x):
            score = x.flatten(1) @ w
            return torch.stack([score, torch.zeros_like(score)], dim=1)

    y = torch.full((len(x),), label)
    # From any start in the ball, 2 epsilon of steps reach every corner; FGSM's one step does it from x alone.
    x_adv = run(name, Linear(), None, x, y, epsilon=0.1, step_size=0.05, steps=4)
    direction = (w.sign() if label else -w.sign()).view(x[0].shape)
    if name == "fgsm_random":
        torch.manual_seed(7)
        expected = back(uniform(x, 0.1) + 0.1 * direction, x, 0.1)
    else:
        expected = (x + 0.1 * direction).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-15)  # steps of 0.05 add up to 0.1 but for rounding


def one_step(start, gradient, x):
    return back(start + STEP_SIZE * gradient.sign(), x, EPSILON)


def test_igdm_ascends_the_plain_formula_through_all_four_branches(setting):
    """One step follows the gradient of the plain formula, and no gradient that lacks a branch or a sign."""
    student, teacher, x, y = setting
    x_adv = run("igdm", student, teacher, x, y, steps=1)
    s, t = copy.deepcopy(student).eval(), copy.deepcopy(teacher).eval()
    torch.manual_seed(7)
    start = uniform(x, EPSILON)
    full = gradient_at(start, lambda z: igdm_objective(s, t, x, z))
    assert torch.equal(x_adv, one_step(start, full, x))

    wrong = {
        "teacher constant": lambda z: kl((t(z) - t(2 * x - z)).detach(), s(z) - s(2 * x - z)),
        "minus constant": lambda z: kl(t(z) - t(2 * x - z).detach(), s(z) - s(2 * x - z).detach()),
        "student minus constant": lambda z: kl(t(z) - t(2 * x - z), s(z) - s(2 * x - z).detach()),
        "teacher minus constant": lambda z: kl(t(z) - t(2 * x - z).detach(), s(z) - s(2 * x - z)),
        "minus with the sign of plus": lambda z: kl(t(z) - t(2 * x - start + z - start), s(z) - s(x + z - start)),
    }
    for mistake, objective in wrong.items():
        gradient = gradient_at(start, objective)
        assert not torch.equal(x_adv, one_step(start, gradient, x)), mistake


def test_adaad_ascends_through_the_teacher_too(setting):
    student, teacher, x, y = setting
    x_adv = run("adaad", student, teacher, x, y, steps=1)
    s, t = copy.deepcopy(student).eval(), copy.deepcopy(teacher).eval()
    torch.manual_seed(7)
    start = x + 0.001 * torch.randn(x.shape)
    assert torch.equal(x_adv, one_step(start, gradient_at(start, lambda z: kl(t(z), s(z))), x))
    assert not torch.equal(x_adv, one_step(start, gradient_at(start, lambda z: kl(t(z).detach(), s(z))), x))


@every_attack
def test_the_objective_rises(name, setting):
    """On smooth networks and in small steps, every image ends with a higher objective than its start had."""
    student, teacher, x, y = setting
    s, t = copy.deepcopy(student).eval(), copy.deepcopy(teacher).eval()
    target = t(x).detach()

    def objective(z, i):
        x1, z1, y1 = x[i : i + 1], z[i : i + 1], y[i : i + 1]
        if name == "cw":
            return margin(s(z1), y1)
        if name == "rslad":
            return kl(target[i : i + 1], s(z1))
        if name == "adaad":
            return kl(t(z1), s(z1))
        if name == "igdm":
            return igdm_objective(s, t, x1, z1)
        return cross_entropy(s(z1), y1)

    torch.manual_seed(7)
    start = x
    if name in UNIFORM:
        start = uniform(x, EPSILON)
    elif name in GAUSSIAN:
        start = back(x + 0.001 * torch.randn(x.shape), x, EPSILON)
    x_adv = run(name, student, teacher, x, y, step_size=0.5 / 255, steps=20)
    with torch.no_grad():
        for i in range(len(x)):
            assert objective(x_adv, i) > objective(start, i)


# Starts


class Recorder(nn.Module):
    """Remembers its inputs."""

    def __init__(self, net):
        super().__init__()
        self.net, self.inputs = net, []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return self.net(x)


@every_attack
def test_first_point(name, setting):
    """Uniform starts are clamped to [0, 1], Gaussian ones are not, as the published code has it."""
    student, teacher, x, y = setting
    student = Recorder(student)
    run(name, student, teacher, x, y)
    torch.manual_seed(7)
    if name in UNIFORM:
        expected = (x + torch.empty_like(x).uniform_(-EPSILON, EPSILON)).clamp(0, 1)
    else:
        expected = x + 0.001 * torch.randn(x.shape) if name in GAUSSIAN else x
    assert torch.equal(student.inputs[0][: len(x)], expected)
    assert (expected.min() < 0) == (name in GAUSSIAN)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_noise_is_drawn_in_float32(name):
    """The draw does not depend on the images' dtype: float32 and float64 runs start from the same point."""
    starts = []
    for dtype in (torch.float32, torch.float64):
        x, y = images(dtype=torch.float32)
        student, teacher = Recorder(network(0, dtype)), network(1, dtype)
        run(name, student, teacher, x.to(dtype), y)
        starts.append(student.inputs[0])
    # In float32 the sum of x and the noise is rounded to 1e-7.
    torch.testing.assert_close(starts[0].double(), starts[1], rtol=0, atol=1e-7)


@every_attack
def test_one_draw_per_call_from_the_global_generator(name, setting):
    student, teacher, x, y = setting
    run(name, student, teacher, x, y)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    if name in UNIFORM:
        torch.empty_like(x).uniform_(-1, 1)
    elif name in GAUSSIAN:
        torch.randn(x.shape)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("name", ["pgd", "rslad", "adaad", "igdm"])
@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 1, 4, 6)])
def test_shards_of_a_batch_are_attacked_like_the_batch(name, cuts):
    """Ranks that hold slices of the global batch and the same generator state draw its rows, and stay in step."""
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
    # Outside, and also after an error inside, a batch is a whole again.
    with pytest.raises(RuntimeError, match="a rank died"), attacks.shard_of(2, 6):
        raise RuntimeError("a rank died")
    assert torch.equal(run(name, student, teacher, x, y), whole)


# Properties of every attack


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    channels = draw(st.sampled_from([1, 3]))
    x, y = images(draw(st.integers(1, 4)), draw(st.integers(0, 50)), dtype, channels, draw(st.integers(5, 9)))
    nets = [network_cached(seed, dtype, channels) for seed in (0, 1)]
    epsilon = draw(st.sampled_from([0.0, 1 / 255, 8 / 255, 0.3, 1.0]) | st.floats(0, 1))
    step_size = draw(st.sampled_from([0.0, 2 / 255]) | st.floats(0, 1))
    return (*nets, x, y, epsilon, step_size, draw(st.integers(1, 3)), draw(st.integers(0, 100)))


network_cached = functools.cache(network)


@every_attack
@given(case=cases())
@settings(max_examples=30, deadline=None)
def test_x_adv_stays_in_the_ball_and_in_range(name, case):
    x, epsilon = case[2], case[4]
    before = x.clone()
    x_adv = run(name, *case)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert x_adv.data_ptr() != x.data_ptr()
    assert torch.equal(x, before)
    # The bounds as the attack computes them, in x's precision: no tolerance.
    assert (x_adv >= x - epsilon).all()
    assert (x_adv <= x + epsilon).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@every_attack
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 3])
def test_epsilon_zero_gives_x_back(name, dtype, steps):
    x, y = images(dtype=dtype)
    x_adv = run(name, network(0, dtype), network(1, dtype), x, y, epsilon=0.0, steps=steps)
    assert torch.equal(x_adv, x)
    x_adv.zero_()
    assert x.max() == 1  # no alias of x


@pytest.mark.parametrize("name", ["pgd", "pgd_from_x", "cw", "rslad", "adaad", "igdm"])
def test_no_steps_give_the_start_back_projected(name, setting):
    student, teacher, x, y = setting
    x_adv = run(name, student, teacher, x, y, steps=0)
    torch.manual_seed(7)
    start = x
    if name in UNIFORM:
        start = uniform(x, EPSILON)
    elif name in GAUSSIAN:
        start = back(x + 0.001 * torch.randn(x.shape), x, EPSILON)
    assert torch.equal(x_adv, start)
    assert x_adv.data_ptr() != x.data_ptr()


@every_attack
def test_half_precision_images_keep_their_dtype(name):
    x, y = images(dtype=torch.bfloat16)
    x_adv = run(name, network(0, torch.bfloat16), network(1, torch.bfloat16), x, y)
    assert x_adv.dtype == torch.bfloat16
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@every_attack
def test_a_network_may_begin_with_a_sum(name):
    """Whose gradient with respect to the input is one number seen many times: it cannot be written to."""

    class Sums(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.linear = nn.Linear(3, CLASSES, dtype=torch.float64)
            nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(seed))

        def forward(self, x):
            return self.linear(x.sum(dim=(2, 3)))

    x, y = images()
    x_adv = run(name, Sums(0), Sums(1), x, y)
    assert (x_adv - x).abs().max() > EPSILON / 2


@every_attack
def test_networks_may_answer_in_half_precision(name):
    """As under autocast: objectives are computed in float32, the images stay float32."""

    class Half(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).bfloat16()

    x, y = images(dtype=torch.float32)
    x_adv = run(name, Half(network(0, torch.float32)), Half(network(1, torch.float32)), x, y)
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().amax(dim=(1, 2, 3)).min() > EPSILON / 2
    assert torch.isfinite(x_adv).all()


@every_attack
def test_saturated_networks_give_finite_images(name):
    """A softmax that underflows to 0 must not put NaN into x_adv."""
    student, teacher = network(0, torch.float32), network(1, torch.float32)
    with torch.no_grad():
        student.linear.weight.mul_(1e4)
        teacher.linear.weight.mul_(1e4)
    x, y = images(dtype=torch.float32)
    x_adv = run(name, student, teacher, x, y)
    assert torch.isfinite(x_adv).all()
    assert (x_adv - x).abs().max() <= EPSILON + 1e-7  # x - epsilon in float32


@every_attack
def test_an_image_is_attacked_alike_in_any_company(name, setting):
    """Eval mode and an objective summed over images: the path of an image hangs on its own start only."""
    student, teacher, x, y = setting
    whole = run(name, student, teacher, x, y)
    with attacks.shard_of(1, len(x)):
        alone = run(name, student, teacher, x[1:2], y[1:2])
    assert torch.equal(alone, whole[1:2])


@every_attack
def test_memory_format_does_not_matter(name, setting):
    student, teacher, x, y = setting
    expected = run(name, student, teacher, x, y)
    rearranged = x.to(memory_format=torch.channels_last)
    assert not rearranged.is_contiguous()
    assert torch.equal(run(name, student, teacher, rearranged, y), expected)
    # A view with strides of its own.
    assert torch.equal(run(name, student, teacher, x.transpose(2, 3).contiguous().transpose(2, 3), y), expected)


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


def snapshot(*nets):
    seen = []
    for net in nets:
        seen += [(name, module.training) for name, module in net.named_modules()]
        for name, parameter in net.named_parameters():
            grad = None if parameter.grad is None else (id(parameter.grad), parameter.grad.tolist())
            seen.append((name, parameter.requires_grad, grad))
        seen += [(name, value.tolist()) for name, value in net.state_dict().items()]
    return seen


STATES = {"train": lambda net: net.train(), "mixed": mixed, "eval": lambda net: net.eval(), "evaluating": evaluating}


@every_attack
@pytest.mark.parametrize("state", STATES)
def test_modes_gradients_and_statistics_are_left_as_they_were(name, state, setting):
    student, teacher, x, y = setting
    STATES[state](student)
    STATES[state](teacher)
    before = snapshot(student, teacher)
    x_adv = run(name, student, teacher, x, y)
    assert snapshot(student, teacher) == before
    # And inside, all of it is in eval mode: whatever it was before, the result is the same.
    assert torch.equal(x_adv, run(name, network(0), network(1), x, y))


@pytest.mark.parametrize("attack", attacks.INNER_MAXIMISATIONS)
@pytest.mark.parametrize("state", STATES)
def test_perturb_leaves_both_networks_as_they_were(attack, state, setting):
    student, teacher, x, y = setting
    STATES[state](student)
    STATES[state](teacher)
    before = snapshot(student, teacher)
    attacks.perturb(attack, student, teacher, x, y, EPSILON, STEP_SIZE, STEPS)
    assert snapshot(student, teacher) == before


class Breaks(nn.Module):
    """Raises in its second pass; notes what it looked like inside the first."""

    def __init__(self, net):
        super().__init__()
        self.net, self.passes, self.inside = net, 0, None

    def forward(self, x):
        self.passes += 1
        modes = {module.training for module in self.modules()}
        self.inside = (modes, {parameter.requires_grad for parameter in self.parameters()})
        if self.passes == 2:
            raise RuntimeError("out of memory, say")
        return self.net(x)


@pytest.mark.parametrize("name", [name for name in ATTACKS if not name.startswith("fgsm")])
def test_all_is_restored_when_the_model_raises(name, setting):
    student, teacher, x, y = setting
    student, teacher = Breaks(mixed(student)), mixed(teacher)
    before = snapshot(student, teacher)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        run(name, student, teacher, x, y)
    assert student.inside == ({False}, {False})
    assert snapshot(student, teacher) == before


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_all_is_restored_when_the_teacher_raises(name, setting):
    student, teacher, x, y = setting
    student, teacher = mixed(student), Breaks(mixed(teacher))
    before = snapshot(student, teacher)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        run(name, student, teacher, x, y)
    assert teacher.inside == ({False}, {False})
    assert snapshot(student, teacher) == before


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_network_may_be_its_own_teacher(name, setting):
    student, _, x, y = setting
    before = snapshot(mixed(student))
    x_adv = run(name, student, student, x, y)
    assert snapshot(student) == before
    assert (x_adv - x).abs().max() <= EPSILON


@every_attack
def test_a_network_whose_train_and_eval_do_nothing(name, setting):
    """A frozen teacher may refuse both: modes are set and restored flag by flag."""

    class Stubborn(SmoothNet):
        def train(self, mode=True):
            return self

    student, teacher, x, y = setting
    expected = run(name, student, teacher, x, y)
    student.__class__ = teacher.__class__ = Stubborn
    before = snapshot(student, teacher)
    assert torch.equal(run(name, student, teacher, x, y), expected)
    assert snapshot(student, teacher) == before


def test_frozen_nests(setting):
    student = mixed(setting[0])
    before = snapshot(student)
    with attacks.frozen(student):
        inside = snapshot(student)
        with attacks.frozen(student):
            pass
        assert snapshot(student) == inside
    assert snapshot(student) == before


@every_attack
def test_works_under_no_grad(name, setting):
    student, teacher, x, y = setting
    expected = run(name, student, teacher, x, y)
    with torch.no_grad():
        assert torch.equal(run(name, student, teacher, x, y), expected)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


@every_attack
def test_an_x_that_requires_a_gradient_is_left_alone(name, setting):
    student, teacher, x, y = setting
    expected = run(name, student, teacher, x, y)
    leaf, before = x.clone().requires_grad_(), x.clone()
    x_adv = run(name, student, teacher, leaf, y)
    assert torch.equal(x_adv, expected)
    assert x_adv.grad_fn is None
    assert not x_adv.requires_grad
    assert leaf.requires_grad
    assert leaf.grad is None
    assert torch.equal(leaf.detach(), before)


@every_attack
def test_an_x_with_a_history_keeps_it(name, setting):
    student, teacher, x, y = setting
    expected = run(name, student, teacher, x, y)
    leaf = x.clone().requires_grad_()
    computed = leaf.exp().log()
    computed.data.copy_(x)  # exp and log round; their graph is what matters here
    assert torch.equal(run(name, student, teacher, computed, y), expected)
    assert leaf.grad is None
    computed.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.ones_like(x), rtol=1e-12, atol=0)


def test_rslad_takes_no_gradient_of_its_target(setting):
    student, teacher, x, _ = setting
    target = teacher.eval()(x)
    assert target.requires_grad
    torch.manual_seed(7)
    attacks.rslad(student, target, x, EPSILON, STEP_SIZE, STEPS)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    F.softmax(target, dim=1)[:, 0].sum().backward()  # its graph is still whole
    assert teacher.linear.weight.grad is not None


# AdaAD with a teacher that is evaluated at every K-th step only


class CountedNet(nn.Module):
    """Counts forward and backward passes; logits are a function of the flattened image."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.forwards, self.backwards = logits, 0, 0

    def forward(self, x):
        self.forwards += 1
        z = self.logits(x)
        if z.requires_grad:
            z.register_hook(self._count)
        return z

    def _count(self, gradient):
        self.backwards += 1


def linear_logits(seed):
    weight = torch.randn(CLASSES, 3 * 7 * 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return lambda x: x.flatten(1) @ weight.T


def kept_teacher_reference(student, teacher, x, every):
    """The attack with a kept teacher, written out; for linear networks, whose Jacobians are constant matrices."""
    students, teachers = (net(torch.eye(147, dtype=x.dtype).view(147, 3, 7, 7)).T for net in (student, teacher))
    z = x + 0.001 * torch.randn(x.shape)
    for k in range(STEPS):
        s = student(z).log_softmax(1)
        if k % every == 0:
            t = teacher(z).log_softmax(1)
            p = t.exp()
            dkl_dt = p * (t - s - (p * (t - s)).sum(1, keepdim=True))
        gradient = (s.exp() - p) @ students + dkl_dt @ teachers
        z = z + STEP_SIZE * gradient.sign().view_as(x)
        z = torch.min(torch.max(z, x - EPSILON), x + EPSILON).clamp(0, 1)
    return z


@pytest.mark.parametrize("every", [1, 2, 3, STEPS, STEPS + 5])
def test_kept_teacher_equals_the_closed_form_of_linear_networks(every):
    x, _ = images()
    student, teacher = linear_logits(1), linear_logits(2)
    torch.manual_seed(5)
    expected = kept_teacher_reference(student, teacher, x, every)
    torch.manual_seed(5)
    x_adv = attacks.adaad(CountedNet(student), CountedNet(teacher), x, EPSILON, STEP_SIZE, STEPS, every)
    assert torch.equal(x_adv, expected)


@pytest.mark.parametrize(("every", "evaluations"), [(1, 4), (2, 2), (3, 2), (4, 1), (100, 1)])
def test_kept_teacher_is_evaluated_at_every_kth_step(every, evaluations):
    x, _ = images()
    student, teacher = CountedNet(linear_logits(1)), CountedNet(linear_logits(2))
    attacks.adaad(student, teacher, x, EPSILON, STEP_SIZE, STEPS, every)
    assert (teacher.forwards, teacher.backwards) == (evaluations, evaluations)
    assert (student.forwards, student.backwards) == (STEPS, STEPS)


def test_a_teacher_kept_for_one_step_is_adaad():
    # The surrogate of a kept teacher at K = 1, against the paper's objective: the same gradient by another formula.
    x, _ = images()
    student, teacher = network(1).eval(), network(2).eval()
    objective = attacks._with_kept_teacher(student, teacher, 1)
    x = x.requires_grad_()
    (kept,) = torch.autograd.grad(objective(x), [x])
    (paper,) = torch.autograd.grad(attacks.kl_divergence(student(x), teacher(x), reduction="sum"), [x])
    torch.testing.assert_close(kept, paper, rtol=1e-12, atol=1e-14)  # float64 rounding of another order of sums


@pytest.mark.parametrize("every", [0, -1])
def test_teacher_every_starts_at_one(every):
    x, _ = images()
    with pytest.raises(ValueError, match=f"teacher_every {every} is out of range"):
        attacks.adaad(network(1), network(2), x, teacher_every=every)
