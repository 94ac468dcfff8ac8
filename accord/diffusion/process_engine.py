"""The denoising engine in a process of its own, where no thread of a server takes its interpreter lock.

`ProcessEngine` has the methods of `Engine`. Parent and child talk over two pipes in frames: two lengths, a
JSON object, and the raw bytes of an image. One thread writes and one reads, so that neither side ever waits
for the other with a lock in its hand.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import IO, Any

import numpy as np
import torch

from accord.diffusion.adapters import adapter_for
from accord.diffusion.batching import LoadedModel, Ticket
from accord.diffusion.ledger import EngineStats
from accord.diffusion.model import DiffusionModel
from accord.diffusion.settings import EngineConfig
from accord.diffusion.specs import SampleSpec
from accord.errors import ArtifactError, EngineClosed, EngineError, EngineFull, ModelNotLoaded

logger = logging.getLogger(__name__)

LENGTHS = struct.Struct("!II")
STATS_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 60.0
ERRORS = {
    kind.__name__: kind for kind in (ArtifactError, EngineClosed, EngineError, EngineFull, ModelNotLoaded)
}


def write_frame(stream: IO[bytes], message: dict[str, Any], payload: bytes = b"") -> None:
    """One frame; the caller sees to it that nobody else writes."""
    text = json.dumps(message).encode()
    stream.write(LENGTHS.pack(len(text), len(payload)) + text + payload)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """The next frame; None at the end."""
    head = stream.read(LENGTHS.size)
    if len(head) < LENGTHS.size:
        return None
    text_length, payload_length = LENGTHS.unpack(head)
    text, payload = stream.read(text_length), stream.read(payload_length)
    if len(text) < text_length or len(payload) < payload_length:
        return None
    return json.loads(text), payload


class ProcessEngine:
    """An `Engine` in a child process, which ends with this one. Models are loaded there from directories.

    Differences: `load` takes a model that has a directory; on_step and steps_done are told about ten times a
    second; and max_queue counts samples in flight too, so that submit need not wait for an answer.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
    ) -> None:
        self.config = config
        self._lock = threading.RLock()
        self._outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._models: dict[str, LoadedModel] = {}
        self._tickets: dict[int, tuple[Ticket, Callable[[int, int], None] | None]] = {}
        self._replies: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._refused = 0
        self._closing = False
        self._last_stats = EngineStats()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._child: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-m", "accord.diffusion.engine_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._send(
            {
                "config": config.model_dump(mode="json"),
                "device": str(device),
                "dtype": str(dtype).removeprefix("torch."),
                "threads": threads or torch.get_num_threads(),
            }
        )
        self._reader = threading.Thread(target=self._read, name="accord-engine-reader", daemon=True)
        self._reader.start()
        self._writer = threading.Thread(target=self._write, name="accord-engine-writer", daemon=True)
        self._writer.start()

    def load(self, name: str, model: DiffusionModel) -> None:
        """As `Engine.load`; returns when the child has loaded it. Raises EngineError, ArtifactError."""
        # The copy here only checks specs: it is never moved nor run.
        checks = LoadedModel(name, adapter_for(model), text_cache=1)
        self._ask({"op": "load", "name": name, "directory": str(os.path.abspath(model.directory))})
        with self._lock:
            self._models[name] = checks

    def unload(self, name: str) -> None:
        """As `Engine.unload`."""
        with self._lock:
            if self._models.pop(name, None) is None:
                raise self._not_loaded(name)
            self._send({"op": "unload", "name": name})

    @property
    def models(self) -> list[str]:
        """Names of the loaded models."""
        with self._lock:
            return sorted(self._models)

    @property
    def healthy(self) -> bool:
        """False when the engine is closed or its process has ended."""
        return not self._closing and self._child.poll() is None and self._reader.is_alive()

    def submit(self, spec: SampleSpec, on_step: Callable[[int, int], None] | None = None) -> Ticket:
        """As `Engine.submit`."""
        with self._lock:
            model = self._models.get(spec.model)
            if model is None and not self._closing:
                raise self._not_loaded(spec.model)
        if model is not None:
            model.check(spec)
            ticket = Ticket(spec, len(model.plan(spec.scheduler, spec.steps).timesteps))
        with self._lock:
            self._check_open()
            if len(self._tickets) >= self.config.max_queue:
                self._refused += 1
                raise EngineFull(
                    f"{len(self._tickets)} samples are in the engine already (max_queue); try again later"
                )
            number = next(self._numbers)
            self._tickets[number] = (ticket, on_step)
            self._send({"op": "submit", "id": number, "spec": asdict(spec)})

        def cancelled(future: Future[Any]) -> None:
            if future.cancelled():
                with self._lock:
                    self._tickets.pop(number, None)
                self._send({"op": "cancel", "id": number})

        ticket.future.add_done_callback(cancelled)
        return ticket

    def stats(self) -> EngineStats:
        """As `Engine.stats`; the last known ones when the engine is closed."""
        with contextlib.suppress(EngineClosed, TimeoutError):
            numbers = dict(self._ask({"op": "stats"}, STATS_TIMEOUT_S))
            numbers["refused"] += self._refused
            self._last_stats = EngineStats(**numbers)
        return self._last_stats

    def close(self) -> None:
        """As `Engine.close`."""
        with self._lock:
            self._closing = True
        self._outbox.put(None)
        try:
            self._child.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._reader is not threading.current_thread():
            self._reader.join(CLOSE_TIMEOUT_S)

    def __enter__(self) -> ProcessEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- talking to the child

    def _send(self, message: dict[str, Any]) -> None:
        """Returns at once."""
        self._outbox.put(message)

    def _write(self) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # the child is gone: the reader will tell
            while (message := self._outbox.get()) is not None:
                write_frame(self._child.stdin, message)
        with contextlib.suppress(OSError):
            self._child.stdin.close()

    def _ask(self, message: dict[str, Any], timeout_s: float | None = None) -> Any:
        reply: Future[Any] = Future()
        with self._lock:
            self._check_open()
            number = next(self._numbers)
            self._replies[number] = reply
        self._send({**message, "id": number})
        return reply.result(timeout_s)

    def _read(self) -> None:
        assert self._child.stdout is not None
        while (frame := read_frame(self._child.stdout)) is not None:
            try:
                self._hear(*frame)
            except Exception:
                logger.exception("what the engine's process said could not be used")
        with self._lock:
            ended = self._closing
            self._closing = True
            futures = [ticket.future for ticket, _ in self._tickets.values()] + list(self._replies.values())
            self._tickets.clear()
            self._replies.clear()
        self._outbox.put(None)
        message = "the engine was closed" if ended else "the engine's process has died"
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineClosed(f"{message} before the image was done"))

    def _hear(self, message: dict[str, Any], payload: bytes) -> None:
        operation = message["op"]
        if operation == "steps":
            self._tell_steps(message["done"])
            return
        with self._lock:
            entry = self._tickets.pop(message["id"], None)
            future = entry[0].future if entry else self._replies.pop(message["id"], None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if operation == "error":
            future.set_exception(ERRORS[message["kind"]](message["text"]))
        elif operation == "image":
            assert entry is not None
            entry[0].steps_done = entry[0].steps
            image_HWC = np.frombuffer(payload, dtype=np.uint8).reshape(message["shape"]).copy()
            future.set_result(image_HWC)
        else:
            future.set_result(message["value"])

    def _tell_steps(self, done: list[list[int]]) -> None:
        for number, steps in done:
            with self._lock:
                ticket, on_step = self._tickets.get(number, (None, None))
            if ticket is not None:
                ticket.steps_done = steps
                if on_step is not None:
                    on_step(steps, ticket.steps)

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosed("the engine is closed")

    def _not_loaded(self, name: str) -> ModelNotLoaded:
        loaded = ", ".join(sorted(self._models)) or "none"
        return ModelNotLoaded(f"no model {name!r} is loaded; loaded: {loaded}")
