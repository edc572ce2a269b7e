"""Device, precision, determinism, and several processes with torch.distributed."""

import argparse
import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

import attacks
from experiment import UserError
from experiment.engine.accelerated import Accelerated, GraphedStep

COMPILED_TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1}
"""Allowed difference between compiled and eager logits, relative to their range.

Fused kernels round in another order. A product keeps 23, 10 or 7 bits; some twenty layers make ten times the rounding
of one. A wrong kernel (pytorch#181696) is off by the range itself.
"""

Value = TypeVar("Value")


class Engine:
    """Device, precision and ranks of one run.

    Attributes:
        device: torch.device of this process.
        rank, world: this process and the number of processes (0 and 1 without torchrun).
        local_batch: this rank's number of images of the global batch.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Set up ranks, device, TF32, determinism and seed of this process."""
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.precision, self.compile, self._batch = args.precision, bool(args.compile), args.batch
        self._fast: list[Accelerated] = []
        self._attack_step: GraphedStep | None = None
        self.device = self._own_device(args.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            cuda = self.device.type == "cuda"
            dist.init_process_group("nccl" if cuda else "gloo", device_id=self.device if cuda else None)
            # Without this, threads of the group sometimes abort the process at its end.
            atexit.register(dist.destroy_process_group)
        self._first, self.local_batch, self._total = 0, 1, 1  # this rank's rows of the global batch
        self._set_numerics(deterministic=bool(args.deterministic))
        # All ranks have the same generator state; attacks.shard_of selects each rank's rows of every draw.
        torch.manual_seed(args.seed)

    def _own_device(self, device: str) -> torch.device:
        """Return this rank's device."""
        if not device.startswith("cuda"):
            return torch.device(device)
        if self.world > 1:
            ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
            if device != "cuda":
                raise UserError(f"--device {device} with {self.world} processes: use --device cuda, one GPU for each")
            if ranks > gpus:
                raise UserError(f"torchrun started {ranks} processes, but torch sees {gpus} GPU(s): each needs its own")
        # set_device needs a number.
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device)

    def _set_numerics(self, deterministic: bool) -> None:
        tf32 = self.precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            # cuBLAS reads this at its first use.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if deterministic != torch.are_deterministic_algorithms_enabled():  # the call is slow
            torch.use_deterministic_algorithms(deterministic)

    @property
    def main(self) -> bool:
        """Whether this process writes files, logs and progress."""
        return self.rank == 0

    def hardware(self) -> str:
        """Name of the GPU or CPU, with the number of processes if there are several."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        return name if self.world == 1 else f"{self.world} x {name}"

    def barrier(self) -> None:
        """Wait for all ranks."""
        gathered(None)

    def highest(self, value: int) -> int:
        """Maximum of a number over the ranks; of a flag, whether any rank has set it."""
        if self.world == 1:
            return value
        values = torch.tensor(int(value), device=self.device)
        with _all_ranks_needed():
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values.item())

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, of plain types, on every rank."""
        return gathered(value)[0]

    def on_all_ranks(self, work: Callable[[], Any]) -> Any:
        """Do the work on every rank and return its value; raise the first rank's UserError on every rank."""
        value = fault = None
        try:
            value = work()
        except UserError as error:
            fault = str(error)
        faults = [each for each in gathered(fault) if each is not None]
        if faults:
            raise UserError(faults[0])
        return value

    def begin_batch(self, first: int, local_batch: int, total: int) -> None:
        """Set this rank's rows of the global batch of `total` images."""
        self._first, self.local_batch, self._total = first, local_batch, total

    def accelerate(self, model: nn.Module | None) -> Accelerated | None:
        """Wrap a network for faster calls; the network itself is still trained and saved. None for None."""
        if model is None:
            return None
        model.to(memory_format=torch.channels_last)
        # This rank's share of a full batch; shares may differ by one image.
        batch = self._batch * (self.rank + 1) // self.world - self._batch * self.rank // self.world
        fast = Accelerated(model, compiled=self.compile, batch=batch)
        self._fast.append(fast)
        if self.compile and self.device.type == "cuda" and self.world == 1:  # not measured with several ranks
            self._attack_step = GraphedStep(self._fast, batch)
        return fast

    def check_compiled(self, x: torch.Tensor) -> None:
        """Compare the compiled networks with the eager ones on a full batch x of this rank."""
        with self.step():
            errors = [fast.compiled_error(x) for fast in self._fast]
        if not all(error <= COMPILED_TOLERANCE[self.precision] for error in errors):  # NaN is no agreement
            raise UserError(
                f"--compile 1 is not allowed here: compiled and eager logits differ by {max(errors):.2g} of their "
                "range. Use --compile 0 or another version of torch."
            )

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of the losses of one batch: reused passes, this rank's rows of random starts, and autocast for bf16.

        Under bfloat16 autocast, weights, optimizer and BatchNorm statistics stay in float32. Losses and attacks compute
        softmax, KL and cross-entropy in float32.
        """
        with ExitStack() as stack:
            for fast in self._fast:
                stack.enter_context(fast.step())
            if self.world > 1:
                stack.enter_context(attacks.shard_of(self._first, self._total))
            if self.precision == "bf16":
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if self._attack_step:
                stack.enter_context(attacks.steps_by(self._attack_step))
            yield

    def distribute(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Average gradients and BatchNorm statistics over the ranks before every optimizer step.

        After the step, every accelerated network is notified that weights changed: a fused optimizer does not increase
        tensor versions.

        There is one flat all-reduce per step. Each rank's loss is a mean over its share, so shares are weighted by
        size, and the sum is the gradient of the mean over the global batch. Running statistics are averaged too, so
        that all ranks attack, evaluate and save the same student. Batch statistics of the forward pass are per rank
        (Fidelity note 9).
        """
        optimizer.register_step_post_hook(lambda *_: [fast.weights_moved() for fast in self._fast])
        if self.world == 1:
            return
        parameters = list(model.parameters())
        statistics = [b for b in model.buffers() if b.is_floating_point()]

        def average(*_: object) -> None:
            share = self.local_batch / self._total
            tensors = [p.grad for p in parameters if p.grad is not None] + statistics
            flat = torch.cat([t.detach().reshape(-1) for t in tensors]).mul_(share)
            dist.all_reduce(flat)
            parts = flat.split([t.numel() for t in tensors])
            with torch.no_grad():
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))

        optimizer.register_step_pre_hook(average)


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def _all_ranks_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # a closed connection
        raise UserError("another rank has ended") from error


def gathered(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Return every rank's value, of plain types.

    Raises:
        UserError: another rank is gone.
    """
    everyone = [value] * ranks()[1]
    if len(everyone) > 1:
        with _all_ranks_needed():
            dist.all_gather_object(everyone, value, group=group)
    return everyone


def cpu_name() -> str:
    """Name of the CPU and number of threads."""
    name = "CPU"
    with suppress(OSError), open("/proc/cpuinfo") as file:
        name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"
