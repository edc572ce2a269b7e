"""Accelerated networks equal the plain ones: logits, input gradients and BatchNorm statistics, in float64.

Whole steps are in test_steps.py. Tolerance: folding and replaying reorder sums; in float64 that leaves some 1e-13.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from reference import CLASSES, CLOSE, assert_same_network, engine, product_run, settings
from torch import nn

import attacks
from cifar100_models import build_model
from experiment import UserError, data, files
from experiment.engine.accelerated import Accelerated, FoldedConv, GraphedStep


def accelerated(model, compiled=False, batch=6):
    return Accelerated(model, compiled=compiled, batch=batch)


def settled(name):
    """A float64 network whose running statistics are not the initial ones."""
    model = build_model(name, CLASSES).double()
    with torch.no_grad():
        for _ in range(5):
            model(torch.rand(8, 3, 8, 8, dtype=torch.float64))
    return model


@pytest.mark.parametrize("name", ["RES-8", "RES-18", "MN-V2", "WRN-10-2"])
def test_folded_view_equals_the_model_and_follows_its_weights(name):
    torch.manual_seed(0)
    model = settled(name)
    fast, x = accelerated(model), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    folded = sum(isinstance(m, FoldedConv) for m in fast.view.graph.modules())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    # In pre-activation blocks only bn2, and the first bn1 of all, follow a convolution that no one else reads.
    assert folded == (norms if not name.startswith("WRN") else 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        plain_x, fast_x = (x.clone().requires_grad_() for _ in range(2))
        with attacks.frozen(fast):
            plain, ours = model(plain_x), fast(fast_x)
            torch.testing.assert_close(ours, plain, **CLOSE)
            gradients = [torch.autograd.grad(z.square().sum(), i)[0] for z, i in ((ours, fast_x), (plain, plain_x))]
            torch.testing.assert_close(*gradients, **CLOSE)
        model.train()
        model(x).square().mean().backward()  # moves the statistics
        optimizer.step()  # and the weights: the view must notice both


class Hooked(nn.Module):
    """weight_norm's hook makes the convolution's weight anew in each pass."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.weight_norm(nn.Conv2d(3, 8, 3))
        self.bn = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.linear(self.bn(self.conv(x)).mean(dim=(2, 3)))


class Noisy(Hooked):
    """A defence by noise, drawn in each pass."""

    def forward(self, x):
        return super().forward(x + torch.randn(3, 8, 8))


class Branches(Hooked):
    """A forward that depends on the data."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("network", [Hooked, Noisy, Branches])
def test_a_network_that_a_view_would_freeze_runs_as_it_is(network):
    model = network()
    if network is not Hooked:
        nn.utils.remove_weight_norm(model.conv)
    wrapped = accelerated(model)
    assert wrapped.view is None
    for seed in (0, 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3)
        x = torch.rand(2, 3, 8, 8)
        model.eval()
        torch.manual_seed(seed)
        expected = model(x)
        torch.manual_seed(seed)
        with torch.no_grad():
            assert torch.equal(wrapped(x), expected)


class SharedConvs(nn.Module):
    """One convolution that is called twice and one whose weight is also read: folding would change every use."""

    def __init__(self):
        super().__init__()
        self.twice, self.read = nn.Conv2d(3, 3, 3), nn.Conv2d(3, CLASSES, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        self.last = nn.BatchNorm2d(CLASSES)

    def forward(self, x):
        for norm in self.norms:
            x = norm(self.twice(x))
        return (self.last(self.read(x)) + F.conv2d(x, self.read.weight)).mean(dim=(2, 3))


def test_a_convolution_with_another_use_is_not_folded():
    torch.manual_seed(0)
    model, x = SharedConvs().double().train(), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    model(x)  # moves the statistics
    fast = accelerated(model.eval())
    assert fast.view is not None
    torch.testing.assert_close(frozen_logits(fast, x), frozen_logits(model, x), **CLOSE)


@pytest.mark.parametrize("layer", [nn.Dropout(), nn.InstanceNorm2d(3, track_running_stats=True)])
def test_a_pass_that_draws_or_counts_is_not_replayed(layer):
    """Two passes of one tensor have two masks, and both move the statistics of a norm that is no BatchNorm."""
    model = nn.Sequential(layer, build_model("RES-8", CLASSES)).train()
    plain, x, fast = copy.deepcopy(model), torch.rand(4, 3, 8, 8), accelerated(model)
    results = []
    for network in (plain, fast):
        torch.manual_seed(0)
        with fast.step():
            results.append([network(x), network(x)])
    torch.testing.assert_close(*results, **CLOSE)
    assert_same_network(model, plain)


def test_weight_gradients_in_eval_mode_are_those_of_the_model():
    model = settled("RES-8").eval()
    fast, x = accelerated(model), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    fast(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_changed_tensor_or_weight_is_no_repetition():
    model = settled("RES-8").eval()
    fast, x = accelerated(model), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with fast.step(), torch.no_grad():
        first = fast(x)
        assert fast(x) is first
        x.mul_(0.5)
        torch.testing.assert_close(fast(x), model(x), **CLOSE)
        model.linear.weight.mul_(2)
        torch.testing.assert_close(fast(x), model(x), **CLOSE)
    with torch.no_grad():
        assert fast(x) is not fast(x)


def frozen_logits(network, x):
    with torch.no_grad(), attacks.frozen(network):
        return network(x)


@pytest.mark.parametrize("replayed", [False, True])
def test_a_train_pass_between_two_eval_passes_is_seen_by_the_second(replayed):
    """Statistics move without a trace in any version, also where the train pass is only repeated from its record."""
    model = settled("RES-8").train()
    fast, x = accelerated(model), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    with fast.step():
        if replayed:
            fast(x)
        before = frozen_logits(fast, x)
        fast(x)
        after = frozen_logits(fast, x)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, frozen_logits(model, x), **CLOSE)
    torch.testing.assert_close(frozen_logits(fast, x), frozen_logits(model, x), **CLOSE)


class TracelessSGD(torch.optim.SGD):
    """Moves weights as fused SGD does on CUDA: their versions stay."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(group["lr"] * parameter.grad)


@pytest.mark.parametrize("inside", [False, True])
def test_an_optimizer_that_leaves_no_trace_is_followed(inside):
    """Within a step and from one to the next; by hook, since versions do not show it."""
    model, machine = settled("RES-8"), engine()
    optimizer = TracelessSGD(model.parameters(), lr=0.1)
    machine.distribute(model, optimizer)
    fast, x = machine.accelerate(model), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    versions = [p._version for p in model.parameters()]

    def move_weights():
        with attacks.frozen(model):
            loss = model.requires_grad_()(x).square().mean()  # eval mode: the statistics stay
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with machine.step():
        before = frozen_logits(fast, x)
        if inside:
            move_weights()
            torch.testing.assert_close(frozen_logits(fast, x), frozen_logits(model, x), **CLOSE)
    move_weights()
    with machine.step():
        after = frozen_logits(fast, x)
    assert [p._version for p in model.parameters()] == versions
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, frozen_logits(model, x), **CLOSE)


@pytest.mark.parametrize(("name", "precision"), [("RES-8", "fp32"), ("WRN-10-1", "fp32"), ("RES-8", "bf16")])
def test_compiled_equals_eager(name, precision, monkeypatch):
    """Through the whole of torch.compile but its code generation, which needs a compiler and a minute.

    In bfloat16 without autocast's cache of casts: it adds up a weight's gradients over the passes of a step in
    bfloat16, a graph in float32.
    """
    torch.compiler.reset()
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: plain_compile(model, backend="aot_eager", **options))
    torch.manual_seed(0)
    dtype = torch.float64 if precision == "fp32" else torch.float32
    networks = settled(name).to(dtype), settled("RES-8").eval().to(dtype)
    batches = [(torch.rand(n, 3, 8, 8, dtype=dtype), torch.randint(CLASSES, (n,))) for n in (6, 6, 4)]  # 4: eager
    students = []
    for compiled in (0, 1):
        student, teacher = copy.deepcopy(networks)
        machine = engine(precision=precision, compile=compiled)

        @contextmanager
        def step(machine=machine):
            with machine.step():
                torch.set_autocast_cache_enabled(False)
                yield

        torch.manual_seed(5)
        around = {"wrap": machine.accelerate, "around": step}
        product_run("adaad_IGDM", student, teacher, batches, settings("adaad_IGDM"), **around)
        students.append(student)
    assert_same_network(*students)


def test_bfloat16_stays_near_float32(networks, batches):
    """bfloat16 keeps 8 bits: logits of a small ResNet are within some per cent of their spread; losses likewise."""
    student, teacher = (network.float() for network in networks)
    machine = engine(precision="bf16")
    fast_student, fast_teacher = machine.accelerate(student), machine.accelerate(teacher)
    x = batches[0][0].float()
    with attacks.frozen(student), torch.no_grad():
        for fast, plain in ((fast_student, student), (fast_teacher, teacher)):
            with machine.step():
                ours = fast(x)
            exact = plain(x)
            assert ours.dtype == torch.bfloat16
            assert (ours.float() - exact).abs().max() < 0.05 * (exact.max() - exact.min())


def test_evaluation_of_a_bfloat16_run_is_in_float32(networks, batches):
    student = networks[0].float()
    fast = engine(precision="bf16").accelerate(student)
    x = batches[0][0].float()
    with attacks.frozen(student), torch.no_grad():
        torch.testing.assert_close(fast(x), student(x), rtol=1e-4, atol=1e-5)  # float32 rounding over 8 layers


@pytest.mark.parametrize(("flag", "rank", "index"), [("cuda", None, 0), ("cuda", "2", 2), ("cuda:1", None, 1)])
def test_cuda_without_a_number_is_a_device_with_one(flag, rank, index, monkeypatch):
    """set_device takes no other: the one thing of a start on a GPU that a machine without one can show."""
    chosen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert engine(device=flag).device == torch.device("cuda", index)
    assert chosen == [index]


@pytest.mark.parametrize(
    ("flag", "gpus", "said"),
    [
        ("cuda:1", 2, "--device cuda:1 with 2 processes: use --device cuda"),
        ("cuda", 1, "started 2 processes, but torch sees 1 GPU"),
    ],
)
def test_processes_that_would_share_a_gpu_are_an_error(flag, gpus, said, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(UserError, match=said):
        engine(device=flag)


def test_a_ranks_usual_batch_is_its_own_share():
    """Of 128 images three ranks get 42, 43 and 43: each is compiled for its own."""
    images, shares = data.load_data("digits"), []
    for rank in range(3):
        one = engine(batch=128)
        one.world, one.rank = 3, rank
        x, *_ = next(images.batches(128, 0, 1, rank=rank, world=3))
        assert one.accelerate(build_model("RES-8", CLASSES)).batch == len(x)
        shares.append(len(x))
    assert shares == [42, 43, 43]


@pytest.mark.parametrize("broken", [None, "frozen", "train"])
def test_a_compiled_network_that_computes_something_else_is_an_error(broken, networks, monkeypatch):
    """Either kind of pass; what is compared leaves weights, statistics and random numbers as they were."""
    torch.compiler.reset()

    def compiled(model, **_):
        def run(x):
            logits = model(x)
            kind = "train" if isinstance(model, nn.Module) and model.training and logits.grad_fn else "frozen"
            return logits.flip(1) if kind == broken else logits

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    student, teacher = networks
    machine = engine(compile=1)
    for network in (student.train(), teacher):
        machine.accelerate(network)
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    before, state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    if broken:
        with pytest.raises(UserError, match=r"--compile 1 is not allowed here: .* differ by .* of their range"):
            machine.check_compiled(x)
    else:
        machine.check_compiled(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert student.training
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name


# An attack's step on a CUDA graph's static buffers; the capture itself is tested in test_gpu.py


def graphed(networks):
    """An engine whose steps use the graph's buffers, as it does on CUDA with --compile 1; and both fast networks."""
    machine = engine()
    fast = [machine.accelerate(network) for network in networks]
    machine._attack_step = GraphedStep(fast, 6)
    return machine, *fast


def stepped(method, networks, batches, *flags, graph):
    """The student after the method's steps, and the number of captured steps."""
    student, teacher = copy.deepcopy(networks)
    machine, fast_student, fast_teacher = graphed((student, teacher))
    step = machine._attack_step
    if not graph:
        machine._attack_step = None
    fast = {id(student): fast_student, id(teacher): fast_teacher}
    torch.manual_seed(5)
    around = {"wrap": lambda model: fast[id(model)], "around": machine.step}
    product_run(method, student, teacher, batches, settings(method, *flags), **around)
    return student, len(step._captured)


@pytest.mark.parametrize(
    ("method", "flags", "captured"),
    [
        ("ard_IGDM", (), 1),
        ("rslad", (), 1),
        ("adaad_IGDM", (), 1),
        ("adaad_IGDM", ("--attack", "igdm"), 1),
        ("adaad", ("--teacher_every", "3"), 0),  # its objective keeps the teacher's logits from step to step
    ],
)
def test_replayed_buffers_are_the_same_step(method, flags, captured, networks, batches):
    plain, _ = stepped(method, networks, batches, *flags, graph=False)
    ours, found = stepped(method, networks, batches, *flags, graph=True)
    assert found == captured
    assert files.state_sha256(ours) == files.state_sha256(plain)


def test_a_replay_leaves_earlier_results_alone(networks):
    """x_adv of the step before, and logits remembered for it, belong to the caller."""
    machine, student, teacher = graphed(networks)
    x, other = torch.rand(2, 6, 3, 8, 8, dtype=torch.float64)
    with machine.step():
        first = attacks.adaad(student, teacher, x)
        kept = first.clone()
        attacks.adaad(student, teacher, other)
    assert torch.equal(first, kept)
