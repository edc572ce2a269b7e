"""AutoAttack under faults: answers that do not hold, too little memory, masked gradients, what it cannot measure."""

import pytest
import torch
from evaluation_cases import EPSILON, Masked, SmallMemory, labelled, replace_run, tiny_network

from experiment import UserError, evaluation
from experiment.evaluation.batches import InParts


def test_an_answer_that_does_not_hold_is_an_error(quick_autoattack, monkeypatch):
    network = tiny_network()
    x, y = labelled(network, 6, 1)
    x[0] = 0  # black pixels, to leave [0, 1] inside the ball

    def run():
        return evaluation.autoattack(network, x, y, EPSILON)

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
    logits = InParts(network, 3)(parts)
    torch.testing.assert_close(logits, network(whole), rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(logits)
    for _ in range(2):  # FAB keeps the graph for a backward pass per class
        (found,) = torch.autograd.grad(logits, parts, weights, retain_graph=True)
        (expected,) = torch.autograd.grad(network(whole), whole, weights)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_autoattack_does_not_depend_on_the_memory(quick_autoattack, monkeypatch, tmp_path, capsys):
    """Out of memory, the network sees fewer images at once; the attack's batch, hence its random numbers, stay."""
    torch.manual_seed(0)
    network = tiny_network()
    x, y = labelled(network, 12, 0)
    roomy, tight = SmallMemory(network, 12), SmallMemory(network, 3)
    expected = evaluation.autoattack(roomy, x, y, 0.03)
    in_one_go = list(quick_autoattack)
    quick_autoattack.clear()
    capsys.readouterr()
    found = evaluation.autoattack(tight, x, y, 0.03, folder=tmp_path)
    assert found["attacks"] == expected["attacks"]
    assert 0 < found["accuracy"] < 1
    # The package was given the same images in the same batches: each attack, those that the ones before left.
    assert len(quick_autoattack) == len(in_one_go)
    for (name, given, _, batch), (its_name, its_given, _, its_batch) in zip(quick_autoattack, in_one_go, strict=True):
        assert (name, batch) == (its_name, its_batch)
        assert torch.equal(given, its_given)
    assert [size for size in tight.sizes if size > 3] == [12, 6]
    said = capsys.readouterr().err
    assert "out of memory; again with 6 images at once" in said
    assert "out of memory; again with 3 images at once" in said
    assert found["warnings"] == expected["warnings"]

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    replace_run(monkeypatch, no_room)
    with pytest.raises(UserError, match="even with single images"):
        evaluation.autoattack(network, x, y, 0.03)


def test_autoattack_runs_under_its_own_switches(quick_autoattack, monkeypatch):
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


def test_signs_of_gradient_masking_are_reported(quick_autoattack, monkeypatch, capsys):
    network = tiny_network()
    x, y = labelled(network, 12, 0)

    result = evaluation.autoattack(Masked(), *labelled(Masked()), EPSILON)
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
    honest = evaluation.autoattack(network, x, y, 0.1)
    assert not any(warning.startswith("Square") for warning in honest["warnings"])


@pytest.mark.parametrize("epsilon", [0.0, 8.0])
def test_an_epsilon_out_of_range_is_refused(epsilon):
    with pytest.raises(UserError, match=f"epsilon {epsilon:g} is out of range"):
        evaluation.autoattack(tiny_network(), *labelled(tiny_network()), epsilon)
