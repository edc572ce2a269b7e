"""Student networks: sizes, costs and shapes as the papers print them, and what training and attacks rely on."""

import re

import pytest
import torch

from cifar100_models import MODELS, build_model, check_model_name
from experiment.study.command import forward_macs

NAMES = ("RES-18", "RES-20", "RES-8", "MN-V2", "WRN-10-1", "WRN-16-2")
LIGHT = ("RES-20", "RES-8", "MN-V2", "WRN-10-1", "WRN-16-2")


def on_paper(name, num_classes=100):
    """The network without memory or arithmetic: shapes only, so that the large ones cost nothing."""
    with torch.device("meta"):
        return build_model(name, num_classes)


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "parameters", "cost"),
    [
        ("RES-18", 11_220_132, 0.5555),
        ("MN-V2", 2_412_212, 0.0913),
        ("WRN-28-10", 36_536_884, 5.2434),
        ("RES-8", 83_892, 0.0125),
        ("RES-20", 278_324, 0.0408),
    ],
)
def test_parameters_and_cost_are_the_published_ones(name, parameters, cost):
    assert sum(p.numel() for p in on_paper(name).parameters()) == parameters
    assert forward_macs(name) / 1e9 == pytest.approx(cost, abs=5e-5)  # all digits printed here


@pytest.mark.parametrize("name", NAMES)
def test_any_image_from_8x8_up_and_any_number_of_classes(name):
    for size in ((8, 8), (9, 9), (15, 8), (31, 33), (64, 64)):
        for classes in (2, 100):
            images = torch.empty(2, 3, *size, device="meta")
            assert on_paper(name, classes).eval()(images).shape == (2, classes)


@pytest.mark.parametrize("num_classes", [1, 0, -3])
def test_too_few_classes_are_an_error(num_classes):
    with pytest.raises(ValueError, match=f"^num_classes {num_classes} is out of range .expected at least 2.$"):
        build_model("RES-8", num_classes)


@pytest.mark.parametrize(
    "name",
    [
        *("", "res-18", "RES-18 ", "../RES-18", "MN-V3", "WRN", "WRN-28", "WRN-28-10\n", "WRN-27-10", "WRN-4-1"),
        *("WRN-28-0", "WRN-28-21", "WRN--28-10", "WRN-28-10-1", "WRN-999-1"),
    ],
)
def test_the_error_of_an_unknown_name_lists_the_known(name):
    for function in (build_model, check_model_name):
        with pytest.raises(ValueError, match=re.escape(repr(name))) as caught:
            function(name)
        assert "\n" not in str(caught.value)
        assert all(known in str(caught.value) for known in (*MODELS, "WRN-d-w"))


@pytest.mark.parametrize("name", LIGHT)
def test_every_parameter_counts_and_every_statistic_moves(name):
    """Also on 8x8 images: every BatchNorm sees more than one value per channel."""
    torch.manual_seed(0)
    model = build_model(name, 10)
    before = {key: value.clone() for key, value in model.named_buffers()}
    model(images(8, 3, 8, 8)).square().sum().backward()
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
def test_the_error_of_a_users_file_names_the_reason(tmp_path, text, function, reason):
    file = tmp_path / "net.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(reason)):
        build_model(f"{file}:{function}", 10)
    with pytest.raises(ValueError, match=r"no such file: .*absent\.py"):
        check_model_name(f"{tmp_path / 'absent.py'}:{function}")


def test_a_network_of_a_users_file(tmp_path):
    """With a dataclass, which looks up its module."""
    file = tmp_path / "net.py"
    lines = [
        "from __future__ import annotations",
        "from dataclasses import dataclass",
        "from torch import nn",
        "@dataclass",
        "class Shape:",
        "    width: int = 192",
        "def make(classes): return nn.Sequential(nn.Flatten(), nn.Linear(Shape().width, classes)).eval()",
    ]
    file.write_text("\n".join(lines))
    check_model_name(f"{file}:make")
    model = build_model(f"{file}:make", 7)
    assert model.training
    assert model(images(2, 3, 8, 8)).shape == (2, 7)
    assert model.source_file["path"] == str(file)
    assert list(tmp_path.iterdir()) == [file]  # no __pycache__
