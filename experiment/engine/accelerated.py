"""A wrapper that avoids redundant passes of a network in a training step, and an attack's step as a CUDA graph.

``Accelerated(model)`` is called like the model and computes the same logits and the same BatchNorm statistics:

- frozen eval-mode passes (attacks, teacher, evaluation) run on a view with BatchNorm folded into convolutions;
- a repeated pass of the same tensor within a step is not computed again (with beta = 1 the plus point is x_adv; the
  attack and the loss share T(x)): its logits are reused, and in train mode the BatchNorm statistics are updated as by
  a second pass;
- with compile, both use torch.compile at one static shape; other shapes (a smaller last batch) run eagerly.

tests/test_accelerate.py compares with the plain networks in float64; ``python -m benchmarks.training_step`` measures
the speedup.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import attacks


class FoldedConv(nn.Module):
    """A convolution with the eval-mode BatchNorm that follows it; `refresh` computes its weights from both layers."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self._origin = (conv, bn)  # in a tuple, so that they are not submodules
        weight = torch.empty_like(conv.weight, memory_format=torch.channels_last, requires_grad=False)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", weight.new_empty(len(weight)))

    def forward(self, x: Tensor) -> Tensor:
        conv = self._origin[0]
        return F.conv2d(x, self.weight, self.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @property
    def sources(self) -> list[Tensor]:
        """The tensors from which the folded weights are computed."""
        conv, bn = self._origin
        found = [conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var]
        return [tensor for tensor in found if tensor is not None]

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the weights in place: compiled code and CUDA graphs keep their addresses."""
        conv, bn = self._origin
        scale = torch.rsqrt(bn.running_var + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight
        shift = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
        self.weight.copy_(conv.weight * scale[:, None, None, None])
        self.bias.copy_(shift * scale if bn.bias is None else shift * scale + bn.bias)


def folded_view(model: nn.Module) -> fx.GraphModule | None:
    """Trace the model's eval-mode forward and fold each BatchNorm that follows a convolution into it.

    Modules that cannot be folded are shared with the model. Returns None, and the model then runs as it is, if a trace
    would be wrong: the forward cannot be traced (branches on data), has hooks (weight_norm recomputes the weight in
    each pass), or creates tensors, such as random ones, that a trace would treat as constants.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None
    with attacks.frozen(model):
        try:
            # Traced in eval mode, which fixes constants such as dropout's training flag.
            graph = fx.Tracer().trace(model)
        except Exception:  # the exception depends on the traced code
            return None
    weights = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    if any(node.op == "get_attr" and node.target not in weights for node in graph.nodes):
        return None
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    view = fx.GraphModule(model, graph)
    for node in list(graph.nodes):
        bn = modules.get(node.target) if node.op == "call_module" else None
        before = node.args[0] if node.args else None
        if not isinstance(bn, nn.BatchNorm2d) or bn.running_var is None or not isinstance(before, fx.Node):
            continue
        conv = modules.get(before.target) if before.op == "call_module" else None
        # Folding changes every use of a convolution, so this must be its only one.
        once = conv is not None and calls[before.target] == len(before.users) == 1 and before.target not in read
        if once and type(conv) is nn.Conv2d and conv.padding_mode == "zeros":
            view.set_submodule(before.target, FoldedConv(conv, bn))
            node.replace_all_uses_with(before)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    view.recompile()
    return view


class View:
    """A folded view that is kept up to date with its source weights. Not a module, so that it has no parameters."""

    def __init__(self, graph: fx.GraphModule, compiled: bool) -> None:
        self.graph = graph
        self.compiled = torch.compile(graph, dynamic=False) if compiled else graph
        self._layers = [module for module in graph.modules() if isinstance(module, FoldedConv)]
        self._sources = [tensor for layer in self._layers for tensor in layer.sources]
        self._made_from: tuple[int, ...] | None = None

    def forget(self) -> None:
        """Recompute at the next refresh, after a change that tensor versions do not show."""
        self._made_from = None

    def refresh(self) -> None:
        """Recompute the folded weights if any source weight has changed."""
        versions = tuple(tensor._version for tensor in self._sources)
        if versions != self._made_from:
            for layer in self._layers:
                layer.refresh()
            self._made_from = versions


class Accelerated(nn.Module):
    """A network that is called like `model`, shares its weights, and skips redundant passes."""

    def __init__(self, model: nn.Module, *, compiled: bool, batch: int) -> None:
        """Wrap a network without copying its weights; if compiled, batches of `batch` images use torch.compile."""
        super().__init__()
        self.model, self.batch = model, batch
        graph = folded_view(model)  # for frozen passes; None if the model cannot be traced
        self.view = None if graph is None else View(graph, compiled)
        self._weights = tuple(model.parameters())  # walking the modules at each call is slow
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._replays = all(norm.track_running_stats and norm.momentum is not None for norm in self._norms)
        # A pass may also change other buffers, such as those of a spectral normalisation.
        self._replays &= sum(len(list(norm.buffers())) for norm in self._norms) == len(list(model.buffers()))
        norms = self._norms if self._replays else []
        keep = [torch.full_like(statistic, 1 - norm.momentum) for norm in norms for statistic in _running(norm)]
        self._keep = torch.cat(keep) if keep else None
        # Passes of this step: by kind, x, and the logits and the statistics' added part. None outside a step.
        self._passes: dict[tuple, tuple[Tensor, Tensor, Tensor | None]] | None = None
        self._compiled = (torch.compile(model, dynamic=False) if compiled else model,)  # in a tuple: no submodule

    @contextmanager
    def step(self) -> Iterator[None]:
        """Remember passes; forget them at the end, so that their activations can be freed."""
        self._passes = {}
        try:
            yield
        finally:
            self._passes = None

    def weights_moved(self) -> None:
        """Forget results that depend on the weights, after a change that tensor versions do not show.

        A fused optimizer makes such changes, and so do writes to ``parameter.data``.
        """
        if self.view is not None:
            self.view.forget()
        if self._passes is not None:
            self._passes.clear()

    def compiled_error(self, x: Tensor) -> float:
        """Largest difference between compiled and eager logits of x, relative to the range of the eager ones.

        Compares the pass of an attack and, of a network in train mode, that of the training step.
        """
        kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        eager, compiled = self.model, self._compiled[0]
        pairs = [(eager(x), compiled(x))] if self.model.training else []
        for buffer, value in kept:
            buffer.copy_(value)
        self.weights_moved()
        with attacks.frozen(self.model):
            if self.view is not None:
                self.view.refresh()
                eager, compiled = self.view.graph, self.view.compiled
            x = x.detach().requires_grad_()
            pairs.append((eager(x), compiled(x)))
        pairs = [(logits.detach().float(), ours.detach().float()) for logits, ours in pairs]
        return max(((ours - logits).abs().max() / (logits.max() - logits.min())).item() for logits, ours in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits of x (N, 3, H, W)."""
        train, grad = self.model.training, torch.is_grad_enabled()
        if train:
            self._statistics_move()
        if self._passes is None or (grad and not train) or (train and not self._replays):
            # Attack steps, whose x is always new, and everything outside a training step.
            return self._run(x)
        kind = (train, grad, id(x), x._version, sum(p._version for p in self._weights))
        if kind in self._passes:
            _, logits, added = self._passes[kind]
            if added is not None:
                self._repeat_statistics(added)
            return logits
        moving = train and self._keep is not None
        before = self._statistics() if moving else None
        random = _random_state(x.device)
        logits = self._run(x)
        if not torch.equal(_random_state(x.device), random):
            return logits  # such as with dropout: the next pass draws anew
        added = self._statistics() - self._keep * before if moving else None
        self._passes[kind] = (x, logits, added)  # with x, so that its id stays unique
        return logits

    def _run(self, x: Tensor) -> Tensor:
        usual, view = len(x) == self.batch, self.view
        if self.model.training:
            return self._compiled[0](x) if usual else self.model(x)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._weights):
            return self.model(x)  # weight gradients are needed
        if view is None:
            return self._compiled[0](x) if usual else self.model(x)
        view.refresh()
        return view.compiled(x) if usual else view.graph(x)

    # A train-mode pass updates every running statistic r to (1 - m) r + m s, where s depends on x and the weights only.
    # A repeated pass needs only the added part, m s = r_after - (1 - m) r_before. All statistics are in one tensor, to
    # launch few kernels.

    def _statistics_move(self) -> None:
        """Forget eval-mode results: train-mode passes update the statistics, which tensor versions do not show."""
        if self.view is not None:
            self.view.forget()
        if self._passes is not None:
            self._passes = {kind: earlier for kind, earlier in self._passes.items() if kind[0]}

    def _statistics(self) -> Tensor:
        return torch.cat([statistic for norm in self._norms for statistic in _running(norm)])

    def _repeat_statistics(self, added: Tensor) -> None:
        parts = iter(added.split([len(statistic) for norm in self._norms for statistic in _running(norm)]))
        for norm in self._norms:
            for statistic in _running(norm):
                # .data: as in BatchNorm's forward, the update must not invalidate the graph of the pass.
                torch.add(next(parts), statistic.data, alpha=1 - norm.momentum, out=statistic.data)
            norm.num_batches_tracked += 1


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _running(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var


class GraphedStep:
    """A step for ``attacks.steps_by`` that captures `attacks.sign_step` as a CUDA graph once and replays it.

    A step launches some thousand kernels, which takes the host longer than running them takes an H200. A graph launches
    all of them at once. Other batch sizes, networks without a folded view, and objectives with state
    (``--teacher_every``) use `attacks.sign_step` directly. On the CPU, which has no graphs, the step runs eagerly on
    the same static buffers.
    """

    def __init__(self, networks: Sequence[Accelerated], batch: int) -> None:
        """Take the accelerated networks and the usual number of images; the first step captures."""
        self._networks, self._batch = networks, batch
        self._captured: dict[tuple, tuple[list[Tensor], Callable[[], object]]] = {}

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
        stateless = not objective.__defaults__ and all(isinstance(model, nn.Module) for model in models)
        if len(x) != self._batch or not stateless or any(network.view is None for network in self._networks):
            return attacks.sign_step(objective, x_adv, x, epsilon, step_size, given)
        for network in self._networks:
            network.view.refresh()
        inputs = (x_adv.detach(), x, *given)
        layout = tuple((tensor.shape, tensor.dtype, tensor.stride()) for tensor in inputs)
        key = (objective.__code__, models, layout, epsilon, step_size)
        if key not in self._captured:
            buffers = [tensor.clone() for tensor in inputs]

            def run() -> None:
                moved, centre, *rest = buffers
                moved.copy_(attacks.sign_step(objective, moved, centre, epsilon, step_size, tuple(rest)))

            self._captured[key] = (buffers, _captured(run, x.device))
        buffers, replay = self._captured[key]
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
