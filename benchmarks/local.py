"""The engine and its rivals in one process, and the ceiling that the model itself sets.

locked   what people do today: one StableDiffusionPipeline behind a lock, a request at a time
static   static batching of the same pipeline: requests with the same number of steps wait for one another
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import StableDiffusionPipeline

from accord.diffusion.engine import Engine, EngineConfig, SampleSpec
from accord.diffusion.model import load_diffusion_model
from accord.diffusion.sample import SamplerConfig, decode_latents, make_scheduler
from accord.diffusion.seeds import candidate_seed
from benchmarks.traffic import Mix, Request


class Server(Protocol):
    def submit(self, request: Request) -> Future[Any]: ...

    def close(self) -> None: ...


class EngineServer:
    """The denoising engine: one ticket an image."""

    def __init__(self, directory: Path, device: str, config: EngineConfig) -> None:
        model = load_diffusion_model(directory)
        self._size = model.default_size
        self.engine = Engine(config, device=device)
        self.engine.load("model", model)

    def submit(self, request: Request) -> Future[Any]:
        tickets = [
            self.engine.submit(
                SampleSpec(
                    model="model",
                    prompt=request.prompt,
                    seed=candidate_seed(request.seed, number),
                    steps=request.steps,
                    guidance_scale=request.guidance_scale,
                    scheduler=request.scheduler,
                    height=self._size[0],
                    width=self._size[1],
                )
            )
            for number in range(request.images)
        ]
        return all_of([ticket.future for ticket in tickets])

    def close(self) -> None:
        self.engine.close()


class Pipeline:
    """An unmodified StableDiffusionPipeline."""

    def __init__(self, directory: Path, device: str) -> None:
        pipeline: Any = StableDiffusionPipeline
        self._pipeline = pipeline.from_pretrained(
            directory, safety_checker=None, local_files_only=True, dtype=torch.float32
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self._pipeline.scheduler = make_scheduler(load_diffusion_model(directory), SamplerConfig())
        self._pipeline.to(device)

    def __call__(self, requests: list[Request]) -> list[list[Any]]:
        """Images of each request, all with the same number of steps."""
        prompts = [request.prompt for request in requests for _ in range(request.images)]
        generators = [
            torch.Generator().manual_seed(candidate_seed(request.seed, number))
            for request in requests
            for number in range(request.images)
        ]
        images = self._pipeline(
            prompts,
            num_inference_steps=requests[0].steps,
            guidance_scale=requests[0].guidance_scale,
            generator=generators,
            output_type="np",
        ).images
        answers, start = [], 0
        for request in requests:
            mine = images[start : start + request.images]
            answers.append([(image * 255).round().astype("uint8") for image in mine])
            start += request.images
        return answers


class LockedServer:
    """One request after the other, in the order of arrival."""

    def __init__(self, directory: Path, device: str) -> None:
        self._pipeline = Pipeline(directory, device)
        self._thread = ThreadPoolExecutor(1)

    def submit(self, request: Request) -> Future[Any]:
        return self._thread.submit(lambda: self._pipeline([request])[0])

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Waiting:
    request: Request
    since_s: float
    future: Future[Any]


class StaticServer:
    """Requests with the same number of steps wait until `most` images are there, or the first has waited for
    `wait_s`; then they run as one batch, during which all others wait."""

    def __init__(self, directory: Path, device: str, *, wait_s: float = 1.0, most: int = 32) -> None:
        self._pipeline = Pipeline(directory, device)
        self._wait_s, self._most = wait_s, most
        self._groups: dict[int, list[_Waiting]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Any]:
        future: Future[Any] = Future()
        with self._changed:
            self._groups.setdefault(request.steps, []).append(_Waiting(request, time.perf_counter(), future))
            self._changed.notify()
        return future

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (batch := self._ready()) and not self._closing:
                    self._changed.wait(timeout=0.005 if self._groups else None)
                if self._closing:
                    return
            try:
                answers = self._pipeline([waiting.request for waiting in batch])
            except Exception as error:
                for waiting in batch:
                    waiting.future.set_exception(error)
                continue
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.future.set_running_or_notify_cancel():
                    waiting.future.set_result(answer)

    def _ready(self) -> list[_Waiting]:
        now_s = time.perf_counter()
        for steps, group in sorted(self._groups.items(), key=lambda item: item[1][0].since_s):
            images = sum(waiting.request.images for waiting in group)
            if images < self._most and now_s - group[0].since_s < self._wait_s:
                continue
            batch: list[_Waiting] = []
            while group and sum(w.request.images for w in [*batch, group[0]]) <= self._most:
                batch.append(group.pop(0))
            if not group:
                del self._groups[steps]
            return batch
        return []


@dataclass(frozen=True)
class Ceiling:
    """The model at its best batch size, without anything around it."""

    row_s: float
    """Of a UNet call, for each row of its batch."""
    rows: int
    """The batch size at which that is least."""
    image_s: float
    """Of the VAE, for each image."""

    def images_per_s(self, mix: Mix) -> float:
        rows_a_step = 2 if mix.guidance_scale > 1 else 1
        return 1.0 / (rows_a_step * sum(mix.steps) / 2 * self.row_s + self.image_s)


@torch.inference_mode()
def measure_ceiling(
    directory: Path, device: str, batches: tuple[int, ...] = (8, 16, 32, 64), calls: int = 8
) -> Ceiling:
    """Median time of `calls` calls at each batch size."""
    model = load_diffusion_model(directory, device=device)
    height, width = (pixels // model.vae_scale_factor for pixels in model.default_size)
    rows: dict[int, float] = {}
    images: dict[int, float] = {}
    for batch in batches:
        latents_BCHW = torch.randn(batch, model.latent_channels, height, width, device=device)
        times_B = torch.linspace(1, 999, batch, device=device)
        width_D = model.unet.config.cross_attention_dim
        text_BTD = torch.randn(batch, model.tokenizer.model_max_length, width_D, device=device)

        def step(
            latents_BCHW: Any = latents_BCHW, times_B: Any = times_B, text_BTD: Any = text_BTD
        ) -> object:
            return model.unet(latents_BCHW, times_B, encoder_hidden_states=text_BTD)

        def decode(latents_BCHW: Any = latents_BCHW, batch: int = batch) -> object:
            return decode_latents(model, latents_BCHW, batch)

        rows[batch] = _median_s(step, device, calls) / batch
        images[batch] = _median_s(decode, device, max(calls // 4, 2)) / batch
    best = min(rows, key=lambda batch: rows[batch])
    return Ceiling(row_s=rows[best], rows=best, image_s=min(images.values()))


def all_of(futures: list[Future[Any]]) -> Future[Any]:
    """The list of their results, or the first error. Cancelling it cancels all."""
    together: Future[Any] = Future()
    left = len(futures)
    lock = threading.Lock()

    def done(future: Future[Any]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if together.done() or not last:
            return
        if not together.set_running_or_notify_cancel():
            return
        errors = [each for each in futures if each.cancelled() or each.exception() is not None]
        if errors:
            together.set_exception(RuntimeError("an image failed"))
        else:
            together.set_result([each.result() for each in futures])

    for future in futures:
        future.add_done_callback(done)
    together.add_done_callback(lambda each: [f.cancel() for f in futures] if each.cancelled() else None)
    return together


def _median_s(call: Callable[[], object], device: str, calls: int) -> float:
    cuda = torch.device(device).type == "cuda"
    times = []
    for number in range(calls + 1):
        started_s = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        if number:  # the first one warms up
            times.append(time.perf_counter() - started_s)
    return sorted(times)[len(times) // 2]
