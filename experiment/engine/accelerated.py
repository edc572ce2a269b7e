"""The same functions, with less work: a network wrapped so that a training step runs only what the mathematics needs.

``Accelerated(model)`` is called like the model and computes the same logits and the same BatchNorm statistics:

- frozen eval-mode passes (attacks, teacher, evaluation) run on a view with BatchNorm folded into convolutions;
- a pass of the very tensor that this step has run before is not run again (beta = 1: the plus point is x_adv; a T(x)
  that the attack used): its logits are given again, and in train mode the BatchNorm statistics move as the
  second pass would have moved them;
- with compile, both go through torch.compile, at one static shape; other shapes (the last, odd batch) run eagerly.

The equality is tested in float64 against the plain networks (tests/test_accelerate.py), and the gain is measured by
``python -m benchmarks.training_step``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

import attacks
from experiment.engine.folding import FoldedConv, folded_view


@dataclass
class RememberedPass:
    """One forward pass of this step, kept for a repetition."""

    x: Tensor
    version: int
    train: bool
    grad: bool
    weights: int
    logits: Tensor
    statistics_added: Tensor | None

    def is_of(self, x: Tensor, train: bool, grad: bool, weights: int) -> bool:
        """Whether a pass of x in this mode, with weights of this version, is the same pass."""
        return self.x is x and (self.version, self.train, self.grad, self.weights) == (x._version, train, grad, weights)


class View:
    """A folded view that follows the weights it was made of. No module: its weights are no one's parameters."""

    def __init__(self, graph: fx.GraphModule, compiled: bool) -> None:
        self.graph = graph
        self.compiled = torch.compile(graph, dynamic=False) if compiled else graph
        self._layers = [module for module in graph.modules() if isinstance(module, FoldedConv)]
        self._sources = [tensor for layer in self._layers for tensor in layer.sources]
        self._made_from: tuple[int, ...] | None = None

    def forget(self) -> None:
        """Something moved that leaves no trace in a version."""
        self._made_from = None

    def refresh(self) -> None:
        """Follow the weights, unless none has moved."""
        versions = tuple(tensor._version for tensor in self._sources)
        if versions != self._made_from:
            for layer in self._layers:
                layer.refresh()
            self._made_from = versions


class Accelerated(nn.Module):
    """A network that is called like `model`, shares its weights, and does no work twice."""

    def __init__(self, model: nn.Module, *, compiled: bool, batch: int) -> None:
        """Wrap a network; its weights stay where they are.

        Args:
            model: the student or the teacher.
            compiled: run batches of `batch` images through torch.compile.
            batch: the usual number of images.

        Attributes:
            view: the folded view that frozen passes run on; None where the model cannot be traced.
        """
        super().__init__()
        self.model, self.batch = model, batch
        graph = folded_view(model)
        self.view = None if graph is None else View(graph, compiled)
        self._weights = tuple(model.parameters())  # walking the modules at each call takes longer than the rest of it
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._replays = all(norm.track_running_stats and norm.momentum is not None for norm in self._norms)
        norms = self._norms if self._replays else []
        keep = [torch.full_like(statistic, 1 - norm.momentum) for norm in norms for statistic in _running(norm)]
        self._keep = torch.cat(keep) if keep else None
        self._passes: list[RememberedPass] | None = None
        self._compiled = (torch.compile(model, dynamic=False) if compiled else model,)  # in a tuple: no submodule

    def begin_step(self) -> None:
        """From now on remember passes; forget those of the step before."""
        self._passes = []

    def end_step(self) -> None:
        """Forget the passes, so that their activations can be freed, and remember no more."""
        self._passes = None

    def weights_moved(self) -> None:
        """Forget what follows from the weights; for changes that leave no trace in a tensor's version.

        A fused optimizer makes such changes, and so does whoever writes to ``parameter.data``.
        """
        if self.view is not None:
            self.view.forget()
        if self._passes is not None:
            self._passes = []

    def compiled_error(self, x: Tensor) -> float:
        """Largest difference between compiled and eager logits of x, relative to the range of the eager ones.

        Compares the pass of an attack and, of a network in train mode, that of the training step. Weights, BatchNorm
        statistics and modes end as they began.
        """
        pairs = []
        with attacks.frozen(self.model):
            x_in = x.detach().requires_grad_()
            if self.view is not None:
                self.view.refresh()
                pairs.append((self.view.graph(x_in), self.view.compiled(x_in)))
            else:
                pairs.append((self.model(x_in), self._compiled[0](x_in)))
        if self.model.training:
            kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
            pairs.append((self.model(x), self._compiled[0](x)))
            for buffer, value in kept:
                buffer.copy_(value)
            self.weights_moved()
        pairs = [(eager.detach().float(), ours.detach().float()) for eager, ours in pairs]
        return max(((ours - eager).abs().max() / (eager.max() - eager.min())).item() for eager, ours in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits of x (N, 3, H, W)."""
        train, grad = self.model.training, torch.is_grad_enabled()
        if train:
            self._statistics_move()
        if self._passes is None or (grad and not train) or (train and not self._replays):
            # Attack steps, whose x is new each time, and everything outside of a training step.
            return self._run(x)
        weights = sum(p._version for p in self._weights)
        for earlier in self._passes:
            if earlier.is_of(x, train, grad, weights):
                if earlier.statistics_added is not None:
                    self._repeat_statistics(earlier.statistics_added)
                return earlier.logits
        moving = train and self._keep is not None
        before = self._statistics() if moving else None
        logits = self._run(x)
        added = self._statistics() - self._keep * before if moving else None
        self._passes.append(RememberedPass(x, x._version, train, grad, weights, logits, added))
        return logits

    def _run(self, x: Tensor) -> Tensor:
        usual, view = len(x) == self.batch, self.view
        if self.model.training:
            return self._compiled[0](x) if usual else self.model(x)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._weights):
            return self.model(x)  # gradients of the weights are wanted
        if view is None:
            return self._compiled[0](x) if usual else self.model(x)
        view.refresh()
        return view.compiled(x) if usual else view.graph(x)

    # A train-mode pass moves every running statistic r to (1 - m) r + m s, where s depends on x and the weights only.
    # What it adds, m s = r_after - (1 - m) r_before, is all that a repetition of the pass needs. All statistics go in
    # one tensor: a GPU takes as long to start work on one number as on ten thousand.

    def _statistics_move(self) -> None:
        """A train-mode pass, run or repeated, moves what eval-mode passes depend on, without a trace in its version."""
        if self.view is not None:
            self.view.forget()
        if self._passes is not None:
            self._passes = [earlier for earlier in self._passes if earlier.train]

    def _statistics(self) -> Tensor:
        return torch.cat([statistic for norm in self._norms for statistic in _running(norm)])

    def _repeat_statistics(self, added: Tensor) -> None:
        parts = iter(added.split([len(statistic) for norm in self._norms for statistic in _running(norm)]))
        for norm in self._norms:
            for statistic in _running(norm):
                # .data: as in BatchNorm's own forward, the graph of the pass must not see that statistics moved on.
                torch.add(next(parts), statistic.data, alpha=1 - norm.momentum, out=statistic.data)
            norm.num_batches_tracked += 1


def _running(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var
