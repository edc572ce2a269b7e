"""The benchmarks run at a toy size, write what they promise, and their baseline makes the passes that it must."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import evaluation, gpu_check, kept_gradient, measure, product, report, training_step, workload
from experiment import UserError, compat

TOY = ["--device", "cpu", "--rounds", "2"]
NETWORKS = ["--teacher", "WRN-10-1", "--student", "RES-8"]


@pytest.fixture(autouse=True)
def keep_process_state():
    """The engine sets process-wide switches and seeds."""
    numerics, state = measure.Numerics.current(), torch.get_rng_state()
    yield
    numerics.apply()
    torch.set_rng_state(state)


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
    """Passes times layers, against what torch counts while the published step and the product's run.

    So the published step makes the passes that PASSES has, and the product's none twice.
    """
    networks = tuple(workload.make_network(name, torch.device("cpu"), 0) for name in ("RES-20", "DM-WRN-10-1"))
    batches = workload.make_batches(2, torch.device("cpu"), 1)
    for kind, build in (("published", product.published_step), ("product", product.ProductStep)):
        own = copy.deepcopy(networks)
        step = build(method, own, batches)
        with FlopCounter() as counter:
            step()
        assert not torch.equal(next(own[0].parameters()), next(networks[0].parameters())), "it trains"
        counted = workload.gflop_of_step(method, networks)[kind]
        assert counted == pytest.approx(counter.total / 2 / 1e9, rel=1e-9), kind


TOPS = [{"precision": p, "matmul_tflops": 0.1, "convolution_tflops": 0.2} for p in ("fp32", "bf16")]


def run(module, monkeypatch, tmp_path, *flags):
    """The JSON that the benchmark writes."""
    out = tmp_path / "out.json"
    name = module.__name__.rpartition(".")[2]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *TOY, *flags, "--out", str(out)])
    # Ceilings take seconds, and say nothing about the report.
    monkeypatch.setattr(measure, "ceilings", lambda *_: TOPS)
    module.main()
    found = json.loads(out.read_text())
    assert found["command"].startswith(f"python -m benchmarks.{name} --device cpu")
    assert "--out" not in found["command"]
    assert {"hardware", "threads", "torch", "python", "commit"} <= set(found)
    return found


def check_speed(row, images):
    low, high = row["images_per_second_quartiles"]
    assert 0 < low <= row["images_per_second"] <= high
    assert row["images_per_second"] == pytest.approx(images / torch.tensor(row["seconds"]).quantile(0.5).item())


def test_training_step(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    flags = ["--methods", "rslad_IGDM", "--batch", "2", "--profile", "1"]
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
    assert all(row["share"] > 0 for row in found["profile"])
    assert "| rslad_IGDM, product, fp32, eager |" in capsys.readouterr().out


def test_evaluation(monkeypatch, tmp_path, capsys, quick_autoattack):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    flags = ["--student", "RES-8", "--examples", "2", "--batch", "2", "--product_batch", "2"]
    flags += ["--aa_student", "RES-8", "--aa_examples", "4", "--aa_batches", "2"]
    found = run(evaluation, monkeypatch, tmp_path, *flags)
    expected = ["published order, loss.backward()", "published order, autograd.grad", "product, fp32"]
    assert [row["step"] for row in found["pgd20"]] == expected
    for row in found["pgd20"]:
        check_speed(row, 2)
    (attacked,) = found["autoattack"]
    assert (attacked["batch"], attacked["examples"]) == (2, 4)
    assert "| apgd-ce, s/image | apgd-t, s/image | fab-t, s/image | square, s/image |" in capsys.readouterr().out


def test_every_trick_runs_and_is_finite(monkeypatch):
    """In bfloat16 as on a GPU, but not compiled, which test_accelerate does; a trick that fails is a row."""
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    networks = tuple(workload.make_network(name, torch.device("cpu"), 0) for name in ("RES-8", "WRN-10-1"))
    flags = ["--batch", "2", "--rounds", "1", "--device", "cpu", "--precisions", "bf16", "--compile", "1"]
    args = training_step.parse_args([*flags, "--tricks", "all"])
    monkeypatch.setitem(product.TRICKS, "without CUDA graph", (lambda step: step.nothing,))
    rows = list(training_step.trick_rows("adaad_IGDM", networks, TOPS, args))
    failed = rows.pop(1)
    assert "no attribute 'nothing'" in failed["error"]
    assert [row["trick"] for row in rows] == [name for name in product.TRICKS if name != failed["setting"]]
    for row in rows:
        check_speed(row, 2)


def test_a_result_that_is_not_finite_is_an_error():
    values = iter([1.0, float("nan")])
    setting = measure.Setting({}, torch.device("cpu"), lambda: lambda: next(values))
    setting.turn(1)
    with pytest.raises(UserError, match="not finite"):
        setting.check_finite()


def test_turns_alternate_and_restore_each_settings_switches():
    seen = []

    def build(name, switches):
        switches.apply()
        return lambda: seen.append((name, measure.Numerics.current() == switches))

    kinds = {"a": measure.RESEARCH_CODE, "b": measure.Numerics(True, False, False)}
    settings = [measure.Setting({}, torch.device("cpu"), lambda n=n, s=s: build(n, s)) for n, s in kinds.items()]
    del seen[:]
    measure.take_turns(settings, 2)
    assert seen == [(name, True) for name in "abba"]


def test_ceilings_are_positive():
    (found,) = measure.ceilings(torch.device("cpu"), ["fp32"], rounds=1)
    assert min(found["matmul_tflops"], found["convolution_tflops"]) > 0


def test_mistakes_are_one_line_before_anything_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "file").touch()
    inside = str(tmp_path / "file" / "x.json")
    for module, flags in (
        (training_step, ["--device", "tpu"]),
        (training_step, ["--rounds", "0"]),
        (evaluation, ["--out", inside]),
        (gpu_check, ["--out", inside, "--rehearse"]),
        (gpu_check, ["--out", str(tmp_path)]),
    ):
        with pytest.raises(SystemExit, match="2"):
            module.parse_args(flags)
        assert capsys.readouterr().err.count("\n") == 1


def test_the_gpu_check_keeps_what_was_measured_and_report_shows_it(monkeypatch, tmp_path):
    """Of parts that end, fail and reach their limit."""
    fidelity = ["benchmarks.fidelity", "--precisions", "fp16"]
    monkeypatch.setattr(
        gpu_check,
        "commands",
        lambda rehearse: {
            "fidelity": (1, [*fidelity, "--student", "RES-8", "--teacher", "RES-8", "--epochs", "1"]),
            "broken": (1, ["benchmarks.nothing"]),
        },
    )
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--rehearse", "--out", str(tmp_path), "--commit", "abc1234"])
    args = gpu_check.parse_args()
    monkeypatch.setattr(gpu_check, "parse_args", lambda: args)
    args.parts = ["fidelity", "broken"]
    with pytest.raises(UserError, match="not complete: broken"):
        gpu_check.main()
    found = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert found["broken"]["status"].startswith("failed: ")
    for row in found["fidelity"]["fidelity"]:
        assert 0 <= row["flipped"] < 0.2
        assert row["objective_ratio"] == pytest.approx(1, abs=0.05)
    stopped = gpu_check.run_part("tests", ["pytest", "--version"], tmp_path, 0.0)
    assert stopped["status"] == "stopped at its limit of 0 s"
    page = tmp_path / "page.md"
    page.write_text("top\n<!-- begin gpu_check -->\nnot yet measured\n<!-- end gpu_check -->\nbottom\n")
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path), "--insert", str(page)])
    report.main()
    text = page.read_text()
    assert text.startswith("top\n")
    assert text.endswith("<!-- end gpu_check -->\nbottom\n")
    assert "abc1234" in text
    assert "| fp16 |" in text
    assert "not yet measured" not in text


def test_the_commands_of_the_gpu_check_are_accepted():
    modules = {"benchmarks.training_step": training_step, "benchmarks.evaluation": evaluation}
    for rehearse in (False, True):
        for _, (name, *flags) in gpu_check.commands(rehearse).values():
            if name in modules:
                modules[name].parse_args([flag.replace("cuda", "cpu") for flag in flags])


def test_report_names_what_it_cannot_use(monkeypatch, tmp_path):
    def message(*flags):
        monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path), *flags])
        with pytest.raises(UserError) as caught:
            report.main()
        return str(caught.value)

    assert "no .json file" in message()
    (tmp_path / "x.json").write_text("{}")
    assert "not a report of a benchmark" in message()
    figures = {"benchmark": "x", "command": "x", "hardware": "x", "torch": "2", "commit": "x"}
    (tmp_path / "x.json").write_text(json.dumps(figures))
    assert "begin x" in message("--insert", str(tmp_path / "absent.md"))


def test_the_networks_shape_is_robustbenchs():
    compat.import_robustbench()
    from robustbench.model_zoo.architectures import dm_wide_resnet

    theirs = dm_wide_resnet.DMWideResNet(7, 16, 2, activation_fn=nn.SiLU)
    ours = workload.DMWideResNet(16, 2, 7)
    shapes = [sorted(tuple(p.shape) for p in network.parameters()) for network in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert workload.gflop_of_passes(theirs.eval()) == pytest.approx(workload.gflop_of_passes(ours.eval()))


def test_the_kept_gradient_is_the_current_one_at_first(tmp_path):
    torch.manual_seed(0)
    student, teacher = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10)).eval() for _ in range(2))
    cosines, signs = kept_gradient.measured(student, teacher, torch.rand(8, 3, 4, 4), 0.1, 0.025, 5)
    assert len(cosines) == len(signs) == 5
    assert cosines[0] == pytest.approx(1, abs=1e-6)
    assert signs[0] == 1
    assert all(-1 <= cosine < cosines[0] for cosine in cosines[1:])
    assert all(0.5 < sign <= 1 for sign in signs[1:])
