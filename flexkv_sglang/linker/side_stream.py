"""Side streams: a worker thread's copies run on one, and events order them with other work of the device.

A thread starts on device 0 and the default stream; ``current`` puts it on the right device and a stream of its
own, of high priority: a copy that waits behind the forward pass delays the next one. On a CPU all work is done
when a call returns, and there are no events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SideStream:
    """The stream of one worker thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device=device, priority=-1)

    @contextmanager
    def current(self) -> Iterator[None]:
        """The calling thread issues its work on this stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def continue_after(self, events: Iterable[Any]) -> None:
        """Work that is issued from now on begins after these events; the thread does not wait."""
        for event in events:
            if self._stream is not None and event is not None:
                self._stream.wait_event(event)

    def record(self) -> Any:
        """An event behind all issued work; None on a CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event


def record_here(device: torch.device) -> Any:
    """An event on the calling thread's current stream; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def continue_after(event: Any, device: torch.device) -> None:
    """The calling thread's current stream continues after ``event``; the thread does not wait."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


def synchronize(event: Any) -> None:
    """Wait until all work before ``event`` is done."""
    if event is not None:
        event.synchronize()
