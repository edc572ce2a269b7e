"""The benchmarks run at a toy size, write what they promise, and their baseline makes the passes that it must."""

import json
import math

import pytest
import torch
from torch import nn

from benchmarks import evaluation, measure, published, scaling, training_step, tricks
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
    step = training_step.published_step(method, student, teacher, [(torch.rand(4, 3, 8, 8), torch.randint(10, (4,)))])
    assert math.isfinite(step())
    passes = student.forwards, student.to_input, student.to_weights, teacher.forwards, teacher.to_input
    assert passes == training_step.PASSES[method]["published"]
    assert teacher.to_weights == 0
    assert not any(torch.equal(a, b) for a, b in zip(before, student.model.parameters(), strict=True))


@pytest.mark.parametrize("method", training_step.METHODS)
def test_counted_operations_are_those_of_the_passes(method):
    """The table of passes, times what a pass costs, is what a real step computes."""
    networks = tuple(measure.make_network(name, torch.device("cpu"), 0) for name in ("RES-20", "WRN-10-1"))
    costs = [training_step.gflop_of_passes(network) for network in networks]
    counted = training_step.gflop_per_image(method, networks, torch.device("cpu"))
    assert counted == pytest.approx(training_step.gflop_by_passes(method, *costs), rel=1e-9)


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


def run(module, monkeypatch, tmp_path, *flags):
    """The JSON that the benchmark writes."""
    out = tmp_path / "out.json"
    name = module.__name__.rpartition(".")[2]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *TOY, *flags, "--out", str(out)])
    # Ceilings take seconds, and say nothing about the report.
    tops = {"matmul_tflops": {"fp32": 0.1}, "convolution_tflops": {"fp32": 0.2}, "copy_gb_per_second": 10.0}
    monkeypatch.setattr(measure, "ceilings", lambda *_: tops)
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
    flags = ["--methods", "rslad_IGDM", "--batch", "2", "--profile", str(tmp_path / "profile.json")]
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
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert len(profile["top"]) == 10
    assert profile["convolutions_alone_seconds"] > 0
    assert sum(profile["shares"].values()) == pytest.approx(1)
    printed = capsys.readouterr().out
    assert printed.rstrip().splitlines()[-1].startswith("| rslad_IGDM | product, fp32, eager")


def test_evaluation(monkeypatch, tmp_path):
    flags = ["--student", "RES-8", "--examples", "2", "--batch", "2", "--product_batch", "2", "--aa_examples", "0"]
    found = run(evaluation, monkeypatch, tmp_path, *flags)
    assert [row["step"].split(",")[0] for row in found["pgd20"]] == ["published order", "published order", "product"]
    for row in found["pgd20"]:
        check_speed(row, 2)
        assert row["ratio"] > 0


def test_autoattack_rows_name_every_attack(monkeypatch):
    """AutoAttack itself takes minutes; what matters here is what becomes of its result."""
    seconds = dict.fromkeys(evaluation.evaluation.AUTOATTACK, 2.0)
    result = {"examples": 4, "seconds": 8.0, "attack_seconds": seconds, "accuracy": 1.0}
    seen = []
    monkeypatch.setattr(
        evaluation.evaluation, "autoattack", lambda *args, batch, **_: seen.append((args[3], batch)) or result
    )
    args = evaluation.parse_args([*TOY, "--aa_examples", "4", "--aa_batches", "2", "4"])
    rows = evaluation.autoattack_rows(build_model("RES-8"), torch.device("cpu"), args)
    assert seen == [(evaluation.AUTOATTACK_EPSILON, 2), (evaluation.AUTOATTACK_EPSILON, 4)]
    assert [row["batch"] for row in rows] == [2, 4]
    assert "0.500" in evaluation.autoattack_table(rows)


def test_scaling(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "EPOCH_IMAGES", 64)
    flags = ["--method", "ard", "--batches", "2", "3", "--batch", "2", "--images", "2", "4", "--teachers", "WRN-10-1"]
    found = run(scaling, monkeypatch, tmp_path, *NETWORKS, *flags)
    assert [(row["processes"], row["batch"]) for row in found["batches"]] == [(1, 2), (1, 3)]
    for row in found["batches"]:
        check_speed(row, row["batch"])
    assert [row["images"] for row in found["epochs"]] == [2, 4]
    assert set(found["overhead"]) == {"step", "data", "logging"}
    assert all(seconds > 0 for seconds in found["overhead"].values())
    (teacher,) = found["teachers"]
    for method, counted in teacher["gflop"].items():
        if method == "rslad":  # no term without weight, no pass twice
            assert counted["product"] == counted["published"]
        else:
            assert counted["product"] < counted["published"]


def test_tricks(monkeypatch, tmp_path):
    found = run(tricks, monkeypatch, tmp_path, *NETWORKS, "--methods", "rslad_IGDM", "--batch", "2")
    *rows, in_two, in_one = found["rows"]
    assert [row["variant"] for row in rows] == list(tricks.VARIANTS)
    for row in rows:
        check_speed(row, 2)
    for row in (in_two, in_one):
        check_speed(row, 4)
    assert rows[0]["ratio"] == in_two["ratio"] == 1


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
    found = measure.ceilings(torch.device("cpu"), ["fp32"], rounds=1)
    assert measure.peak(found, "fp32") == max(found["matmul_tflops"]["fp32"], found["convolution_tflops"]["fp32"]) > 0
    assert found["copy_gb_per_second"] > 0
    doubled = {**found, "matmul_tflops": {"fp32": 2 * found["matmul_tflops"]["fp32"]}}
    assert measure.better(found, doubled) == measure.better(doubled, found) == doubled


def test_insert_replaces_what_is_between_its_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("top\n<!-- begin a -->\nold\n<!-- end a -->\nbottom\n")
    for text in ("new", "newer"):
        measure.insert(path, "a", text)
        assert path.read_text() == f"top\n<!-- begin a -->\n{text}\n<!-- end a -->\nbottom\n"
    with pytest.raises(UserError, match="begin b"):
        measure.insert(path, "b", "text")


@pytest.mark.parametrize("module", [training_step, evaluation, scaling, tricks])
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
