"""Requests at random times, and what became of them. The same seed gives the same traffic to every rival."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

PROMPTS = tuple(
    f"{number} {colour} {shape} {place}"
    for number, plural in (("one", ""), ("two", "s"), ("three", "s"))
    for colour in ("red", "blue", "green", "yellow")
    for shape in (f"star{plural}", f"heart{plural}", f"square{plural}")
    for place in ("on grass", "in the sky")
)


@dataclass(frozen=True)
class Request:
    """What one client asks for."""

    arrival_s: float
    prompt: str
    seed: int
    steps: int
    images: int
    guidance_scale: float
    scheduler: str = "DPMSolverMultistepScheduler"


@dataclass(frozen=True)
class Mix:
    """A kind of traffic."""

    name: str
    steps: tuple[int, int]
    """From, to; both included."""
    images: tuple[int, int]
    guidance_scale: float = 5.0

    def requests(self, images_per_s: float, images: int, seed: int) -> list[Request]:
        """Poisson arrivals of requests, at least `images` images in all, at so many images a second."""
        random = np.random.default_rng(seed)
        requests: list[Request] = []
        arrival_s, total = 0.0, 0
        mean_images = sum(self.images) / 2
        while total < images:
            number = int(random.integers(self.images[0], self.images[1] + 1))
            requests.append(
                Request(
                    arrival_s=arrival_s,
                    prompt=str(random.choice(PROMPTS)),
                    seed=int(random.integers(2**31)),
                    steps=int(random.integers(self.steps[0], self.steps[1] + 1)),
                    images=number,
                    guidance_scale=self.guidance_scale,
                )
            )
            total += number
            arrival_s += float(random.exponential(mean_images / images_per_s))
        return requests


SINGLE = Mix("single images, 20 steps", steps=(20, 20), images=(1, 1))
MIXED = Mix("mixed: 8 to 30 steps, 1 to 4 images", steps=(8, 30), images=(1, 4))
MIXES = {"single": SINGLE, "mixed": MIXED}


@dataclass
class Outcome:
    """What clients saw of one run."""

    images: int = 0
    failed: int = 0
    seconds: float = 0.0
    """From the first arrival to the last answer."""
    latencies_s: list[float] = field(default_factory=list)

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def latency_s(self, percentile: float) -> float:
        return float(np.percentile(self.latencies_s, percentile)) if self.latencies_s else float("nan")


def play(
    requests: Sequence[Request], submit: Callable[[Request], Future[Any]], patience_s: float = 600.0
) -> Outcome:
    """Sends each request at its time, whether or not others are answered, and waits for all answers."""
    outcome = Outcome()
    pending: list[Future[Any]] = []
    begun_s = time.perf_counter()

    def answered(request: Request, future: Future[Any]) -> None:
        now_s = time.perf_counter() - begun_s
        if future.cancelled() or future.exception() is not None:
            outcome.failed += 1
            return
        outcome.images += request.images
        outcome.latencies_s.append(now_s - request.arrival_s)
        outcome.seconds = max(outcome.seconds, now_s)

    for request in requests:
        time.sleep(max(0.0, begun_s + request.arrival_s - time.perf_counter()))
        future = submit(request)
        future.add_done_callback(partial(answered, request))
        pending.append(future)
    late = wait(pending, timeout=patience_s).not_done
    for future in late:
        future.cancel()
    return outcome
