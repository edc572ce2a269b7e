"""Student networks: sizes, costs and shapes as the papers print them, and what a network owes its user."""

import re

import pytest
import torch
from torch import nn

from cifar100_models import MODELS, build_model, check_model_name

NAMES = ("RES-18", "RES-20", "RES-8", "MN-V2", "WRN-10-1", "WRN-16-2")
LIGHT = ("RES-20", "RES-8", "MN-V2", "WRN-10-1", "WRN-16-2")


def on_paper(name, num_classes=100):
    """The network without memory or arithmetic: shapes only, so that the large ones cost nothing."""
    with torch.device("meta"):
        return build_model(name, num_classes)


def built(name, num_classes=10, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(name, num_classes).to(dtype)


def images(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def main_path(model):
    return [name for name in layers(model) if "shortcut" not in name.lower()]


def gmac(model, side):
    """Multiply-accumulates of convolutions and linear layers for one image, counted while it passes."""
    macs = []

    def count(module, _inputs, output):
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            macs.append(output.numel() * kernel * module.in_channels // module.groups)
        else:
            macs.append(output.numel() * module.in_features)

    for module in layers(model).values():
        module.register_forward_hook(count)
    model.eval()(torch.empty(1, 3, side, side, device="meta"))
    return sum(macs) / 1e9


@pytest.mark.parametrize(
    ("name", "parameters", "cost"),
    [("RES-18", 11_220_132, 0.5555), ("MN-V2", 2_412_212, 0.0913), ("WRN-28-10", 36_536_884, 5.2434)],
)
def test_parameters_and_cost_are_the_published_ones(name, parameters, cost):
    model = on_paper(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert gmac(model, 32) == pytest.approx(cost, abs=5e-5)  # all digits printed here


def test_the_teacher_costs_nine_students():
    assert gmac(on_paper("WRN-28-10"), 32) / gmac(on_paper("RES-18"), 32) == pytest.approx(9.4, abs=0.05)


@pytest.mark.parametrize(
    ("name", "depth"),
    # The depth in a WideResNet's name, 6n + 4, counts its three shortcuts and not its linear layer.
    [("RES-8", 8), ("RES-20", 20), ("RES-18", 18), ("WRN-10-2", 8), ("WRN-28-10", 26), ("WRN-34-10", 32)],
)
def test_depth_is_the_number_of_layers_on_the_main_path(name, depth):
    assert len(main_path(on_paper(name))) == depth


@pytest.mark.parametrize("name", ["WRN-28-10", "WRN-10-2", "WRN-34-20"])
def test_a_wide_resnet_has_its_depth_in_convolutions(name):
    depth, width = map(int, name.split("-")[1:])
    model = on_paper(name)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == depth
    assert max(m.out_channels for m in convolutions) == 64 * width


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(8, 8), (9, 9), (15, 8), (31, 33), (32, 32), (64, 64)])
def test_any_image_from_8x8_up(name, size):
    assert on_paper(name).eval()(torch.empty(2, 3, *size, device="meta")).shape == (2, 100)


@pytest.mark.parametrize("name", LIGHT)
def test_small_images_train(name):
    """In train mode on 8x8 images every BatchNorm still sees more than one value per channel."""
    model = built(name)
    model(images(2, 3, 8, 8)).sum().backward()
    assert model.training


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_num_classes(name, num_classes):
    assert on_paper(name, num_classes).eval()(torch.empty(1, 3, 8, 8, device="meta")).shape == (1, num_classes)


@pytest.mark.parametrize("num_classes", [1, 0, -3])
def test_too_few_classes_are_refused(num_classes):
    with pytest.raises(ValueError, match=f"^num_classes {num_classes} is out of range .expected at least 2.$"):
        build_model("RES-8", num_classes)


@pytest.mark.parametrize(
    "name",
    [
        *("", "res-18", "RES-19", "RES-18 ", "resnet18", "../RES-18", "MN-V3", "WRN", "WRN-28", "WRN-28-10\n"),
        *("WRN-27-10", "WRN-4-1", "WRN-28-0", "WRN-28-21", "WRN--28-10", "WRN-28-10-1", "WRN-999-1"),
    ],
)
def test_unknown_names_are_refused_in_a_line_that_names_the_known(name):
    for refuse in (build_model, check_model_name):
        with pytest.raises(ValueError, match=re.escape(repr(name))) as caught:
            refuse(name)
        line = str(caught.value)
        assert "\n" not in line
        assert all(known in line for known in (*MODELS, "WRN-d-w"))


@pytest.mark.parametrize("name", NAMES)
def test_check_model_name_builds_nothing(name):
    state = torch.get_rng_state()
    check_model_name(name)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", LIGHT)
def test_state_dict_round_trip(name):
    model, other = built(name), build_model(name, 10)
    model(images(4, 3, 8, 8))  # moves the statistics, which are part of the state
    other.load_state_dict(model.state_dict())
    x = images(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), other.eval()(x))


def test_weights_come_from_the_global_generator():
    torch.manual_seed(5)
    first = build_model("RES-8", 10).state_dict()
    second = build_model("RES-8", 10).state_dict()
    torch.manual_seed(5)
    again = build_model("RES-8", 10).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], second["conv1.weight"])


@pytest.mark.parametrize("name", LIGHT)
def test_eval_mode_gives_the_same_bits_and_moves_nothing(name):
    model = built(name).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = images(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", LIGHT)
def test_eval_mode_treats_each_image_alone(name):
    model, x = built(name, dtype=torch.float64).eval(), images(4, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = model(x)
        alone = torch.cat([model(image[None]) for image in x])
        other_format = model(x.to(memory_format=torch.channels_last))
    # float64; another batch size or layout may add in another order.
    torch.testing.assert_close(alone, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(other_format, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LIGHT)
def test_every_parameter_counts_and_every_statistic_moves(name):
    model = built(name)
    before = {key: value.clone() for key, value in model.named_buffers()}
    model(images(8, 3, 16, 16)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert [key for key, value in model.named_buffers() if torch.equal(value, before[key])] == []


def test_names_of_the_widely_copied_resnet18():
    """State dicts that were trained elsewhere fit."""
    keys = on_paper("RES-18").state_dict()
    for key in ("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer2.0.shortcut.0.weight"):
        assert key in keys
    assert keys["linear.weight"].shape == (100, 512)


@pytest.mark.parametrize(
    ("text", "function", "reason"),
    [
        ("", "make", "it has no function make"),
        ("make = 3", "make", "it has no function make"),
        ("def make(n): return n", "make", "is a int; make must return a torch.nn.Module"),
        ("def make(n):\n    return 1 / 0", "make", "ZeroDivisionError: division by zero, line 2"),
        ("import no_such_package", "make", "ModuleNotFoundError: No module named 'no_such_package', line 1"),
        ("def make(:", "make", "SyntaxError"),
        ("", "a b", "'a b' is not the name of a function"),
    ],
)
def test_a_file_of_ones_own_that_is_none_is_refused_in_a_line(tmp_path, text, function, reason):
    file = tmp_path / "net.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(reason)):
        build_model(f"{file}:{function}", 10)
    with pytest.raises(ValueError, match=r"no such file: .*absent\.py"):
        check_model_name(f"{tmp_path / 'absent.py'}:{function}")


def test_a_network_of_ones_own_file(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\ndef make(n):\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(n)).eval()"
    )
    check_model_name(f"{file}:make")
    model = build_model(f"{file}:make", 7)
    assert model.training
    assert model(images(2, 3, 8, 8)).shape == (2, 7)
    assert model.source_file["path"] == str(file)
    assert list(tmp_path.iterdir()) == [file]  # no __pycache__


def test_a_file_of_ones_own_may_have_dataclasses(tmp_path):
    """Which look for the module that they are in."""
    lines = [
        "from __future__ import annotations",
        "from dataclasses import dataclass",
        "from torch import nn",
        "@dataclass",
        "class Shape:",
        "    width: int = 192",
        "def make(classes): return nn.Sequential(nn.Flatten(), nn.Linear(Shape().width, classes))",
    ]
    (tmp_path / "net.py").write_text("\n".join(lines))
    assert build_model(f"{tmp_path / 'net.py'}:make", 10)(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
