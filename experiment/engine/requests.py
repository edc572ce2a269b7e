"""Requests of one rank to all ranks at the next step boundary: stop or save."""

from collections import deque

import torch
from torch import Tensor

REQUESTS = ("stop", "save")


class StepRequests:
    """Requests sent with the gradients, so that all ranks see them after the same step.

    They are two numbers in the all-reduce of the gradients, which costs no further synchronisation. On CUDA the sums
    are copied to the host asynchronously and read one step later, so that the host does not wait for the device.
    """

    def __init__(self, device: torch.device, world: int) -> None:
        self._device, self._world = device, world
        self._mine: set[str] = set()
        self._sums: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def ask(self, request: str) -> None:
        """Send one of REQUESTS to all ranks in each step, until ``forget``."""
        self._mine.add(request)

    def forget(self, request: str) -> None:
        """Drop a request that all ranks have met; pending requests of other ranks are sent again."""
        self._mine.discard(request)
        self._sums.clear()

    def outgoing(self) -> Tensor:
        """This rank's requests, (2,) of zeros and ones, to be summed over the ranks."""
        # Filled on the device, because a copy from the host would synchronise.
        flags = torch.zeros(len(REQUESTS), device=self._device)
        for i, request in enumerate(REQUESTS):
            if request in self._mine:
                flags[i].fill_(1)
        return flags

    def incoming(self, sums: Tensor) -> None:
        """Take the sum of the ranks' requests of this step, (2,): above zero if any rank has sent the request."""
        if self._device.type != "cuda":
            self._sums.append((sums.clone(), None))
            return
        copied = torch.cuda.Event()
        self._sums.append((sums.to("cpu", non_blocking=True), copied))
        copied.record()

    def agreed(self) -> set[str]:
        """Return the requests of any rank up to the last step (on CUDA, the step before); the same set on all ranks."""
        if self._world == 1:
            return set(self._mine)
        found = set()
        while len(self._sums) > (self._device.type == "cuda"):
            sums, copied = self._sums.popleft()
            if copied is not None:
                copied.synchronize()
            found |= {request for request, value in zip(REQUESTS, sums.tolist(), strict=True) if value > 0}
        return found
