"""The gradient step of an attack in one piece: as one compiled graph, as one CUDA graph, or as both.

A step runs two networks forward and backward to the input and moves the images: some hundred kernels, which the host
has to start one by one. Both ways compute what ``attacks.sign_step`` does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import attacks


def functional_step(
    objective: Callable[..., Tensor], x_adv: Tensor, x: Tensor, epsilon: float, step_size: float, given: tuple
) -> Tensor:
    """`attacks.sign_step` without a change in place, which a compiler takes as one graph: forward, gradient, move."""
    gradient = torch.func.grad(objective)(x_adv, *given)
    moved = x_adv + step_size * gradient.sign()
    return torch.clamp(moved, min=x - epsilon, max=x + epsilon).clamp(0, 1)


class AttackStep:
    """A step for ``attacks.steps_by``, for batches of one size; others take `attacks.sign_step`."""

    def __init__(self, networks: Sequence[Any], batch: int, *, graph: bool, cuda_graph: bool) -> None:
        """Nothing is compiled or captured before the first step.

        Args:
            networks: the accelerated networks, which are told to follow their weights before each step.
            batch: the usual number of images.
            graph: compile the step as one graph.
            cuda_graph: capture it on CUDA, with buffers of its own, and replay it.
        """
        self._networks, self._batch, self._cuda_graph = networks, batch, cuda_graph
        self._step = attacks.sign_step
        if graph:
            self._step = torch.compile(functional_step, fullgraph=True, dynamic=False)
        self._captured: dict[tuple, tuple[list[Tensor], Callable[[], object], Any]] = {}

    def __call__(
        self,
        objective: Callable[..., Tensor],
        x_adv: Tensor,
        x: Tensor,
        epsilon: float,
        step_size: float,
        given: tuple[Tensor, ...],
    ) -> Tensor:
        """One step, as ``attacks.sign_step``; the result is a tensor of its own."""
        if len(x) != self._batch or any(network.view is None for network in self._networks):
            return attacks.sign_step(objective, x_adv, x, epsilon, step_size, given)
        for network in self._networks:
            network.refresh_view()
        x_adv = x_adv.detach()
        if self._cuda_graph:
            return self._replay(objective, x_adv, x, epsilon, step_size, given)
        return self._step(objective, x_adv, x, epsilon, step_size, given)

    def _replay(
        self,
        objective: Callable[..., Tensor],
        x_adv: Tensor,
        x: Tensor,
        epsilon: float,
        step_size: float,
        given: tuple[Tensor, ...],
    ) -> Tensor:
        """The step on static buffers: captured at its first call, replayed afterwards."""
        models = tuple(cell.cell_contents for cell in objective.__closure__ or ())
        inputs = (x_adv, x, *given)
        layout = tuple((tensor.shape, tensor.dtype, tensor.stride()) for tensor in inputs)
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = (objective.__code__, tuple(map(id, models)), layout, epsilon, step_size, autocast)
        if key not in self._captured:
            buffers = [tensor.clone() for tensor in inputs]

            def run() -> None:
                moved, centre, *rest = buffers
                moved.copy_(self._step(objective, moved, centre, epsilon, step_size, tuple(rest)))

            # The models are kept, so that no other object can take their ids.
            self._captured[key] = (buffers, _captured(run, x.device), models)
        buffers, replay, _ = self._captured[key]
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        replay()
        return buffers[
            0
        ].clone()  # the next replay overwrites the buffer, and the step's passes are remembered by x_adv


def _captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """What does run()'s work again: the replay of a CUDA graph; on the CPU, which has none, run itself."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are chosen and compiled outside of the capture
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
