"""What a fast step does beyond the plain one, each as one change: taken away, put in, or tried beside the engine.

A trick is a change of the engine's `FastPath`, of a finished step, or of the process's switches. What does not pay on
a GPU is deleted here and in the engine.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from experiment.engine import Accelerated

if TYPE_CHECKING:
    from benchmarks.training_step import ProductStep


def without_folding(fast: Accelerated) -> None:
    """Run the network itself, frozen, where the folded view would run."""
    fast._views = {}


def without_channels_last(fast: Accelerated) -> None:
    """Weights, and with them activations, in contiguous NCHW layout."""
    fast.model.to(memory_format=torch.contiguous_format)
    for layer in frozen_layers(fast):
        layer.weight = layer.weight.contiguous()


def without_reuse(fast: Accelerated) -> None:
    """Run every pass that the script writes, also one of a tensor that this step has run before."""
    fast.begin_step = lambda: None


def without_any(fast: Accelerated) -> None:
    """The script's step as plain PyTorch: frozen networks and a clean pass without gradient are all that is left."""
    for take_away in (without_channels_last, without_folding, without_reuse):
        take_away(fast)


def half_in_frozen_passes(fast: Accelerated) -> None:
    """float16 in attacks and teacher: bfloat16's speed, and TF32's 10 bits."""
    run = fast._run

    def half(x: Tensor) -> Tensor:
        if fast.model.training:
            return run(x)
        with torch.autocast(x.device.type, torch.float16):
            return run(x)

    fast._run = half


class FlippedGradient(torch.autograd.Function):
    """A 3x3 convolution of stride 1, padded by 1, whose input gradient is a forward pass with flipped weights."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution."""
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def setup_context(ctx: types.SimpleNamespace, inputs: tuple, output: Tensor) -> None:
        """The weights alone are needed."""
        x, weight, _ = inputs
        ctx.save_for_backward(weight)
        ctx.dtypes = x.dtype, output.dtype  # autocast computes in the second

    @staticmethod
    def backward(ctx: types.SimpleNamespace, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The same convolution the other way round."""
        (weight,) = ctx.saved_tensors
        turned = weight.to(ctx.dtypes[1]).transpose(0, 1).flip(2, 3)
        return F.conv2d(gradient, turned, padding=1).to(ctx.dtypes[0]), None, None


def flipped_input_gradients(fast: Accelerated) -> None:
    """Take input gradients of the folded view's plain 3x3 convolutions as forward passes."""
    for layer in frozen_layers(fast):
        conv = layer._origin[0]
        if layer.padding == (1, 1) and conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.groups == 1:
            layer.forward = lambda x, layer=layer: FlippedGradient.apply(x, layer.weight, layer.bias)


def frozen_layers(fast: Accelerated) -> list:
    """The layers with weights of their own in all views."""
    return [layer for view in fast._views.values() for layer in view._layers]


def two_streams(step: ProductStep) -> None:
    """The student's frozen passes on a stream of their own, beside the teacher's that follow."""
    if step.fast_student._weights[0].device.type != "cuda":
        return  # no streams
    side = torch.cuda.Stream()
    student, teacher = step.fast_student._run, step.fast_teacher._run

    def beside(x: Tensor) -> Tensor:
        if step.student.training:
            return student(x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            logits = student(x)
        # Whoever frees them on one stream must not hand their memory out while the other still works on it.
        x.record_stream(side)
        logits.record_stream(torch.cuda.current_stream())
        return logits

    def then(x: Tensor) -> Tensor:
        logits = teacher(x)
        torch.cuda.current_stream().wait_stream(side)
        return logits

    step.fast_student._run, step.fast_teacher._run = beside, then


def all_kernels(_: ProductStep) -> None:
    """Let cuDNN try every kernel it has, not ten of them."""
    torch.backends.cudnn.benchmark_limit = 0


def each(change: Callable[[Accelerated], None]) -> Callable[[ProductStep], None]:
    """The change made to student and teacher."""

    def both(step: ProductStep) -> None:
        for fast in (step.fast_student, step.fast_teacher):
            change(fast)

    return both


@dataclass(frozen=True)
class Trick:
    """One change of the product's step.

    Attributes:
        fast_path: the engine's `FastPath`, by field.
        change: what is done to the finished step.
        teacher_attacks: it is a change only where the attack runs the teacher.
    """

    fast_path: dict[str, bool] = field(default_factory=dict)
    change: Callable[[ProductStep], None] = lambda step: None
    teacher_attacks: bool = False


ALL_PATHS = {"merge_pads": True, "stored_weights": True, "attack_graph": True, "cuda_graph": True}
TRICKS = {
    "product": Trick(),
    "without folding BatchNorm": Trick(change=each(without_folding)),
    "without channels_last": Trick(change=each(without_channels_last)),
    "without reuse of passes": Trick(change=each(without_reuse)),
    "without all three": Trick(change=each(without_any)),
    "attack step as one graph": Trick({"attack_graph": True}),
    "pads merged": Trick({"merge_pads": True}),
    "frozen weights stored in bf16": Trick({"stored_weights": True}),
    "CUDA graph of the attack step": Trick({"cuda_graph": True}),
    "all of these four": Trick(ALL_PATHS),
    "fp16 in frozen passes": Trick(change=each(half_in_frozen_passes)),
    "cuDNN tries all kernels": Trick(change=all_kernels),
    "input gradients as flipped forward passes": Trick(change=each(flipped_input_gradients)),
    "student and teacher on two streams": Trick(change=two_streams, teacher_attacks=True),
}
