"""The gradient step of an attack as a CUDA graph.

A step runs two networks forward and backward to the input, then updates the images. These are some thousand kernels,
and launching them takes the host longer than running them takes an H200. A graph launches all of them at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import attacks


class GraphedStep:
    """A step for ``attacks.steps_by`` that captures `attacks.sign_step` once and replays it.

    Other batch sizes, networks without a folded view, and objectives with state (``--teacher_every``) use
    `attacks.sign_step` directly. On the CPU, which has no graphs, the step runs eagerly on the same static buffers.
    """

    def __init__(self, networks: Sequence[Any], batch: int) -> None:
        """Take the accelerated networks and the usual number of images; the first step captures."""
        self._networks, self._batch = networks, batch
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
        """Take one step like ``attacks.sign_step``; return a new tensor."""
        models = tuple(cell.cell_contents for cell in objective.__closure__ or ())
        stateless = all(isinstance(model, nn.Module) for model in models)
        if len(x) != self._batch or not stateless or any(network.view is None for network in self._networks):
            return attacks.sign_step(objective, x_adv, x, epsilon, step_size, given)
        for network in self._networks:
            network.view.refresh()
        inputs = (x_adv.detach(), x, *given)
        layout = tuple((tensor.shape, tensor.dtype, tensor.stride()) for tensor in inputs)
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = (objective.__code__, tuple(map(id, models)), layout, epsilon, step_size, autocast)
        if key not in self._captured:
            buffers = [tensor.clone() for tensor in inputs]

            def run() -> None:
                moved, centre, *rest = buffers
                moved.copy_(attacks.sign_step(objective, moved, centre, epsilon, step_size, tuple(rest)))

            # Keep the models, so that their ids stay unique.
            self._captured[key] = (buffers, _captured(run, x.device), models)
        buffers, replay, _ = self._captured[key]
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        replay()
        return buffers[0].clone()  # the next replay overwrites the buffer


def _captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return the replay of a CUDA graph of run(); on the CPU, run itself."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # choose and compile kernels before the capture
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
