"""What one rank asks of all ranks at the next step boundary: to stop, or to save."""

from collections import deque

import torch
from torch import Tensor

REQUESTS = ("stop", "save")


class StepRequests:
    """Requests that travel with the gradients, so that all ranks see them after one and the same step.

    An exchange of their own would cost every step a wait for the slowest rank; here two numbers are added to an
    all-reduce that is made anyway. On CUDA the sums are copied to the host aside and read one step later, when they
    have long arrived: reading them at once would make the host wait for the device in every step.
    """

    def __init__(self, device: torch.device, world: int) -> None:
        self._device, self._world = device, world
        self._mine: set[str] = set()
        self._sums: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def ask(self, request: str) -> None:
        """Ask all ranks for one of REQUESTS, until ``forget``."""
        self._mine.add(request)

    def forget(self, request: str) -> None:
        """A request has been met, on all ranks after the same step; what others asked for meanwhile comes again."""
        self._mine.discard(request)
        self._sums.clear()

    def outgoing(self) -> Tensor:
        """This rank's requests, (2,) of zeros and ones, to be summed over the ranks."""
        # Filled on the device: a copy from the host would wait for it.
        flags = torch.zeros(len(REQUESTS), device=self._device)
        for i, request in enumerate(REQUESTS):
            if request in self._mine:
                flags[i].fill_(1)
        return flags

    def incoming(self, sums: Tensor) -> None:
        """Take the sum of the ranks' requests of this step, (2,): above zero where any rank has asked."""
        if self._device.type != "cuda":
            self._sums.append((sums.clone(), None))
            return
        copied = torch.cuda.Event()
        self._sums.append((sums.to("cpu", non_blocking=True), copied))
        copied.record()

    def agreed(self) -> set[str]:
        """What any rank had asked for by the step just made (on CUDA, the one before it); the same on all ranks."""
        if self._world == 1:
            return set(self._mine)
        found = set()
        while len(self._sums) > (self._device.type == "cuda"):
            sums, copied = self._sums.popleft()
            if copied is not None:
                copied.synchronize()
            found |= {request for request, value in zip(REQUESTS, sums.tolist(), strict=True) if value > 0}
        return found
