"""Evaluation: closed forms, what it leaves untouched, AutoAttack's chunks, and evaluate.py."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attacks
import evaluate
from cifar100_models import build_model
from experiment import UserError, cli, compat, evaluation, files
from experiment.evaluation import chunks, driver

ROOT = Path(__file__).parents[1]
EPSILON = 0.05


def tiny_network(classes=10, seed=0):
    """A smooth little network on 3x8x8 images; large weights, so that small perturbations matter."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Softplus(), nn.Flatten(), nn.Linear(72, classes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    return network.eval()


class Masked(nn.Module):
    """A tiny network behind a rounding that has no gradient."""

    def __init__(self):
        super().__init__()
        self.network = tiny_network()

    def forward(self, x):
        return self.network((x * 64).round() / 64)


def labelled(network, count=12, wrong=2, seed=1):
    """Random uint8 images, labelled as the network sees them, but for the last `wrong`."""
    x = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    y = network(x / 255).argmax(dim=1)
    y[count - wrong :] = (y[count - wrong :] + 1) % 10
    return x, y


def without_seconds(result):
    return {name: value for name, value in result.items() if "seconds" not in name}


@pytest.fixture
def small(monkeypatch):
    """AutoAttack with few iterations, in place of the package's; the list of its calls (attack, x, x_adv, batch)."""
    published, calls = compat.import_autoattack(), []

    class Small(published):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.apgd.n_iter = self.apgd_targeted.n_iter = 1  # so that FAB-T finds images that they left
            self.fab.n_iter = 4
            self.square.n_queries = 60

        def run_standard_evaluation(self, x, y, /, *, batch_size=250, state_path=None):
            x_adv, y_adv = super().run_standard_evaluation(x, y, batch_size=batch_size)
            calls.append((self.attacks_to_run[0], x, x_adv, batch_size))
            return x_adv, y_adv

    monkeypatch.setattr("pyautoattack.AutoAttack", Small)
    return calls


def replace_run(monkeypatch, run):
    """Let the (small) AutoAttack answer run(adversary, attack, x, y, batch, the real answer)."""
    small_class = compat.import_autoattack()

    class Replaced(small_class):
        def run_standard_evaluation(self, x, y, /, *, batch_size=250, state_path=None):
            def real():
                return small_class.run_standard_evaluation(self, x, y, batch_size=batch_size)

            return run(self.attacks_to_run[0], x, y, batch_size, real)

    monkeypatch.setattr("pyautoattack.AutoAttack", Replaced)


# Accuracies ---------------------------------------------------------------------------------------------------------


def test_attacked_accuracy_of_a_linear_classifier_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3 * 8 * 8, generator=generator)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2, bias=False))
    network[1].weight.data = weight
    x = 0.3 + 0.4 * torch.rand(200, 3, 8, 8, generator=generator)  # the ball stays inside [0, 1]
    y = torch.randint(2, (200,), generator=generator)
    normal = weight[y] - weight[1 - y]
    margin = (x.flatten(1) * normal).sum(dim=1)
    lost = EPSILON * normal.abs().sum(dim=1)  # all that a perturbation can take from the margin
    assert (margin - lost).abs().min() > 1e-3  # no image within rounding of the boundary
    robust = (margin > lost).double().mean().item()
    assert evaluation.accuracy(network, x, y) == (margin > 0).double().mean().item()
    assert 0 < robust < evaluation.accuracy(network, x, y)
    for attacked in (evaluation.fgsm_accuracy, evaluation.pgd_accuracy, evaluation.cw_accuracy):
        assert attacked(network, x, y, EPSILON, batch=64) == robust
        assert attacked(network, x, y, 0.0) == evaluation.accuracy(network, x, y)
    # Eight steps of epsilon / 4 reach the corner from any start in the ball; one cannot from every start.
    assert evaluation.pgd_accuracy(network, x, y, EPSILON, steps=8) == robust
    assert evaluation.pgd_accuracy(network, x, y, EPSILON, steps=1) > robust


def test_bytes_and_floats_and_any_batch_size_give_one_accuracy():
    network = tiny_network()
    x, y = labelled(network, 50, 10)
    assert evaluation.accuracy(network, x, y) == 0.8
    assert evaluation.accuracy(network, x, y, batch=7) == evaluation.accuracy(network, x / 255, y) == 0.8
    assert evaluation.fgsm_accuracy(network, x, y, EPSILON, batch=7) == evaluation.fgsm_accuracy(network, x, y, EPSILON)


def test_random_starts_come_from_the_seed_alone():
    network = nn.Sequential(tiny_network())
    x, y = torch.full((30, 3, 8, 8), 0.5), torch.zeros(30, dtype=torch.int64)
    starts = []
    network.register_forward_pre_hook(lambda _, args: starts.append(args[0].detach().clone()))
    for seed in (3, 3, 4):
        torch.manual_seed(len(starts))
        evaluation.pgd_accuracy(network, x, y, EPSILON, steps=1, batch=16, seed=seed)
    first, second, again, _, other, _ = starts[::2]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:14], second)  # each batch draws its own noise


def test_the_monitor_measures_the_test_set_and_what_was_held_out():
    network = tiny_network()
    x, y = labelled(network, 30, 4)
    images = SimpleNamespace(x_test=x[:20], y_test=y[:20], x_holdout=x[20:], y_holdout=y[20:])
    expected = {
        "clean": 1.0,
        "pgd20": evaluation.pgd_accuracy(network, x[:20], y[:20], 0.01),
        "holdout_pgd10": evaluation.pgd_accuracy(network, x[20:], y[20:], 0.01, steps=10),
    }
    assert evaluation.monitor(network, images, 0.01) == expected
    assert 0 < expected["holdout_pgd10"] < 0.6 < expected["pgd20"] < 1
    images.x_holdout, images.y_holdout = x[:0], y[:0]
    assert list(evaluation.monitor(network, images, 0.01)) == ["clean", "pgd20"]


def test_the_interval_of_wilson_is_the_one_of_scipy():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for correct, examples in [(0, 5), (5, 5), (3, 7), (2799, 10000)]:
        theirs = binomtest(correct, examples).proportion_ci(0.95, method="wilson")
        # z is given with seven digits.
        assert evaluation.wilson_interval(correct, examples) == pytest.approx((theirs.low, theirs.high), abs=1e-7)


class Stateful(nn.Module):
    """BatchNorm and dropout, with submodules in different modes, frozen and unfrozen parameters, and a gradient."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
        self.head = nn.Linear(4 * 36, 10)
        self.train()
        self.features[2].eval()
        self.head.bias.requires_grad_(False)
        self.head.weight.grad = torch.ones_like(self.head.weight)

    def forward(self, x):
        return self.head(self.features(x))

    def facts(self):
        modes = [module.training for module in self.modules()]
        grads = [(p.requires_grad, None if p.grad is None else p.grad.sum().item()) for p in self.parameters()]
        return modes, grads, files.state_sha256(self), torch.get_rng_state().tolist()


@pytest.mark.parametrize("measure", ["accuracy", "fgsm", "pgd", "cw", "autoattack", "gradient_alignment"])
def test_nothing_is_left_behind(measure, small):
    torch.manual_seed(0)
    network, teacher = Stateful(), Stateful()
    x = torch.rand(6, 3, 8, 8)
    with attacks.frozen(network):
        y = network(x).argmax(dim=1)
    before = network.facts(), teacher.facts(), x.clone()
    if measure == "accuracy":
        evaluation.accuracy(network, x, y)
    elif measure == "gradient_alignment":
        evaluation.gradient_alignment(network, teacher, x, y)
    elif measure == "autoattack":
        evaluation.autoattack(network, x, y, EPSILON, show_progress=False)
    else:
        getattr(evaluation, f"{measure}_accuracy")(network, x, y, EPSILON)
    assert (network.facts(), teacher.facts()) == before[:2]
    assert torch.equal(x, before[2])
    assert torch.is_grad_enabled()


def test_state_is_restored_when_the_network_raises():
    network = Stateful()
    images, labels = torch.rand(2, 5, 8, 8), torch.zeros(2, dtype=torch.int64)
    before = network.facts()
    with pytest.raises(RuntimeError, match="channels"):
        evaluation.pgd_accuracy(network, images, labels, EPSILON)
    assert network.facts() == before


GOOD = torch.full((2, 3, 8, 8), 0.5)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (GOOD * 3, torch.tensor([0, 1]), "pixels from 1.5 to 1.5"),
        (GOOD - 0.6, torch.tensor([0, 1]), "pixels from -0.1"),
        (GOOD * float("nan"), torch.tensor([0, 1]), "pixels from nan"),
        (GOOD.long(), torch.tensor([0, 1]), "torch.int64"),
        (GOOD, torch.tensor([0]), "labels"),
        (GOOD, torch.tensor([0, -1]), "from -1"),
        (GOOD, torch.tensor([0.0, 1.0]), "torch.float32"),
        (GOOD[:0], torch.tensor([], dtype=torch.int64), "(0, 3, 8, 8)"),
        (GOOD[0], torch.tensor([0, 1, 2]), "(3, 8, 8)"),
    ],
)
def test_images_and_labels_out_of_range_are_refused(x, y, said):
    for measure in (evaluation.accuracy, lambda *a: evaluation.autoattack(*a, EPSILON)):
        with pytest.raises(UserError) as caught:
            measure(tiny_network(), x, y)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_network_that_is_broken_or_changes_its_mode_gets_no_accuracy():
    x, y = labelled(tiny_network())
    broken = tiny_network()
    broken[3].weight.data[4, 4] = float("nan")
    for measure in (evaluation.accuracy, lambda *a: evaluation.autoattack(*a, EPSILON, show_progress=False)):
        with pytest.raises(UserError, match="NaN or infinite logits"):
            measure(broken, x, y)
    switching = nn.Sequential(tiny_network())
    switching.register_forward_pre_hook(lambda module, _: module.train() and None)
    with pytest.raises(RuntimeError, match="train mode"):
        evaluation.accuracy(switching, x, y)


# A second opinion ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchattacks():
    with warnings.catch_warnings():
        # requests 2.25.1, which torchattacks pins, complains about the versions of chardet and urllib3.
        warnings.simplefilter("ignore")
        import torchattacks
    return torchattacks


def test_fgsm_and_pgd_agree_with_torchattacks(torchattacks):
    network = tiny_network()
    x, y = labelled(network, 16)
    x = x / 255
    theirs = torchattacks.FGSM(network, eps=EPSILON)(x, y)
    # The ball is cut in another order there (x + clamp(x_adv - x)): one rounding of 2^-24 per operation.
    torch.testing.assert_close(attacks.fgsm(network, x, y, EPSILON), theirs, rtol=0, atol=1e-6)
    for random_start in (False, True):
        attack = torchattacks.PGD(network, eps=EPSILON, alpha=EPSILON / 4, steps=20, random_start=random_start)
        torch.manual_seed(5)
        theirs = attack(x, y)
        torch.manual_seed(5)  # both draw uniform noise of x's shape once
        ours = attacks.pgd(network, x, y, EPSILON, EPSILON / 4, 20, random_start)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# Gradient alignment -------------------------------------------------------------------------------------------------


def test_identical_networks_are_aligned():
    network = tiny_network()
    x, y = labelled(network, 20, 5)
    aligned = evaluation.gradient_alignment(network, network, x, y, batch=8)
    assert aligned["gd"] == 0
    assert aligned["gc"] == pytest.approx(1, abs=1e-12)  # rounding of float64


def test_alignment_of_linear_softmax_models_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(9, 3, 8, 8, generator=generator)
    y = torch.randint(10, (9,), generator=generator)
    networks, gradients = [], []
    for _ in range(2):
        weight = 0.1 * torch.randn(10, 192, generator=generator)
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10, bias=False))
        network[1].weight.data = weight
        p = F.softmax(x.flatten(1).double() @ weight.double().T, dim=1)
        # d p_y / d x = p_y (w_y - sum_k p_k w_k)
        gradients.append(p.gather(1, y[:, None]) * (weight[y].double() - p @ weight.double()))
        networks.append(network)
    found = evaluation.gradient_alignment(*networks, x, y, batch=4)
    # The networks compute in float32: six to seven digits.
    assert found["gd"] == pytest.approx((gradients[0] - gradients[1]).norm(dim=1).mean().item(), rel=1e-5)
    assert found["gc"] == pytest.approx(F.cosine_similarity(*gradients).mean().item(), rel=1e-5)


def test_a_gradient_of_zero_counts_as_cosine_zero():
    constant = tiny_network()
    constant[3].weight.data.zero_()
    x, y = labelled(tiny_network())
    assert evaluation.gradient_alignment(constant, tiny_network(), x, y)["gc"] == 0
    assert evaluation.gradient_alignment(constant, constant, x, y) == {"gd": 0, "gc": 0}


# AutoAttack ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "breaking"), [(tiny_network, "apgd-ce apgd-t fab-t"), (Masked, "apgd-t square")])
def test_one_attack_at_a_time_is_the_standard_run_bit_for_bit(small, build, breaking):
    network = build()
    x, y = labelled(network, 60, 5)
    result = evaluation.autoattack(network, x, y, 0.01, seed=7, show_progress=False)
    left, broke = result["clean"], []
    for attack, robust in result["attacks"].items():
        broke += [attack] if robust < left else []
        left = robust
    assert " ".join(broke) == breaking, "the comparison needs images that fall to different attacks"
    assert result["accuracy"] == left > 0

    rows = {image.numpy().tobytes(): i for i, image in enumerate(x / 255)}
    assembled = x / 255
    for _, images, x_adv, _ in small:
        assembled[[rows[image.numpy().tobytes()] for image in images]] = x_adv
    adversary = compat.import_autoattack()(network, norm="Linf", eps=0.01, seed=7, version="standard")
    with attacks.frozen(network):
        x_adv, y_adv = adversary.run_standard_evaluation(x / 255, y, batch_size=250)
    assert torch.equal(assembled, x_adv)
    assert result["accuracy"] == (y_adv == y).double().mean().item()


def test_the_result_says_what_was_measured(small, capsys):
    network = tiny_network()
    x, y = labelled(network, 10, 2)
    result = evaluation.autoattack(network, x, y, EPSILON, batch=4, seed=7)
    assert result["clean"] == 0.8
    assert result["student_sha256"] == files.state_sha256(network)
    assert (result["examples"], result["batch"], result["seed"], result["epsilon"]) == (10, 4, 7, EPSILON)
    assert (result["version"], result["package"]) == ("standard", "pyautoattack 0.2.0")
    assert list(result["attacks"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(result["flags"]) == ["clean", *result["attacks"]]
    assert result["flags"]["clean"] == "1111111100"
    for name, share in result["attacks"].items():
        assert result["flags"][name].count("1") / 10 == share
    assert result["interval"] == [*evaluation.wilson_interval(round(10 * result["accuracy"]), 10)]
    assert result["seconds"] == pytest.approx(sum(result["attack_seconds"].values()))
    assert json.loads(json.dumps(result)) == result
    printed = capsys.readouterr().err
    assert "seed 7" in printed
    assert "10 of 10 images" in printed


class Interrupted(Exception):
    pass


def test_resume_attacks_nothing_twice_and_ends_the_same(small, tmp_path, monkeypatch):
    network = tiny_network()
    x, y = labelled(network, 11, 1)

    def run(folder):
        return evaluation.autoattack(network, x, y, 0.002, folder=folder, batch=3, show_progress=False)

    def seen():
        images = {image.numpy().tobytes() for _, images, *_ in small for image in images}
        small.clear()
        return images

    whole = run(tmp_path / "whole")
    everything = seen()
    with monkeypatch.context() as patch:

        def stop_in_third_chunk(attack, images, labels, batch, real):
            if attack == "apgd-t" and (images == x[6] / 255).flatten(1).all(dim=1).any():
                raise Interrupted
            return real()

        replace_run(patch, stop_in_third_chunk)
        with pytest.raises(Interrupted):
            run(tmp_path / "cut")
    before = seen()
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == ["chunk-00000.json", "chunk-00001.json"]
    resumed = run(tmp_path / "cut")
    after = seen()
    assert without_seconds(resumed) == without_seconds(whole)
    assert before | after == everything
    # Only the chunk that was cut is seen again.
    assert before & after <= {image.numpy().tobytes() for image in x[6:9] / 255}

    again = run(tmp_path / "cut")
    assert again == resumed  # seconds too: they are those of the attacks, not of the reading
    assert not seen()
    (tmp_path / "cut" / "chunk-00001.json").unlink()
    assert without_seconds(run(tmp_path / "cut")) == without_seconds(whole)
    assert seen() <= {image.numpy().tobytes() for image in x[3:6] / 255}


def test_chunks_without_flags_are_attacked_again(small, tmp_path, capsys):
    """Runs that began before every image had its flag go on."""
    network = tiny_network()
    x, y = labelled(network, 6, 1)
    expected = evaluation.autoattack(network, x, y, EPSILON, folder=tmp_path, batch=3, show_progress=False)
    path = tmp_path / "chunk-00001.json"
    record = files.read_json(path)["record"]
    counts = {name: flags.count("1") for name, flags in record.pop("flags").items()}
    chunks.write_chunk(path, files.read_json(path)["parts"], {**record, "clean": counts.pop("clean"), "robust": counts})
    found = evaluation.autoattack(network, x, y, EPSILON, folder=tmp_path, batch=3)
    assert without_seconds(found) == without_seconds(expected)
    assert "1 chunks are of an older format" in capsys.readouterr().err


def test_results_of_different_runs_are_not_mixed(small, tmp_path):
    network, other = tiny_network(), tiny_network()
    other[3].bias.data[0] += 1e-3
    x, y = labelled(network, 6, 1)
    y_other, x_other = y.clone(), x.clone()
    y_other[5] = (y[5] + 1) % 10
    x_other[4, 0, 0, 0] ^= 1
    standard = {"model": network, "x": x, "y": y, "epsilon": EPSILON, "seed": 0, "batch": 3}

    def run(**changed):
        settings = {**standard, **changed}
        positional = [settings.pop(name) for name in ("model", "x", "y", "epsilon")]
        return evaluation.autoattack(*positional, folder=tmp_path, show_progress=False, **settings)

    expected = run()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    small.clear()
    for changed, named in [
        ({"model": other}, "student"),
        ({"epsilon": 0.04}, "epsilon"),
        ({"seed": 1}, "seed"),
        ({"y": y_other}, "data"),
        ({"x": x_other}, "data"),
        ({"batch": 6}, "chunk size and data"),
    ]:
        with pytest.raises(UserError, match=f"of another {named}; results are not mixed"):
            run(**changed)
    assert not small
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert run(x=x / 255) == expected  # the same images as floats are the same data

    path = tmp_path / "chunk-00001.json"
    for damaged in (files[path].replace(b'"clean": "110"', b'"clean": "111"'), files[path][:-20], b"[1]", b"{}"):
        assert damaged != files[path]
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"chunk-00001\.json"):
            run()
        assert path.read_bytes() == damaged


def test_an_answer_that_does_not_hold_is_an_error(small, monkeypatch):
    network = tiny_network()
    x, y = labelled(network, 6, 1)
    x[0] = 0  # black pixels, to leave [0, 1] inside the ball

    def run():
        return evaluation.autoattack(network, x, y, EPSILON, show_progress=False)

    def claim_more(attack, images, labels, batch, real):
        return images, (labels + 1) % 10

    def leave_ball(attack, images, labels, batch, real):
        return (images + EPSILON + 3e-6 * images.lt(0.5)).clamp(0, 1), labels

    def leave_range(attack, images, labels, batch, real):
        return images - 1e-4, labels

    def give_nan(attack, images, labels, batch, real):
        return images * float("nan"), labels

    y[0] = network(torch.zeros(1, 3, 8, 8)).argmax()
    for answer, said in [
        (claim_more, "differs from AutoAttack's on 5 of 5 images"),
        (leave_ball, "left the ball"),
        (leave_range, r"left \[0, 1\]"),
        (give_nan, "left the ball"),
    ]:
        with monkeypatch.context() as patch:
            replace_run(patch, answer)
            with pytest.raises(RuntimeError, match=said):
                run()


def test_a_network_in_parts_has_the_gradients_of_the_whole():
    """In float64, so that rounding stays far below the tolerance; 7 images by 3 leave an odd part."""
    network, x = tiny_network().double().eval(), torch.rand(7, 3, 8, 8, dtype=torch.float64)
    whole, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
    logits = driver._FewAtOnce(network, 3)(parts)
    torch.testing.assert_close(logits, network(whole), rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(logits)
    for _ in range(2):  # FAB keeps the graph for a backward pass per class
        (found,) = torch.autograd.grad(logits, parts, weights, retain_graph=True)
        (expected,) = torch.autograd.grad(network(whole), whole, weights)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


OUT_OF_MEMORY = (
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    (RuntimeError, "GET was unable to find an engine to execute this computation"),
    (torch.AcceleratorError, "CUDA error: out of memory"),
)
"""The shapes in which torch says that memory does not suffice: its allocator, cuDNN, CUDA."""


class SmallMemory(nn.Module):
    """A network that fits into the device's memory with so many images at most."""

    def __init__(self, network, most):
        super().__init__()
        self.network, self.most, self.sizes, self.shape = network, most, [], 0

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            self.shape += 1
            kind, text = OUT_OF_MEMORY[self.shape % len(OUT_OF_MEMORY)]
            raise kind(text)
        return self.network(x)


def test_autoattack_does_not_depend_on_the_memory(small, monkeypatch, tmp_path, capsys):
    """Out of memory, the network sees fewer images at once; the attack's batch, hence its random numbers, stay."""
    torch.manual_seed(0)
    network = tiny_network()
    x, y = labelled(network, 12, 0)
    roomy, tight = SmallMemory(network, 12), SmallMemory(network, 3)
    expected = evaluation.autoattack(roomy, x, y, 0.03)
    in_one_go = list(small)
    small.clear()
    capsys.readouterr()
    found = evaluation.autoattack(tight, x, y, 0.03, folder=tmp_path)
    assert found["attacks"] == expected["attacks"]
    assert 0 < found["accuracy"] < 1
    # The package was given the same images in the same batches: each attack, those that the ones before left.
    assert len(small) == len(in_one_go)
    for (name, given, _, batch), (its_name, its_given, _, its_batch) in zip(small, in_one_go, strict=True):
        assert (name, batch) == (its_name, its_batch)
        assert torch.equal(given, its_given)
    assert [size for size in tight.sizes if size > 3] == [12, 6]
    said = capsys.readouterr().err
    assert "out of memory with 12 images at once; again with 6" in said
    assert "out of memory with 6 images at once; again with 3" in said
    assert found["warnings"] == expected["warnings"]

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    replace_run(monkeypatch, no_room)
    with pytest.raises(UserError, match="even one by one"):
        evaluation.autoattack(network, x, y, 0.03)


def test_autoattack_runs_under_its_own_switches(small, monkeypatch):
    """Deterministic where torch can, no tuning of kernels for sizes that come once; restored after a fault, too."""

    def switches():
        return (
            torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    seen = []

    def look(attack, images, labels, batch, real):
        seen.append(switches())
        if attack == "fab-t":
            raise ZeroDivisionError
        return real()

    network = tiny_network()
    x, y = labelled(network, 4, 0)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True)
    try:
        with monkeypatch.context() as patch:
            replace_run(patch, look)
            with pytest.raises(ZeroDivisionError):
                evaluation.autoattack(network, x, y, 1e-4)
        assert switches() == (True, True, False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(False, True, True)] * 3


def test_signs_of_gradient_masking_are_reported(small, monkeypatch, capsys):
    network = tiny_network()
    x, y = labelled(network, 12, 0)

    result = evaluation.autoattack(Masked(), *labelled(Masked()), EPSILON, show_progress=False)
    assert any("zero gradient" in warning for warning in result["warnings"])

    def blind_white_box(attack, images, labels, batch, real):
        return real() if attack == "square" else (images, labels)

    with monkeypatch.context() as patch:
        replace_run(patch, blind_white_box)
        masked = evaluation.autoattack(network, x, y, 0.1)
    assert masked["attacks"]["fab-t"] == 1
    assert masked["accuracy"] < 0.9
    assert any(warning.startswith("Square") for warning in masked["warnings"])
    assert "warning: AutoAttack: Square" in capsys.readouterr().err
    honest = evaluation.autoattack(network, x, y, 0.1, show_progress=False)
    assert not any(warning.startswith("Square") for warning in honest["warnings"])


def test_what_autoattack_cannot_measure_is_refused():
    x, y = labelled(tiny_network())
    for network, epsilon, said in [
        (tiny_network(classes=9), EPSILON, "at least 10 classes"),
        (tiny_network().double(), EPSILON, "float32"),
        (tiny_network(), 0.0, "epsilon 0"),
        (tiny_network(), 8.0, "epsilon 8"),
    ]:
        with pytest.raises(UserError, match=said):
            evaluation.autoattack(network, x, y, epsilon)
    with pytest.raises(UserError, match="label 10"):
        evaluation.autoattack(tiny_network(), x, y.clamp(min=10), EPSILON)


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{shared}", rank=rank, world_size=2)
from test_evaluation import EPSILON, labelled, tiny_network
from experiment import compat, evaluation
published = compat.import_autoattack()
class Small(published):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.apgd.n_iter = self.apgd_targeted.n_iter = 1
        self.fab.n_iter = 4
        self.square.n_queries = 60
import pyautoattack
pyautoattack.AutoAttack = Small
network = tiny_network()
x, y = labelled(network, 11, 1)
print(evaluation.pgd_accuracy(network, x, y, EPSILON, steps=3, batch=4))
print(evaluation.accuracy(network, x, y))  # one batch: the second rank has none
result = evaluation.autoattack(network, x, y, EPSILON, folder={folder!r}, batch=3, show_progress=False)
print({{name: value for name, value in result.items() if "seconds" not in name}})
dist.destroy_process_group()
"""


def test_two_ranks_share_the_work_and_agree_with_one(small, tmp_path):
    network = tiny_network()
    x, y = labelled(network, 11, 1)
    script = tmp_path / "rank.py"
    names = {"root": str(ROOT), "tests": str(ROOT / "tests"), "shared": tmp_path / "shared"}
    script.write_text(TWO_RANKS.format(**names, folder=str(tmp_path / "chunks")))
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank)], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        for rank in range(2)
    ]
    expected = (
        f"{evaluation.pgd_accuracy(network, x, y, EPSILON, steps=3, batch=4)}\n{evaluation.accuracy(network, x, y)}\n"
        f"{without_seconds(evaluation.autoattack(network, x, y, EPSILON, batch=3, show_progress=False))}\n"
    )
    assert [process.communicate(timeout=100)[0] for process in ranks] == [expected, expected]
    assert len(list((tmp_path / "chunks").iterdir())) == 4


# evaluate.py --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a run on digits whose student was never trained, and a teacher of the same kind."""
    for name, seed in (("run", 0), ("teacher", 1)):
        torch.manual_seed(seed)
        model = build_model("RES-8", 10)
        (tmp_path / name).mkdir()
        files.save_student(tmp_path / name / "student.pt", model, "RES-8", 10, {})
        files.write_json(tmp_path / name / "result.json", {"student_sha256": files.state_sha256(model)})
    settings = {"dataset": "digits", "epsilon": 0.1, "teacher": str(tmp_path / "teacher"), "seed": 3, "aa_examples": 6}
    files.write_json(tmp_path / "run" / "config.json", {"settings": settings})
    return tmp_path / "run"


def evaluate_with(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    cli.guard(evaluate.main)


def test_evaluate_a_run_folder(small, run_folder, monkeypatch, capsys):
    before = (run_folder / "result.json").read_bytes()
    evaluate_with(monkeypatch, run_folder, "--examples", "30", "--device", "cpu")
    printed = capsys.readouterr().out
    written = files.read_json(run_folder / "evaluation.json")
    assert (run_folder / "result.json").read_bytes() == before
    assert written["settings"]["epsilon"] == 0.1
    assert written["autoattack"]["seed"] == 3
    assert written["autoattack"]["examples"] == 6
    assert written["test_examples"] == 30
    for name in ("clean", "fgsm", "pgd20", "cw30"):
        assert f"{100 * written[name]:.2f} %" in printed
    assert f"{100 * written['autoattack']['accuracy']:.2f} % of 6 images" in printed
    assert evaluation.GRADIENT_DEFINITION in printed
    assert -1 <= written["gradients"]["gc"] <= 1

    # Again, and something else: written anew; one file of another name in the same format is a checkpoint too.
    (run_folder / "student.pt").rename(run_folder / "best.pt")
    arguments = (run_folder / "best.pt", "--dataset", "digits", "--attacks", "clean", "--examples", "30")
    evaluate_with(monkeypatch, *arguments, "--device", "cpu")
    anew = files.read_json(run_folder / "evaluation.json")
    assert anew["clean"] == written["clean"]
    assert "pgd20" not in anew


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attacks", "deepfool"], "'deepfool'"),
        (["--eps", "0.1"], "--eps"),
        (["--epsilon", "8"], "'8' is not allowed"),
        (["--dataset", "nothing"], "'nothing'"),
        (["--teacher", "nobody"], "'nobody'"),
        (["--examples", "0"], "'0' is not allowed"),
    ],
)
def test_evaluate_refuses_in_one_line(run_folder, monkeypatch, capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        evaluate_with(monkeypatch, run_folder, *arguments, "--device", "cpu")
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line
    assert not (run_folder / "evaluation.json").exists()


def test_evaluate_refuses_what_does_not_go_together(run_folder, monkeypatch, capsys):
    other = run_folder / "other.pt"
    files.save_student(other, build_model("RES-8", 7), "RES-8", 7, {})
    config = json.loads((run_folder / "config.json").read_text())
    config["settings"]["epsilon"] = "lots"
    (run_folder / "config.json").write_text(json.dumps(config))
    for arguments, said in [
        ((other, "--dataset", "digits"), "has 7 classes but digits has 10"),
        ((other, "--dataset", "digits", "--attacks", "gradients"), "give --teacher"),
        ((run_folder,), "'lots' is not allowed"),
        ((run_folder.parent / "nowhere",), "nowhere"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            evaluate_with(monkeypatch, *arguments)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_evaluate_a_file_with_the_settings_of_its_run(run_folder, monkeypatch, tmp_path):
    """A student.pt tells them itself, wherever it lies; a last.pt lies beside its run's config.json."""
    arguments = ("--attacks", "clean", "--examples", "20", "--device", "cpu")
    model = build_model("RES-8", 10)
    (tmp_path / "away").mkdir()
    info = {"settings": {"dataset": "digits", "epsilon": 0.2, "teacher": None}}
    files.save_student(tmp_path / "away" / "student.pt", model, "RES-8", 10, info)
    evaluate_with(monkeypatch, tmp_path / "away" / "student.pt", *arguments)
    moved = files.read_json(tmp_path / "away" / "evaluation.json")
    assert (moved["settings"]["dataset"], moved["settings"]["epsilon"]) == ("digits", 0.2)
    assert "epoch" not in moved

    (run_folder / "student.pt").unlink()
    (run_folder / "result.json").unlink()
    last = {"architecture": "RES-8", "num_classes": 10, "model": model.state_dict(), "optimizer": {}, "epoch": 2}
    files.save(run_folder / "last.pt", {**last, "step": 5})
    for path in (run_folder, run_folder / "last.pt"):
        evaluate_with(monkeypatch, path, *arguments)
        found = files.read_json(run_folder / "evaluation.json")
        assert (found["epoch"], found["step"], found["settings"]["epsilon"]) == (2, 5, 0.1)
        assert found["clean"] == moved["clean"]
        assert found["student_sha256"] == moved["student_sha256"]
        (run_folder / "evaluation.json").unlink()


def test_evaluate_refuses_a_student_that_was_swapped(run_folder, monkeypatch, capsys):
    files.save_student(run_folder / "student.pt", build_model("RES-8", 10), "RES-8", 10, {})
    with pytest.raises(SystemExit) as stopped:
        evaluate_with(monkeypatch, run_folder, "--device", "cpu")
    assert stopped.value.code == 2
    assert "was measured on another student" in capsys.readouterr().err


def test_accuracy_does_not_depend_on_the_memory():
    """A batch that does not fit is evaluated in parts, in which every image keeps its random start."""

    torch.manual_seed(1)
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), torch.rand(23, 3, 8, 8)
    roomy, tight = SmallMemory(network, 23), SmallMemory(network, 3)
    y = roomy(x).argmax(dim=1)
    # One step in a wide ball: which images fall hangs on the random starts.
    by_seed = [evaluation.pgd_accuracy(roomy, x, y, 0.08, steps=1, seed=seed) for seed in range(8)]
    assert [evaluation.pgd_accuracy(tight, x, y, 0.08, steps=1, seed=seed) for seed in range(8)] == by_seed
    assert len(set(by_seed)) > 1
    assert max(roomy.sizes) == 23
    assert sum(size <= 3 for size in tight.sizes) >= 16
    with pytest.raises(UserError, match="even image by image"):
        evaluation.accuracy(SmallMemory(network, 0), x, y)
