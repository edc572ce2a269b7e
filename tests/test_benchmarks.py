"""The benchmarks run at a toy size, write what they promise, and their baseline makes the passes that it must."""

import argparse
import copy
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import (
    dm_wide_resnet,
    evaluation,
    gpu_check,
    measure,
    operations,
    published,
    report,
    training_step,
)
from benchmarks.tricks import TRICKS
from cifar100_models import build_model
from experiment import UserError

TOY = ["--device", "cpu", "--rounds", "2"]
NETWORKS = ["--teacher", "WRN-10-1", "--student", "RES-8"]


@pytest.fixture(autouse=True)
def keep_process_state():
    """The engine sets process-wide switches and seeds."""
    numerics, state = measure.Numerics.current(), torch.get_rng_state()
    yield
    numerics.apply()
    torch.set_rng_state(state)


class Counting(nn.Module):
    """Counts forward passes, and backward passes that reach the input or the weights."""

    def __init__(self, model):
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.ones(()))
        self.forwards = self.to_input = self.to_weights = 0

    def forward(self, x):
        self.forwards += 1
        # Views of this pass alone: a hook on a leaf would see the sum over all passes.
        x, scale = x.view_as(x), self.scale.view(())
        if torch.is_grad_enabled():
            scale.register_hook(lambda _: self._count("to_weights"))
            if x.requires_grad:
                x.register_hook(lambda _: self._count("to_input"))
        return self.model(x) * scale

    def _count(self, name):
        setattr(self, name, getattr(self, name) + 1)


@pytest.mark.parametrize("method", training_step.METHODS)
def test_published_step_makes_the_published_passes(method):
    torch.manual_seed(0)
    student, teacher = Counting(build_model("RES-8", 10)), Counting(build_model("RES-8", 10))
    before = [parameter.clone() for parameter in student.model.parameters()]
    step = training_step.published_step(method, (student, teacher), [(torch.rand(4, 3, 8, 8), torch.randint(10, (4,)))])
    assert math.isfinite(step())
    passes = student.forwards, student.to_input, student.to_weights, teacher.forwards, teacher.to_input
    assert passes == operations.PASSES[method]["published"]
    assert teacher.to_weights == 0
    assert not any(torch.equal(a, b) for a, b in zip(before, student.model.parameters(), strict=True))


class FlopCounter(TorchDispatchMode):
    """torch.utils.flop_counter's formulas alone: its FlopCounterMode cannot follow torch.autograd.grad."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize("method", training_step.METHODS)
def test_counted_operations_are_those_of_a_real_step(method):
    """Passes times layers, against what torch counts while the published step and the product's run."""
    networks = tuple(measure.make_network(name, torch.device("cpu"), 0) for name in ("RES-20", "DM-WRN-10-1"))
    batches = measure.make_batches(2, torch.device("cpu"), 1)
    theirs = training_step.published_step(method, copy.deepcopy(networks), batches)
    ours = training_step.ProductStep(method, copy.deepcopy(networks), batches, "fp32", 0)
    for kind, step in (("published", theirs), ("product", ours)):
        with FlopCounter() as counter:
            step()
        counted = operations.gflop_of_step(method, networks)[kind]
        assert counted == pytest.approx(counter.total / 2 / 1e9, rel=1e-9), kind


def test_published_pgd_stays_in_the_ball_and_counts():
    torch.manual_seed(0)
    model = build_model("RES-8", 10).eval()
    x = torch.rand(4, 3, 8, 8)
    y = model(x).argmax(dim=1)
    moved = published.move(x + 1, x, torch.ones_like(x))
    assert (moved - x).abs().max() <= published.EPSILON + 1e-6
    assert moved.max() <= 1
    for weight_gradients in (False, True):
        assert 0 <= published.pgd_correct(model, x, y, steps=1, weight_gradients=weight_gradients) <= 4


TOPS = [
    {"precision": p, "matmul_tflops": 0.1, "convolution_tflops": 0.2, "copy_gb_per_second": 10.0}
    for p in ("fp32", "bf16")
]


def run(module, monkeypatch, tmp_path, *flags):
    """The JSON that the benchmark writes."""
    out = tmp_path / "out.json"
    name = module.__name__.rpartition(".")[2]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *TOY, *flags, "--out", str(out)])
    # Ceilings take seconds, and say nothing about the report.
    monkeypatch.setattr(measure, "ceilings", lambda *_: TOPS)
    module.main()
    found = json.loads(out.read_text())
    assert found["benchmark"] == name
    assert f"python -m benchmarks.{name} --device cpu" in found["command"]
    assert "--out" not in found["command"]
    assert {"hardware", "threads", "torch", "python", "commit", "format"} <= set(found)
    return found


def check_speed(row, images):
    low, high = row["images_per_second_quartiles"]
    assert 0 < low <= row["images_per_second"] <= high
    assert row["images_per_second"] == pytest.approx(images / torch.tensor(row["seconds"]).quantile(0.5).item())


def test_training_step(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training_step, "EPOCH_IMAGES", 64)
    flags = ["--methods", "rslad_IGDM", "--batch", "2", "--profile", "1", "--overhead", "1", "--batches", "2", "3"]
    flags += ["--count", "WRN-10-1"]
    found = run(training_step, monkeypatch, tmp_path, *NETWORKS, *flags)
    first, second = found["rows"]
    assert (first["step"], second["step"]) == ("published", "product")
    assert first["ratio"] == 1
    for row in (first, second):
        check_speed(row, 2)
        assert row["tflops"] == pytest.approx(row["gflop_per_image"] * row["images_per_second"] / 1e3)
        assert row["share_of_peak"] == pytest.approx(row["tflops"] / 0.2)
        assert row["peak_memory_gib"] is None  # on the CPU
    assert second["ratio"] == pytest.approx(second["images_per_second"] / first["images_per_second"])
    shares = {row["name"]: row["share"] for row in found["profile"]}
    assert len([name for name in shares if name.startswith("`")]) == 10
    assert all(share > 0 for share in shares.values())
    assert [(row["processes"], row["batch"]) for row in found["batches"]] == [(1, 2), (1, 3)]
    for row in found["batches"]:
        check_speed(row, row["batch"])
    assert [row["part"] for row in found["overhead"]] == ["step", "data", "logging"]
    for row in found["operations"]:  # rslad has no term without weight, and no pass twice
        assert (row["product"] < row["published"]) == (row["method"] != "rslad")
    assert "| rslad_IGDM, product, fp32, eager |" in capsys.readouterr().out


def test_evaluation(monkeypatch, tmp_path):
    """torchattacks' PGD takes its turn on the same batches."""
    flags = ["--student", "RES-8", "--examples", "2", "--batch", "2", "--product_batch", "2", "--aa_examples", "0"]
    found = run(evaluation, monkeypatch, tmp_path, *flags)
    steps = [row["step"] for row in found["pgd20"]]
    assert steps == [
        "published order, loss.backward()",
        "published order, autograd.grad",
        "torchattacks' PGD",
        "product, fp32",
    ]
    for row in found["pgd20"]:
        check_speed(row, 2)
        assert row["ratio"] > 0


def test_autoattack_takes_turns_with_robustbenchs_loop(monkeypatch):
    """AutoAttack itself takes minutes; what matters here is who is asked for what, and what becomes of the result."""
    seconds = dict.fromkeys(evaluation.evaluation.AUTOATTACK, 2.0)
    result = {"examples": 4, "seconds": 8.0, "attack_seconds": seconds, "accuracy": 1.0}
    asked = []

    def ours(model, x, y, epsilon, *, batch, **_):
        asked.append(("product", len(x), epsilon, batch))
        time.sleep(0.01)
        return result

    def theirs(model, x, y, epsilon, batch):
        asked.append(("robustbench", len(x), epsilon, batch))
        time.sleep(0.01)

    monkeypatch.setattr(evaluation.evaluation, "autoattack", ours)
    monkeypatch.setattr(evaluation, "robustbench_loop", theirs)
    args = evaluation.parse_args([*TOY, "--aa_examples", "4", "--aa_batches", "2", "--aa_rounds", "2"])
    rows = evaluation.autoattack_rows(build_model("RES-8"), torch.device("cpu"), args)
    turns = ["product", "robustbench", "robustbench", "product"]
    assert asked == [(who, 4, evaluation.AUTOATTACK_EPSILON, 2) for who in turns]
    assert [row["step"] for row in rows] == ["product", "robustbench's loop"]
    assert "0.500" in report.tables({"autoattack": rows})[0]


def test_robustbenchs_loop_measures_what_ours_does(monkeypatch):
    """The same images, budget, seed and batch: the same accuracy, with attacks of few steps."""
    import pyautoattack

    evaluate = pyautoattack.AutoAttack.run_standard_evaluation

    def short(self, x, y, **settings):
        self.attacks_to_run = [name for name in self.attacks_to_run if name == "apgd-ce"]
        self.apgd.n_iter = 3
        return evaluate(self, x, y, **settings) if self.attacks_to_run else (x, y)

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", short)
    model = measure.make_network("RES-8", torch.device("cpu"), 0)
    model.requires_grad_(False)
    ((x, _),) = measure.make_batches(12, torch.device("cpu"), 1)
    y = model(x).argmax(dim=1)
    theirs = evaluation.robustbench_loop(model, x, y, 0.002, 12)
    found = evaluation.evaluation.autoattack(model, x, y, 0.002, batch=12, show_progress=False)
    assert theirs == pytest.approx(found["attacks"]["apgd-ce"])
    assert 0 < theirs < 1


def test_every_trick_runs_and_is_finite(monkeypatch):
    """Compiled and in bfloat16 as on a GPU, but without code generation; the products' losses are near each other."""
    torch.compiler.reset()
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: plain_compile(model, backend="aot_eager", **options))
    networks = tuple(measure.make_network(name, torch.device("cpu"), i) for i, name in enumerate(("RES-8", "WRN-10-1")))
    flags = ["--batch", "2", "--rounds", "1", "--device", "cpu", "--precisions", "bf16", "--tricks", "all"]
    args = training_step.parse_args(flags)
    rows = list(training_step.trick_rows("adaad_IGDM", networks, TOPS, torch.device("cpu"), args))
    assert [row.get("error") for row in rows] == [None] * len(TRICKS)
    assert [row["trick"] for row in rows] == list(TRICKS)
    assert rows[0]["ratio"] == 1
    for row in rows:
        check_speed(row, 2)
    torch.compiler.reset()


def test_a_result_that_is_not_finite_is_refused_without_another_run():
    """A run under other switches than the timed one's would compile everything anew."""
    runs = []
    values = iter([1.0, float("nan")])
    setting = measure.Setting({}, torch.device("cpu"), lambda: lambda: runs.append(0) or next(values))
    setting.turn(1)
    with pytest.raises(UserError, match="not finite"):
        setting.check_finite()
    assert len(runs) == 2


def test_turns_alternate_and_put_each_settings_switches_back():
    seen = []

    def build(name, switches):
        switches.apply()
        return lambda: seen.append((name, measure.Numerics.current() == switches))

    cpu = torch.device("cpu")
    kinds = {"a": measure.RESEARCH_CODE, "b": measure.Numerics(True, False, False)}
    settings = [measure.Setting({}, cpu, lambda n=n, s=s: build(n, s)) for n, s in kinds.items()]
    del seen[:]
    measure.take_turns(settings, 2)
    assert seen == [(name, True) for name in "abba"]
    assert all(len(setting.seconds) == 2 for setting in settings)


def test_ratio_and_quartiles():
    found = measure.ratio([4.0, 6.0, 8.0], [2.0, 2.0, 4.0])
    assert found == {"ratio": 3.0, "ratio_quartiles": [2.0, 2.5]}
    assert measure.median_and_quartiles([1.0]) == (1.0, 1.0, 1.0)


def test_ceilings_are_positive():
    tops = measure.ceilings(torch.device("cpu"), ["fp32"], rounds=1)
    (found,) = tops
    assert measure.peak(tops, "fp32") == max(found["matmul_tflops"], found["convolution_tflops"]) > 0
    assert found["copy_gb_per_second"] > 0


def test_insert_replaces_what_is_between_its_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("top\n<!-- begin a -->\nold\n<!-- end a -->\nbottom\n")
    for text in ("new", "newer"):
        report.insert(path, "a", text)
        assert path.read_text() == f"top\n<!-- begin a -->\n{text}\n<!-- end a -->\nbottom\n"
    with pytest.raises(UserError, match="begin b"):
        report.insert(path, "b", "text")


@pytest.mark.parametrize("mark", ["gpu_check", "training_step_cuda", "training_step_cpu", "evaluation_cuda"])
def test_the_page_has_a_place_for_every_report(mark):
    report.split_at(Path(__file__).parent.parent / "docs" / "performance_tables.md", mark)


@pytest.mark.parametrize("module", [training_step, evaluation])
def test_mistakes_are_one_line_before_anything_is_measured(module, capsys, tmp_path):
    (tmp_path / "file").write_text("no folder, no markers")
    for flags in (
        ["--device", "tpu"],
        ["--rounds", "0"],
        ["--out", str(tmp_path / "file" / "x.json")],
        ["--insert", str(tmp_path / "file"), "mark"],
    ):
        with pytest.raises(SystemExit) as stop:
            module.parse_args(flags)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    module.parse_args(["--out", str(tmp_path / "new" / "x.json")])
    assert (tmp_path / "new").is_dir()


# The GPU check: its parts at toy size, and what becomes of a part that fails, or that would not end


def check(monkeypatch, tmp_path, parts, *flags):
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--rehearse", "--out", str(tmp_path), "--parts", *parts, *flags])
    gpu_check.main()
    return json.loads((tmp_path / "gpu_check.json").read_text())


def test_gpu_check_writes_its_figures_and_report_its_tables(monkeypatch, tmp_path, capsys):
    found = check(monkeypatch, tmp_path, ["machine", "fidelity"], "--commit", "abc1234")
    assert found["commit"] == "abc1234"
    assert [part["status"] for part in found["parts"].values()] == ["done", "done"]
    assert [row["precision"] for row in found["parts"]["machine"]["ceilings"]] == gpu_check.rates_of("cpu")
    for row in found["parts"]["fidelity"]["fidelity"]:
        assert 0 <= row["flipped"] < 0.2
        assert row["objective_ratio"] == pytest.approx(1, abs=0.05)
    page = tmp_path / "page.md"
    page.write_text("<!-- begin gpu_check -->\nnot yet measured\n<!-- end gpu_check -->\n")
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path), "--insert", str(page)])
    report.main()
    text = page.read_text()
    assert "abc1234" in text
    assert "| adaad, fp16 |" in text
    assert "not yet measured" not in text


def test_a_part_of_the_gpu_check_that_fails_or_does_not_end_leaves_the_others(monkeypatch, tmp_path):
    """The first never ends, the second names a file that is none, the third is measured; these two have no limit."""
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--rehearse", "--out", str(tmp_path)])
    args = gpu_check.parse_args(["--rehearse", "--out", str(tmp_path)])
    found = {"parts": {}}
    (tmp_path / "python").write_text("#!/bin/sh\nwhile :; do sleep 1; done\n")
    (tmp_path / "python").chmod(0o755)
    with monkeypatch.context() as endless:
        endless.setattr("sys.executable", str(tmp_path / "python"))
        gpu_check.watch_part("fidelity", args, 0.1, found)
    assert found["parts"]["fidelity"]["status"].startswith("stopped at its limit")
    (tmp_path / "gpu_check.json").write_text("{")
    gpu_check.watch_part("profile", args, None, found)
    assert found["parts"]["profile"]["status"].startswith("failed: error:")
    gpu_check.watch_part("machine", args, None, found)
    assert found["parts"]["machine"]["status"] == "done"
    assert found == json.loads((tmp_path / "gpu_check.json").read_text())


def test_a_librarys_word_is_no_figure(monkeypatch, tmp_path):
    said = 'print(\'Downloading\'); print(7); print(\'{"kind": "ceilings", "row": {"precision": "fp32"}}\')'
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -c "$SAID"\n')
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("SAID", said)
    found = {"parts": {}}
    gpu_check.watch_part("machine", argparse.Namespace(out=tmp_path), None, found)
    assert found["parts"]["machine"]["status"] == "done"
    assert found["parts"]["machine"]["ceilings"] == [{"precision": "fp32"}]
    assert "Downloading" in (tmp_path / "gpu_check.log").read_text()


def test_a_rehearsal_leaves_out_what_the_cpu_has_no_instructions_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(
        "sys.argv", ["gpu_check.py", "--rehearse", "--out", str(tmp_path), "--parts", "step", "profile"]
    )
    gpu_check.main()
    assert "step: left out: this CPU has no bfloat16 instructions" in capsys.readouterr().out
    assert gpu_check.rates_of("cpu") == ["fp32"]


def test_the_limits_of_a_rehearsal_follow_from_its_first_part(tmp_path):
    args = gpu_check.parse_args(["--rehearse", "--out", str(tmp_path), "--parts", "machine", "tests"])
    assert gpu_check.limit_of(0, args, {"parts": {}}, end=0.0) is None

    def limit_after(seconds, status):
        return gpu_check.limit_of(1, args, {"parts": {"machine": {"seconds": seconds, "status": status}}}, end=0.0)

    limits = [limit_after(seconds, "done") for seconds in (3.0, 300.0)]
    assert limits[1] == pytest.approx(100 * limits[0])  # a machine a hundred times slower has a hundred times as long
    assert limit_after(0.1, "failed: error") is None  # a part that failed at once shows nothing about the machine


def test_gpu_check_refuses_a_machine_without_a_gpu(capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu_check.parse_args(["--out", str(tmp_path)])
    assert "--rehearse" in capsys.readouterr().err


def test_report_refuses_what_is_no_report(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    with pytest.raises(UserError, match=r"no \.json file"):
        report.main()
    (tmp_path / "x.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="no report of a benchmark"):
        report.main()


@pytest.mark.skipif(importlib.util.find_spec("robustbench") is None, reason="needs robustbench")
def test_the_networks_own_shape_is_robustbenchs():
    theirs, ours = dm_wide_resnet.build(16, 2, 7), dm_wide_resnet.DMWideResNet(16, 2, 7)
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
