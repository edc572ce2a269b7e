"""The training step of the scripts for timing, as it is and without each of its optimisations."""

import contextlib
import copy
import importlib
import itertools
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import measure, published
from experiment import cli, optim
from experiment.engine import Engine

EPOCH = 1
Networks = tuple[nn.Module, nn.Module]
Batches = list[tuple[torch.Tensor, torch.Tensor]]


class ProductStep:
    """The training step of a method's script on given networks and batches.

    Uses --preset paper, so that its losses are those of the published step.
    """

    def __init__(self, method: str, networks: Networks, batches: Batches, *flags: str) -> None:
        """Build the step of METHOD_cifar100.py with these flags; networks are student and teacher."""
        self.script = importlib.import_module(f"{method}_cifar100")
        x, _ = batches[0]
        argv = ["--preset", "paper", "--device", str(x.device), "--batch", str(len(x)), *flags]
        self.args = cli.parse_args(self.script.__file__, self.script.RECIPE, argv)
        measure.RESEARCH_CODE.apply()  # the engine changes what it needs
        self.engine = Engine(self.args)
        self.student, teacher = networks
        self.optimizer = optim.sgd(self.student, self.args)
        self.engine.distribute(self.student, self.optimizer)
        optim.set_lr(self.optimizer, self.args, EPOCH)
        self.networks = self.engine.accelerate(self.student), self.engine.accelerate(teacher)
        self._batches = itertools.cycle(batches)

    def __call__(self) -> dict[str, torch.Tensor]:
        """Take one optimizer step on the next batch; return the terms of its loss."""
        x, y = next(self._batches)
        self.student.train()
        with self.engine.step():
            terms = self.script.training_loss(*self.networks, x, y, EPOCH, self.args)
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        self.optimizer.step()
        return terms


def published_step(method: str, networks: Networks, batches: Batches) -> Callable[[], float]:
    """The published step on these networks and batches."""
    measure.RESEARCH_CODE.apply()
    student, teacher = networks
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    rounds = itertools.cycle(batches)
    return lambda: published.training_step(method, student, teacher, optimizer, *next(rounds))


def without_graph(step: ProductStep) -> None:
    """Launch each kernel of an attack step from the host."""
    step.engine._attack_step = None


def without_folding(step: ProductStep) -> None:
    """Run the frozen network itself instead of its folded view."""
    for fast in step.networks:
        fast.view = None


def without_channels_last(step: ProductStep) -> None:
    """Use the contiguous NCHW layout for weights, and thus for activations."""
    for fast in step.networks:
        fast.model.to(memory_format=torch.contiguous_format)
        for layer in fast.view._layers if fast.view else ():
            layer.weight = layer.weight.contiguous()


def without_reuse(step: ProductStep) -> None:
    """Compute every forward pass of the script, without reusing one of this step."""
    for fast in step.networks:
        fast.step = contextlib.nullcontext


TRICKS: dict[str, tuple[Callable[[ProductStep], None], ...]] = {
    "product": (),
    "without CUDA graph": (without_graph,),
    "without folding BatchNorm": (without_folding,),
    "without channels_last": (without_channels_last,),
    "without reuse of passes": (without_reuse,),
    "without all three": (without_channels_last, without_folding, without_reuse),
}
"""Name, and the changes to a step. "All three" are the last three before it: without folding, the step has no graph."""


def setting_of(
    method: str,
    networks: Networks,
    batches: Batches,
    kind: str,
    precision: str = "fp32",
    compiled: int = 0,
    trick: str = "product",
    teacher_every: int = 1,
) -> measure.Setting:
    """A step that is ready to be timed, on copies of the networks; `kind` is published or product."""

    def build() -> Callable[[], object]:
        copies = copy.deepcopy(networks)
        if kind == "published":
            return published_step(method, copies, batches)
        flags = ["--precision", precision, "--compile", str(compiled)]
        flags += ["--teacher_every", str(teacher_every)] * (teacher_every > 1)
        step = ProductStep(method, copies, batches, *flags)
        for change in TRICKS[trick]:
            change(step)
        return step

    fields = {"method": method, "step": kind, "precision": precision, "compile": compiled}
    if teacher_every > 1:
        fields["teacher_every"] = teacher_every
    return measure.Setting(fields, batches[0][0].device, build)
