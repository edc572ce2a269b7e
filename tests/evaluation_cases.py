"""Networks, images and a quick AutoAttack, shared by the tests of evaluation."""

import torch
from torch import nn

from experiment import compat

EPSILON = 0.05


def tiny_network(classes=10, seed=0):
    """A smooth little network on 3x8x8 images; large weights, so that small perturbations matter."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Softplus(), nn.Flatten(), nn.Linear(72, classes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    return network.eval()


class Masked(nn.Module):
    """A tiny network behind a rounding that has no gradient."""

    def __init__(self):
        super().__init__()
        self.network = tiny_network()

    def forward(self, x):
        return self.network((x * 64).round() / 64)


def labelled(network, count=12, wrong=2, seed=1):
    """Random uint8 images, labelled as the network sees them, but for the last `wrong`."""
    x = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    y = network(x / 255).argmax(dim=1)
    y[count - wrong :] = (y[count - wrong :] + 1) % 10
    return x, y


def without_seconds(result):
    return {name: value for name, value in result.items() if "seconds" not in name}


def quicken(monkeypatch):
    """Put an AutoAttack of few iterations in the package's place; the list of its calls: attack, x, x_adv, batch."""
    published, calls = compat.import_autoattack(), []

    class Small(published):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.apgd.n_iter = self.apgd_targeted.n_iter = 1  # so that FAB-T finds images that they left
            self.fab.n_iter = 4
            self.square.n_queries = 60

        def run_standard_evaluation(self, x, y, /, *, batch_size=250, state_path=None):
            x_adv, y_adv = super().run_standard_evaluation(x, y, batch_size=batch_size)
            calls.append((self.attacks_to_run[0], x, x_adv, batch_size))
            return x_adv, y_adv

    monkeypatch.setattr("pyautoattack.AutoAttack", Small)
    return calls


def replace_run(monkeypatch, run):
    """Let the (small) AutoAttack answer run(attack, x, y, a function that gives the real answer)."""
    small_class = compat.import_autoattack()

    class Replaced(small_class):
        def run_standard_evaluation(self, x, y, /, *, batch_size=250, state_path=None):
            def real():
                return small_class.run_standard_evaluation(self, x, y, batch_size=batch_size)

            real.adversary = self
            return run(self.attacks_to_run[0], x, y, real)

    monkeypatch.setattr("pyautoattack.AutoAttack", Replaced)


OUT_OF_MEMORY = (
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    (RuntimeError, "GET was unable to find an engine to execute this computation"),
    (torch.AcceleratorError, "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)
"""The shapes in which torch says that memory does not suffice: its allocator, cuDNN, CUDA, cuBLAS."""


class SmallMemory(nn.Module):
    """A network that fits into the device's memory with so many images at most."""

    def __init__(self, network, most):
        super().__init__()
        self.network, self.most, self.sizes, self.shape = network, most, [], 0

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            self.shape += 1
            kind, text = OUT_OF_MEMORY[self.shape % len(OUT_OF_MEMORY)]
            raise kind(text)
        return self.network(x)
