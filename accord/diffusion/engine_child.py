"""The child of `ProcessEngine`: an `Engine` that reads frames from its input and answers on its output."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict
from typing import IO, Any

import torch

from accord.cpu import use_cpu
from accord.diffusion.engine import Engine, EngineConfig, SampleSpec, Ticket
from accord.diffusion.model import load_diffusion_model
from accord.diffusion.process_engine import ERRORS, read_frame, write_frame

STEPS_EVERY_S = 0.1


class Child:
    """Ends when its input does."""

    def __init__(self, settings: dict[str, Any], source: IO[bytes], sink: IO[bytes]) -> None:
        use_cpu(settings["threads"])
        config = EngineConfig.model_validate(settings["config"])
        self._engine = Engine(config, device=settings["device"], dtype=getattr(torch, settings["dtype"]))
        self._source, self._sink = source, sink
        self._writing = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        self._steps: dict[int, int] = {}  # of the engine's thread
        self._told_s = 0.0

    def run(self) -> None:
        while (frame := read_frame(self._source)) is not None:
            self._hear(frame[0])
        self._engine.close()

    def _hear(self, message: dict[str, Any]) -> None:
        number, operation = message.get("id", -1), message["op"]
        if operation == "submit":
            self._submit(number, SampleSpec(**message["spec"]))
        elif operation == "cancel":
            ticket = self._tickets.get(number)
            if ticket is not None:
                ticket.cancel()
        elif operation == "load":  # takes long: the others must not wait
            threading.Thread(target=self._load, args=(number, message), daemon=True).start()
        elif operation == "unload":
            self._engine.unload(message["name"])
        else:
            self._say({"op": "reply", "id": number, "value": asdict(self._engine.stats())})

    def _submit(self, number: int, spec: SampleSpec) -> None:
        try:
            ticket = self._engine.submit(spec, lambda done, _: self._step(number, done))
        except Exception as error:
            self._say_error(number, error)
            return
        self._tickets[number] = ticket
        ticket.future.add_done_callback(lambda future: self._done(number, future))

    def _done(self, number: int, future: Future[Any]) -> None:
        self._tickets.pop(number, None)
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            self._say_error(number, error)
            return
        image_HWC = future.result()
        self._say({"op": "image", "id": number, "shape": image_HWC.shape}, image_HWC.tobytes())

    def _step(self, number: int, done: int) -> None:
        """Steps of all samples are told together, and not each of them."""
        self._steps[number] = done
        now_s = time.monotonic()
        if now_s - self._told_s >= STEPS_EVERY_S:
            self._told_s = now_s
            steps, self._steps = self._steps, {}
            self._say({"op": "steps", "done": list(steps.items())})

    def _load(self, number: int, message: dict[str, Any]) -> None:
        try:
            self._engine.load(message["name"], load_diffusion_model(message["directory"]))
            self._say({"op": "reply", "id": number, "value": None})
        except Exception as error:
            self._say_error(number, error)

    def _say_error(self, number: int, error: BaseException) -> None:
        kind = type(error).__name__
        known = kind if kind in ERRORS else "EngineError"
        self._say({"op": "error", "id": number, "kind": known, "text": str(error)})

    def _say(self, message: dict[str, Any], payload: bytes = b"") -> None:
        try:
            with self._writing:
                write_frame(self._sink, message, payload)
        except OSError:  # nobody listens any more: the input will end too
            pass


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between
    source = sys.stdin.buffer
    settings = read_frame(source)
    if settings is not None:
        Child(settings[0], source, sink).run()


if __name__ == "__main__":
    main()
