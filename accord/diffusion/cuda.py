"""What the engine's threads need of CUDA; nothing of it happens on a CPU."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch


def make_event(*, blocking: bool = False) -> Any:
    """A CUDA event; `blocking` ones do not spin while they are waited for."""
    event: Any = torch.cuda.Event  # torch's constructor has no types
    return event(blocking=blocking)


def new_stream(device: torch.device) -> Any:
    stream: Any = torch.cuda.Stream
    return stream(device)


class Pace:
    """CUDA calls return before the work is done: this lets at most one step be launched ahead, or a cancelled
    sample would go on for many."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._launched: deque[Any] = deque()

    def launched(self) -> None:
        """To be called after each step; waits for the step before it."""
        if not self._cuda:
            return
        event = make_event(blocking=True)
        event.record()
        self._launched.append(event)
        if len(self._launched) > 1:
            self._launched.popleft().synchronize()
