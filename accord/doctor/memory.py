"""What one process of each kind of work holds at its worst moment, by component. All numbers are bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from accord.diffusion.architectures import Architecture
from accord.diffusion.model import vae_batch
from accord.diffusion.objectives import needs_reference
from accord.diffusion.settings import EngineConfig, FinetuneConfig, SamplerConfig
from accord.doctor import simulate
from accord.doctor.simulate import TOKENS, Rows

FLOAT = 4
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Need:
    """`parts` are held at once, at the worst moment; `flops` are those of one image or one step (see who
    makes it)."""

    parts: Mapping[str, int]
    flops: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Model:
    """An architecture, with the number of parameters of each of its networks."""

    architecture: Architecture
    parameters: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(architecture: Architecture) -> Model:
        return Model(architecture, simulate.parameters(architecture))

    @property
    def is_xl(self) -> bool:
        return "text_encoder_2" in self.architecture

    @property
    def cell(self) -> int:
        """Pixels a latent is wide and high."""
        return int(2 ** (len(self.architecture["vae"]["block_out_channels"]) - 1))

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.architecture["unet"]["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.cell, width * self.cell

    def latent_bytes(self, height: int, width: int) -> int:
        """Of one image, in float32."""
        channels = int(self.architecture["unet"]["in_channels"])
        return channels * (height // self.cell) * (width // self.cell) * FLOAT

    def text_bytes(self, number: int = FLOAT) -> int:
        """Of one prompt's conditioning, with `number` bytes each number."""
        pooled = int(self.architecture["text_encoder_2"]["projection_dim"]) if self.is_xl else 0
        return (TOKENS * int(self.architecture["unet"]["cross_attention_dim"]) + pooled) * number

    def weights(self, dtype: torch.dtype = torch.float32) -> int:
        """Of all networks."""
        return sum(
            count * (FLOAT if self._kept_in_float32(name, dtype) else dtype.itemsize)
            for name, count in self.parameters.items()
        )

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self._kept_in_float32("vae", dtype) else dtype

    def _kept_in_float32(self, name: str, dtype: torch.dtype) -> bool:
        upcast = self.architecture["vae"].get("force_upcast", True)
        return name == "vae" and self.is_xl and dtype == torch.float16 and bool(upcast)


def load(model: Model, runtime: int, dtype: torch.dtype = torch.float32) -> Need:
    """A model in memory, and nothing else."""
    return Need({"runtime": runtime, "weights": model.weights(dtype)})


def generate(
    model: Model,
    runtime: int,
    sampler: SamplerConfig,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
) -> Need:
    """`sample_images` on a batch; flops of one image."""
    height, width = size_of(model, sampler)
    rows = batch_size * (2 if sampler.guidance_scale > 1 else 1)
    step = simulate.unet_forward(
        model.architecture, Rows(rows, height, width), dtype, sampler.precision == "bfloat16"
    )
    images = vae_batch(batch_size, height, width)
    decoding = simulate.vae_pass(
        model.architecture, Rows(images, height, width), model.vae_dtype(dtype), encode=False
    )
    text = 2 * batch_size * model.text_bytes()
    return Need(
        {
            "runtime": runtime,
            "weights": model.weights(dtype),
            "activations": max(step.peak_bytes, decoding.peak_bytes),
            "cached text": text,
        },
        flops=sampler.steps * step.flops // batch_size + decoding.flops // images,
    )


def encode(model: Model, runtime: int, height: int, width: int, held: int) -> Need:
    """Images to latents before fine-tuning; `held`: bytes of latents and texts that are on their way
    to a file. Flops of one image."""
    images = vae_batch(64, height, width)
    cost = simulate.vae_pass(model.architecture, Rows(images, height, width), torch.float32, encode=True)
    return Need(
        {"runtime": runtime, "weights": model.weights(), "activations": cost.peak_bytes, "cached data": held},
        flops=cost.flops // images,
    )


def finetune(
    model: Model,
    runtime: int,
    config: FinetuneConfig,
    *,
    height: int,
    width: int,
    workers: int = 1,
    held: int = 0,
) -> Need:
    """One worker's fine-tuning; `held`: bytes of latents and texts beside it. Flops of one step of one
    worker.

    Whatever is larger: what is held while the learner is built (the whole model beside the copy to train) or
    during a step.
    """
    images = per_worker(config, workers)
    part = math.ceil(images / config.gradient_accumulation)
    training = simulate.unet_training(model.architecture, Rows(part, height, width), config)
    shared = workers if config.sharding == "fsdp" else 1
    trained, frozen = training.trained_bytes // shared, training.frozen_bytes // shared
    reference = (
        FLOAT * model.parameters["unet"] if needs_reference(config) and config.parameters == "full" else 0
    )
    step = {
        "runtime": runtime,
        "weights": frozen + reference,
        "trained weights": trained,
        # Gradients of all parts add up; with activations at their worst in the backward pass.
        "gradients, activations": training.cost.peak_bytes
        if shared == 1
        else _sharded_peak(training, shared),
        "optimizer": 2 * trained,
        "average": trained if config.ema_decay > 0 else 0,
        "cached data": held,
    }
    building = {
        "runtime": runtime,
        "weights": model.weights(),
        "trained weights": training.trained_bytes,
        "average": trained if config.ema_decay > 0 else 0,
        "cached data": held,
    }
    passes = math.ceil(images / part)
    flops = passes * training.cost.flops
    if needs_reference(config):
        flops += passes * training.cost.flops // 3
    worst = max(step, building, key=lambda parts: sum(parts.values()))
    return Need({name: size for name, size in worst.items() if size}, flops)


def serve(
    model: Model, runtime: int, engine: EngineConfig, dtype: torch.dtype, height: int, width: int, models: int
) -> Need:
    """A replica's engine, full, with `models` models loaded; flops of a row of a step."""
    step = simulate.unet_forward(
        model.architecture, Rows(engine.max_batch, height, width), dtype, autocast=False
    )
    images = vae_batch(engine.decode_batch, height, width)
    decoding = simulate.vae_pass(
        model.architecture, Rows(images, height, width), model.vae_dtype(dtype), encode=False
    )
    waiting = engine.max_samples * (model.latent_bytes(height, width) * 4 + 2 * model.text_bytes())
    return Need(
        {
            "runtime": runtime,
            "weights": models * model.weights(dtype),
            "activations": max(step.peak_bytes, decoding.peak_bytes),
            "samples": waiting,
        },
        flops=step.flops // engine.max_batch,
    )


def learn(runtime: int, clip_bytes: int, tokens_width: int, images: int, prompts: int) -> Need:
    """CLIP features of the judged images, then the head on them; flops of one image's features."""
    batch, tokens = 64, 257
    # Of a transformer in inference: a block's input, its keys, queries and values, and its hidden layer.
    activations = batch * tokens * tokens_width * 9 * FLOAT
    features = (images + prompts) * tokens_width * FLOAT
    return Need(
        {"runtime": runtime, "weights": clip_bytes, "activations": activations, "cached data": features},
        flops=2 * (clip_bytes // FLOAT) * tokens,
    )


def per_worker(config: FinetuneConfig, workers: int) -> int:
    """Images of a step that one worker has."""
    own = 0 if config.objective == "pretraining_only" else config.batch_size
    return math.ceil((own + (config.pretraining_batch_size if config.beta > 0 else 0)) / workers)


def size_of(model: Model, sampler: SamplerConfig) -> tuple[int, int]:
    """Height and width in pixels of what is sampled."""
    height, width = model.default_size
    return sampler.height or height, sampler.width or width


def _sharded_peak(training: Any, workers: int) -> int:
    """The gradients are spread too; the activations are not."""
    return int(training.cost.peak_bytes - training.trained_bytes + training.trained_bytes // workers)
