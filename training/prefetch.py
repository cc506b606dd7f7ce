"""Batches on the device, and the time spent waiting for them.

On CUDA the next batch is copied and normalised on a side stream while the model works on the current one, and waiting is
what the GPU had to wait, by its own events. Elsewhere it is the time that fetching a batch takes: all of a batch's making
without workers, and what workers leave of it otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor, Tensor]
"""Images (B, C, H, W), targets (B,), indices (B,); indices stay on the CPU."""


class Feed:
    """Hands out a loader's batches as the model's input.

    Args:
        prepare: From a loader's images to the model's input on the device.
        device: Where targets go.
    """

    def __init__(self, prepare: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.prepare = prepare
        self.device = device
        self._seconds = 0.0

    def read(self, batches: Iterable[Any]) -> Iterator[Batch]:
        """The batches in their order, prepared. What fetching one raises is raised in that one's place."""
        self._seconds = 0.0
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = self._prepared(next(iterator))
            except StopIteration:
                return
            finally:
                self._seconds += time.perf_counter() - start
            yield batch

    def waited(self) -> float:
        """Seconds spent waiting for batches since the last call, or since the reading began."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _prepared(self, batch: Any) -> Batch:
        images, targets, indices = batch
        return self.prepare(images), targets.to(self.device, non_blocking=True), indices


class CudaFeed(Feed):
    """One batch ahead, on a stream of its own."""

    def __init__(self, prepare: Callable[[Tensor], Tensor], device: torch.device) -> None:
        super().__init__(prepare, device)
        # one for good: the allocator keeps blocks by stream, and those of a stream that is gone are lost
        self.stream = torch.cuda.Stream(device)
        self._waits: list[tuple[Any, Any]] = []  # events before and after each wait

    def read(self, batches: Iterable[Any]) -> Iterator[Batch]:
        self._waits.clear()
        started = one_ahead(map(self._start, iter(batches)))
        while True:
            current = torch.cuda.current_stream(self.device)
            began = current.record_event(torch.cuda.Event(enable_timing=True))
            item = next(started, None)  # the host may wait for workers here, and the GPU has nothing to do meanwhile
            if item is None:
                return
            batch, ready = item
            current.wait_event(ready)
            for part in batch[:2]:
                part.record_stream(current)  # its memory is not given to the next batch while the model reads it
            self._waits.append((began, current.record_event(torch.cuda.Event(enable_timing=True))))
            yield batch

    def waited(self) -> float:
        """Seconds the GPU stood idle for want of a batch; waits for what was queued before."""
        waits, self._waits = self._waits, []
        for _, ended in waits:
            ended.synchronize()
        return sum(began.elapsed_time(ended) for began, ended in waits) / 1000

    def _start(self, batch: Any) -> tuple[Batch, Any]:
        """A batch on its way, and the event of its arrival."""
        with torch.cuda.stream(self.stream):
            prepared = self._prepared(batch)
            return prepared, self.stream.record_event()


def one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items in their order, each handed out when the next one is there, or known to be none.

    An error in place of an item is raised in that item's place, after those before it were handed out.
    """
    end = object()

    def fetch() -> tuple[Any, Exception | None]:
        try:
            return next(items, end), None
        except Exception as error:
            return end, error

    item, error = fetch()
    while item is not end:
        following, following_error = fetch()
        yield item
        item, error = following, following_error
    if error is not None:
        raise error


def build_feed(prepare: Callable[[Tensor], Tensor], device: torch.device) -> Feed:
    """The feed for a device."""
    return CudaFeed(prepare, device) if device.type == "cuda" else Feed(prepare, device)
