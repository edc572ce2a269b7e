"""Each switch of the engine's FastPath computes the same steps; a CUDA graph, on the CPU, is its static buffers only.

Tolerance: where no precision changes, everything is in float64, or equal to the bit.
"""

import copy
import importlib.util
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from reference import CLASSES, CLOSE, assert_same_network, product_run, settings
from torch import nn

import attacks
from benchmarks import dm_wide_resnet
from cifar100_models import build_model
from experiment.engine import Engine, FastPath
from experiment.engine.accelerated import Accelerated
from experiment.engine.folding import FrozenLayer

EVERYTHING = FastPath(merge_pads=True, stored_weights=True, attack_graph=True, cuda_graph=True)
METHODS = ("ard_IGDM", "rslad", "adaad_IGDM")


def engine(fast_path, **changes):
    default = {"device": "cpu", "precision": "fp32", "compile": 0, "batch": 6, "deterministic": 0, "seed": 0}
    return Engine(SimpleNamespace(**{**default, **changes}), fast_path)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """A limited number of compiled variants is kept per function."""
    torch.compiler.reset()


@pytest.fixture
def aot_eager(monkeypatch):
    """The whole of torch.compile but its code generation, which needs a compiler and a minute."""
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: plain_compile(model, backend="aot_eager", **options))


def batches(dtype=torch.float64):
    """Two of the usual size, and an odd last one."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(n, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(CLASSES, (n,), generator=generator),
        )
        for n in (6, 6, 4)
    ]


def run(method, networks, fast_path, data, *flags, autocast_cache=True, **changes):
    """The student after the method's steps on these batches, through the engine."""
    student, teacher = copy.deepcopy(networks)
    machine = engine(fast_path, **changes)

    @contextmanager
    def step():
        with machine.step():
            torch.set_autocast_cache_enabled(autocast_cache)
            yield

    torch.manual_seed(5)
    loss = product_run(method, student, teacher, data, settings(method, *flags), wrap=machine.accelerate, around=step)
    return student, loss, machine


def assert_equal_bits(ours, expected):
    for (name, a), (_, b) in zip(ours.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_attack_step_as_one_graph_is_the_same_step(method, cuda_graph, networks, aot_eager):
    plain, _, _ = run(method, networks, FastPath(), batches())
    ours, _, machine = run(method, networks, FastPath(attack_graph=True, cuda_graph=cuda_graph), batches())
    assert_equal_bits(ours, plain)
    assert bool(machine._attack_step._captured) == cuda_graph


@pytest.mark.filterwarnings("default::DeprecationWarning")  # of torch's own, in the compiler's imports
def test_an_attack_step_as_one_graph_through_inductor(networks):
    """Code generation reorders sums: rounding alone in float64."""
    student, teacher = (
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).double().eval()
        for _ in range(2)
    )
    x = batches()[0][0]
    torch.manual_seed(5)
    expected = attacks.adaad(student, teacher, x)
    machine = engine(FastPath(attack_graph=True))
    fast_student, fast_teacher = machine.accelerate(student), machine.accelerate(teacher)
    torch.manual_seed(5)
    with machine.step():
        ours = attacks.adaad(fast_student, fast_teacher, x)
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_igdm_as_an_attack_takes_both_branches_in_one_graph(networks, aot_eager):
    flags = ("--attack", "igdm")
    plain, _, _ = run("adaad_IGDM", networks, FastPath(), batches(), *flags)
    ours, _, _ = run("adaad_IGDM", networks, FastPath(attack_graph=True, cuda_graph=True), batches(), *flags)
    assert_equal_bits(ours, plain)


@pytest.mark.parametrize("method", METHODS)
def test_replayed_buffers_are_the_same_step(method, networks):
    """A CUDA graph's replay reads and writes its own buffers only: on the CPU the same function runs on them."""
    plain, _, _ = run(method, networks, FastPath(), batches())
    ours, _, machine = run(method, networks, FastPath(cuda_graph=True), batches())
    assert_equal_bits(ours, plain)
    assert machine._attack_step._captured


def test_a_replay_leaves_earlier_results_alone(networks):
    """x_adv of the step before, and logits remembered for it, belong to the caller."""
    student, teacher = networks
    machine = engine(FastPath(cuda_graph=True))
    fast_student, fast_teacher = machine.accelerate(student), machine.accelerate(teacher)
    (x, _), (other, _), _ = batches()
    with machine.step():
        first = attacks.adaad(fast_student, fast_teacher, x)
        kept = first.clone()
        attacks.adaad(fast_student, fast_teacher, other)
    assert torch.equal(first, kept)


needs_robustbench = pytest.mark.skipif(importlib.util.find_spec("robustbench") is None, reason="needs robustbench")


def padded_network(dtype=torch.float64):
    """RobustBench's strongest teachers' kind: pads by hand before the first convolution of each block."""
    torch.manual_seed(0)
    network = dm_wide_resnet.build(10, 1, CLASSES).to(dtype)
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(4, 3, 32, 32, dtype=dtype))
    return network.eval()


@pytest.mark.parametrize("own", [pytest.param(False, marks=needs_robustbench), True])
def test_merged_pads_are_the_same_function(own, monkeypatch):
    if own:
        monkeypatch.setattr(dm_wide_resnet, "build", dm_wide_resnet.DMWideResNet)
    network, x = padded_network(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    found = []
    for merge in (False, True):
        fast = Accelerated(network, compiled=False, batch=2, fast_path=FastPath(merge_pads=merge))
        x_in = x.clone().requires_grad_()
        with attacks.frozen(fast):
            logits = fast(x_in)
        pads = [node for node in fast.view.graph.graph.nodes if node.target is nn.functional.pad]
        found.append((len(pads), logits, torch.autograd.grad(logits.square().sum(), x_in)[0]))
    (pads, *plain), (pads_left, *merged) = found
    # Blocks of stride 2 pad one side only, which no convolution does: two of the three stages begin with one.
    assert (pads, pads_left) == (3, 2)
    for ours, expected in zip(merged, plain, strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(merged[0].detach(), network(x), **CLOSE)


@needs_robustbench
def test_the_networks_own_shape_is_robustbenchs():
    theirs, ours = dm_wide_resnet.build(16, 2, CLASSES), dm_wide_resnet.DMWideResNet(16, 2, CLASSES)
    assert type(theirs) is not type(ours)
    shapes = [sorted(tuple(p.shape) for p in network.parameters()) for network in (theirs, ours)]
    assert shapes[0] == shapes[1]
    # With the same weights, in the order of use, the same function.
    layers = [
        [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
        for network in (theirs.eval(), ours.eval())
    ]
    used = []
    for network, own_layers in zip((theirs, ours), layers, strict=True):
        order = []
        hooks = [m.register_forward_hook(lambda m, *_, order=order: order.append(m)) for m in own_layers]
        with torch.no_grad():
            network(torch.rand(1, 3, 32, 32))
        for hook in hooks:
            hook.remove()
        used.append(order)
    for theirs_layer, our_layer in zip(*(sorted(o, key=lambda m: type(m).__name__) for o in used), strict=True):
        our_layer.load_state_dict(theirs_layer.state_dict())
    ours.mean, ours.std = theirs.mean, theirs.std
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["RES-8", "WRN-10-1", "padded"])
def test_stored_weights_are_autocasts_weights(name):
    """The same rounding of the same weights, once a step instead of once a pass; float32 passes know nothing of it.

    Logits and gradients are compared within a bound: autocast and a stored weight may meet different kernels, which
    sum in different orders and round each layer's output to bfloat16, 2^-8 of it, anew. Of logits and gradients as
    vectors, that moves some of these units per layer, and here there are at most ten layers.
    """
    torch.manual_seed(0)
    network = padded_network(torch.float32) if name == "padded" else build_model(name, CLASSES)
    x = torch.rand(4, 3, 32, 32)
    stored, casting = (
        Accelerated(network, compiled=False, batch=4, fast_path=FastPath(stored_weights=on)) for on in (True, False)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        gradients = []
        for fast in (stored, casting):
            x_in = x.clone().requires_grad_()
            with attacks.frozen(fast), torch.autocast("cpu", torch.bfloat16):
                logits = fast(x_in)
                gradients.append((logits, torch.autograd.grad(logits.float().square().sum(), x_in)[0]))
        for ours, expected in zip(*gradients, strict=True):
            assert (ours - expected).norm() <= 10 * 2**-7 * expected.norm()
        with attacks.frozen(stored), torch.no_grad():
            assert torch.equal(stored(x), casting(x))
        network.train()(x).square().mean().backward()
        optimizer.step()  # the stored weights must follow
    with torch.autocast("cpu", torch.bfloat16):
        layers = [m for m in stored.view.graph.modules() if isinstance(m, FrozenLayer)]
    plain = nn.Conv2d | nn.Linear
    assert len(layers) == sum(isinstance(m, plain) for m in network.modules())
    assert all(layer.weight.dtype == torch.bfloat16 for layer in layers)


def test_bfloat16_compiled_is_bfloat16_eager(aot_eager):
    """The pair that GPU training is to run: the same steps, traced and untraced, the odd last batch eager.

    Without autocast's cache of casts: it adds up a weight's gradients over the passes of a step in bfloat16, a graph in
    float32.
    """
    torch.manual_seed(0)
    networks = build_model("RES-8", CLASSES), build_model("RES-8", CLASSES).eval()
    data = batches(torch.float32)
    plain, _, _ = run("adaad_IGDM", networks, FastPath(), data, precision="bf16", autocast_cache=False)
    ours, _, _ = run("adaad_IGDM", networks, FastPath(), data, precision="bf16", compile=1, autocast_cache=False)
    all_of_it, _, _ = run("adaad_IGDM", networks, EVERYTHING, data, precision="bf16", compile=1, autocast_cache=False)
    assert_equal_bits(ours, plain)
    assert_equal_bits(all_of_it, plain)


def test_all_switches_together_equal_the_plain_steps(networks, aot_eager):
    plain, loss, _ = run("adaad_IGDM", networks, FastPath(), batches())
    ours, our_loss, _ = run("adaad_IGDM", networks, EVERYTHING, batches(), compile=1)
    assert our_loss == pytest.approx(loss, rel=1e-9)
    assert_same_network(ours, plain)
