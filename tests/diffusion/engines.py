"""What the engine's tests share: specs, and a real model whose steps wait for the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

from accord.diffusion.adapters import Conditioning, Pixels, StableDiffusionAdapter
from accord.diffusion.engine import Engine, SampleSpec, Ticket
from accord.diffusion.model import DiffusionModel
from accord.diffusion.sample import SamplerConfig, sample_images

WAIT_S = 120.0
SCHEDULERS = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
]


def spec(seed: int = 1, **changes: object) -> SampleSpec:
    values: dict[str, object] = {
        "model": "m",
        "prompt": "red star",
        "seed": seed,
        "steps": 4,
        "guidance_scale": 3.0,
        "scheduler": "DPMSolverMultistepScheduler",
        "height": 64,
        "width": 64,
    }
    return SampleSpec(**(values | changes))  # type: ignore[arg-type]


def reference(model: DiffusionModel, wanted: SampleSpec) -> Pixels:
    """The same image by `sample_images`, alone."""
    config = SamplerConfig(
        scheduler=wanted.scheduler,
        steps=wanted.steps,
        guidance_scale=wanted.guidance_scale,
        negative_prompt=wanted.negative_prompt,
        height=wanted.height,
        width=wanted.width,
    )
    return sample_images(model, [wanted.prompt], [wanted.seed], config)[0]


def difference(first: Pixels, second: Pixels) -> int:
    assert first.shape == second.shape
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.002)


def together(engine: Engine, specs: Iterable[SampleSpec]) -> list[Ticket]:
    """Submits samples so that the engine sees all at once."""
    with engine._lock:
        return [engine.submit(each) for each in specs]


def settled(engine: Engine) -> None:
    """Waits until nothing is left in the engine."""
    until(lambda: engine.stats().in_flight == 0 and engine.stats().queued == 0)


class Gated(StableDiffusionAdapter):
    """A model whose UNet makes a step only when the test lets it, and notes the rows of each batch."""

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__(model)
        self.permits = threading.Semaphore(0)
        self.open = False
        self.waiting = 0
        self.rows: list[int] = []
        self.fail: Callable[[Tensor], None] | None = None

    def denoise(self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        if not self.open:
            self.waiting += 1
            assert self.permits.acquire(timeout=WAIT_S), "the test let no step through"
            self.waiting -= 1
        self.rows.append(len(latents_BCHW))
        if self.fail is not None:
            self.fail(latents_BCHW)
        return super().denoise(latents_BCHW, timesteps_B, conditioning)

    def step(self, number: int = 1) -> None:
        """Lets so many steps through, and waits until they have begun."""
        made = len(self.rows) + number
        self.permits.release(number)
        until(lambda: len(self.rows) >= made)

    def at_gate(self) -> None:
        until(lambda: self.waiting == 1)

    def let_go(self) -> None:
        self.open = True
        self.permits.release(1000)
