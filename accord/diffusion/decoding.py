"""The thread that turns finished latents into pixels while the next denoising steps run.

Shapes: B samples, C H W of latents.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accord.diffusion.adapters import Pixels
from accord.diffusion.batching import Sample
from accord.diffusion.cuda import make_event, new_stream
from accord.errors import EngineError

logger = logging.getLogger(__name__)

Done = Callable[[Sample, Pixels | EngineError], None]


@dataclass(frozen=True, eq=False)
class Finished:
    """Latents that need no more steps."""

    sample: Sample
    latents_CHW: Tensor
    ready: Any
    """A CUDA event that the latents are ready at; None on the CPU."""


class Decoder:
    """Decodes in batches of what is there (it never waits for more), of one model and size at a time."""

    def __init__(self, batch: int, device: torch.device, done: Done) -> None:
        self._batch = batch
        self._device = device
        self._done = done
        self._queue: deque[Finished] = deque()
        self._condition = threading.Condition()
        self._closing = False
        self.images = 0
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="accord-decoder", daemon=True)
        self._thread.start()

    def put(self, samples: list[Sample], latents_BCHW: Tensor) -> None:
        """Takes finished samples; returns at once."""
        ready: Any = None
        if latents_BCHW.is_cuda:
            ready = make_event()
            ready.record()
        with self._condition:
            self._queue.extend(
                Finished(sample, latents_BCHW[row], ready) for row, sample in enumerate(samples)
            )
            self._condition.notify()

    def close(self) -> None:
        """Ends the thread after the batch at hand; what is left in the queue is not decoded."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        with self._stream():
            while True:
                with self._condition:
                    self._condition.wait_for(lambda: self._closing or self._queue)
                    if self._closing:
                        return
                    batch = self._take()
                try:
                    self._decode(batch)
                except Exception as error:  # a bug: say so, and go on
                    logger.exception("the decoder failed")
                    for finished in batch:
                        self._done(finished.sample, EngineError(f"the decoder failed: {error}"))

    def _take(self) -> list[Finished]:
        head = self._queue[0].sample
        alike = [
            finished
            for finished in self._queue
            if finished.sample.model is head.model and finished.sample.shape == head.shape
        ][: self._batch]
        taken = set(map(id, alike))
        self._queue = deque(finished for finished in self._queue if id(finished) not in taken)
        return alike

    def _decode(self, batch: list[Finished]) -> None:
        wanted = []
        for finished in batch:
            if finished.sample.ticket.future.cancelled():
                self._done(finished.sample, EngineError("cancelled"))
            else:
                wanted.append(finished)
        if not wanted:
            return
        started_s = time.perf_counter()
        try:
            results = self._pixels(wanted)
        except Exception as error:
            logger.exception("decoding %d images failed", len(wanted))
            if len(wanted) > 1:  # one of them, or too many at once: the others are not to blame
                for finished in wanted:
                    self._decode([finished])
                return
            results = [EngineError(f"the image could not be decoded: {type(error).__name__}: {error}")]
        self.seconds += time.perf_counter() - started_s
        self.images += len(wanted)
        for finished, result in zip(wanted, results, strict=True):
            self._done(finished.sample, result)

    @torch.inference_mode()
    def _pixels(self, batch: list[Finished]) -> list[Pixels | EngineError]:
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            for finished in batch:
                stream.wait_event(finished.ready)
                finished.latents_CHW.record_stream(stream)
        latents_BCHW = torch.stack([finished.latents_CHW for finished in batch])
        finite = torch.isfinite(latents_BCHW).flatten(1).all(1).tolist()  # device-to-host sync, once a batch
        images_BHWC = batch[0].sample.model.adapter.decode(latents_BCHW)
        diverged = EngineError(
            "denoising ended in numbers that are not finite; more steps or less guidance may help"
        )
        return [image.copy() if fine else diverged for image, fine in zip(images_BHWC, finite, strict=True)]

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """On CUDA a stream of its own, or decoding would stand in line behind the steps."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.stream(new_stream(self._device)):
            yield
