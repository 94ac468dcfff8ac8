"""Examines a recipe: every stage's memory, the disk, the time, and what is missing. Changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from accord.diffusion.batches import NEAR_BYTES
from accord.diffusion.rows import HELD_BYTES
from accord.diffusion.settings import EngineConfig
from accord.doctor import machine, memory
from accord.doctor.memory import Model, Need
from accord.doctor.missing import clip_weights, missing_parts
from accord.doctor.report import Report, StageMemory, StageTime, in_words
from accord.doctor.simulate import Rows
from accord.doctor.sizes import find_model
from accord.evaluation.plan import draw_prompts
from accord.prompts import load_grammar
from accord.recipe import CollectPart, Recipe

CUDA_BYTES = 10**9
"""What CUDA and its libraries take of a GPU: stated, not measured here."""
PNG_SHARE = 0.6
"""Bytes of a PNG over those of its pixels: what photographs take. Simpler pictures take less."""
PIECE = 1024
"""Latents or texts that are encoded into one file, and in memory until then (ray_jobs.finetune_data)."""
CHECKPOINTS = 3
"""Kept by a training: two, and the one that is being written."""


@dataclass(frozen=True)
class Assumptions:
    """What is stated rather than found on this machine; None: as it is here."""

    architecture: str | None = None
    """Reckon with a published one where the recipe's model is not there."""
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    teraflops: float | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    engine_dtype: str | None = None
    engine_device: str | None = None
    """None: as the recipe's generators, in bfloat16 on a GPU."""
    probe: bool = True


def examine(recipe: Recipe, run_dir: Path, assumed: Assumptions) -> Report:
    """The report of a recipe that would run in `run_dir`."""
    found = find_model(recipe.model, assumed.architecture)
    problems = [*found.problems, *missing_parts(recipe, run_dir)]
    notes: list[str] = []
    if found.architecture is None:
        notes.append(
            "without the model's configs neither memory nor time can be told; --architecture sd15 or sdxl "
            "reckons with a published one"
        )
        return Report(
            str(recipe.name),
            "unknown",
            (),
            {},
            machine.free_disk(run_dir),
            (),
            "",
            tuple(problems),
            tuple(notes),
        )
    examination = _Examination(recipe, run_dir, assumed, Model.of(found.architecture))
    return Report(
        recipe=recipe.name,
        model=f"{found.source}, {sum(examination.model.parameters.values()) / 1e6:.0f} M parameters",
        memory=tuple(examination.memory()),
        disk=examination.disk(),
        disk_free=machine.free_disk(run_dir),
        times=tuple(examination.times()),
        speed=examination.speed_words,
        problems=tuple(problems),
        notes=(*notes, *examination.notes),
    )


class _Examination:
    def __init__(self, recipe: Recipe, run_dir: Path, assumed: Assumptions, model: Model) -> None:
        self.recipe, self.run_dir, self.assumed, self.model = recipe, run_dir, assumed, model
        self.notes: list[str] = []
        self.runtime = machine.resident_memory()  # torch and its libraries are loaded by now
        self.counts = _Counts.of(recipe)
        self.gpus = machine.gpus()
        self.on_gpu = bool(self.gpus or assumed.gpu_memory_bytes)
        sampler, config = recipe.collect.sampler, recipe.finetune
        height, width = memory.size_of(model, sampler)
        text_bytes = model.text_bytes(2 if config.precision == "bfloat16" else memory.FLOAT)
        latent_bytes = model.latent_bytes(height, width)
        texts = self.counts.texts * text_bytes
        images = self.counts.latents - recipe.pretraining.count, recipe.pretraining.count
        latents = [count * latent_bytes for count in images]
        self.encoded = sum(latents) + texts
        # What is larger is mapped from files: the system lets go of it where memory is short.
        self.held = sum(size for size in (*latents, texts) if size <= HELD_BYTES)
        self.mapped = self.encoded - self.held
        # In float32 while it is made, and in the type that it is kept in.
        piece_texts = min(PIECE, self.counts.texts) * (model.text_bytes() + text_bytes)
        self.piece = max(piece_texts, 2 * min(PIECE, max(images)) * latent_bytes)
        train_on_gpu = recipe.ray.gpus_per_worker > 0
        near = self.counts.texts * model.text_bytes() if texts <= NEAR_BYTES else 0  # there in float32
        held = near if train_on_gpu else self.held
        engine = assumed.engine
        self.serve_device = assumed.engine_device or ("cuda" if recipe.ray.gpus_per_generator > 0 else "cpu")
        default = "bfloat16" if self.serve_device == "cuda" else "float32"
        dtype = memory.DTYPES[assumed.engine_dtype or default]
        self.height, self.width = height, width
        clip = clip_weights(recipe)
        self.needs: dict[str, Need] = {
            "collect": memory.generate(model, self.runtime, sampler, recipe.collect.batch_size),
            "learn": memory.learn(
                self.runtime, clip.bytes, clip.width, self.counts.labelled, self.counts.texts
            ),
            "encode": memory.encode(model, self.runtime, height, width, 0 if train_on_gpu else self.piece),
            "finetune": memory.finetune(
                model,
                self.runtime,
                config,
                height=height,
                width=width,
                workers=recipe.ray.num_workers,
                held=held,
            ),
            "serve": memory.serve(model, self.runtime, engine, dtype, height, width, models=2),
        }
        if self.mapped:
            self.notes.append(
                f"{in_words(self.mapped)} of latents and texts are read from files while training: put the "
                "run on a fast local disk; memory beyond the above keeps what was read"
            )
        self.speed = self._speed()

    @property
    def speed_words(self) -> str:
        return "not known" if self.speed is None else self.speed.how

    def memory(self) -> Iterator[StageMemory]:
        ray = self.recipe.ray
        gpu = {
            "collect": ray.gpus_per_generator > 0,
            "learn": ray.gpus_per_worker > 0,
            "encode": ray.gpus_per_worker > 0,
            "finetune": ray.gpus_per_worker > 0,
            "serve": self.serve_device == "cuda",
        }
        processes = {"collect": ray.generators, "finetune": ray.num_workers}
        if any(gpu.values()) and not self.on_gpu:
            self.notes.append(
                "the recipe asks for GPUs and this machine has none: state a GPU's memory with --gpu-memory, "
                "in GB, or run it on a cluster that has them"
            )
        for stage, need in self.needs.items():
            count = processes.get(stage, 1)
            if not gpu[stage]:
                yield StageMemory(stage, "host", count, need.parts, self._host())
                continue
            # Processes each have a GPU of their own, or a stated share of one.
            share = ray.gpus_per_generator if stage == "collect" else 1.0
            on_device = {**need.parts, "runtime": CUDA_BYTES}
            yield StageMemory(stage, "GPU", math.floor(1 / min(share, 1.0)), on_device, self._gpu())
            if stage in ("encode", "finetune"):
                data = self.piece if stage == "encode" else self.held
                beside = {"runtime": self.runtime, "weights": self.model.weights(), "cached data": data}
                yield StageMemory(f"{stage}, beside the GPU", "host", 1, beside, self._host())

    def disk(self) -> dict[str, int]:
        """Bytes by what they are."""
        pixels = self.height * self.width * 3
        png = int(pixels * PNG_SHARE)
        counts, config, model = self.counts, self.recipe.finetune, self.model
        trained = self.model.parameters["unet"] * memory.FLOAT
        if config.parameters == "lora":
            trained = _adapter_bytes(model, self.recipe)
        states = 4 if config.ema_decay > 0 else 3  # weights, two moments, average
        trainings = 2 if counts.has_control else 1
        return {
            "generated images": (counts.generated + counts.evaluated) * png,
            "images of the sources": counts.sources * png,
            "latents and texts": self.encoded,
            "checkpoints": trainings * CHECKPOINTS * states * trained,
            "models": (trainings + self.recipe.on_policy.rounds) * model.weights(),
        }

    def times(self) -> Iterator[StageTime]:
        counts, config, ray = self.counts, self.recipe.finetune, self.recipe.ray
        sampler = self.recipe.collect.sampler
        trainings = 2 if counts.has_control else 1
        steps = config.steps * (1 + self.recipe.on_policy.rounds) * trainings
        needs, size = self.needs, f"{self.width} x {self.height} pixels"
        work = {
            "collect": (
                f"{counts.generated} images of {sampler.steps} steps, {size}",
                counts.generated * needs["collect"].flops,
                ray.generators,
            ),
            "learn": (
                f"features of {counts.labelled} images",
                counts.labelled * needs["learn"].flops,
                1,
            ),
            "encode": (
                f"{counts.latents} images",
                counts.latents * needs["encode"].flops,
                ray.num_workers if self._uses_gpu() else 1,
            ),
            "finetune": (
                f"{steps} steps of {memory.per_worker(config, 1)} images",
                steps * needs["finetune"].flops * ray.num_workers,
                ray.num_workers,
            ),
            "evaluate": (
                f"{counts.evaluated} images of {self.recipe.evaluate.sampler.steps} steps",
                counts.evaluated
                * needs["collect"].flops
                * self.recipe.evaluate.sampler.steps
                // sampler.steps,
                ray.generators,
            ),
        }
        for stage, (words, flops, processes) in work.items():
            if not flops:
                continue
            # Processes on one machine's CPUs share them; GPUs are each process's own.
            wide = processes if self._uses_gpu() else 1
            seconds = None if self.speed is None else flops / self.speed.flops_per_s / wide
            yield StageTime(stage, words, float(flops), seconds)

    def _uses_gpu(self) -> bool:
        return self.recipe.ray.gpus_per_worker > 0

    def _speed(self) -> machine.Speed | None:
        if self.assumed.teraflops is not None:
            stated = self.assumed.teraflops
            return machine.Speed(stated * 1e12, f"from the {stated:g} TFLOP/s that were stated, sustained")
        if self._uses_gpu() and not self.gpus:
            self.notes.append("no GPU to time: state what one sustains with --teraflops (an H100: about 250)")
            return None
        if not self.assumed.probe:
            return None
        half = self.recipe.finetune.precision == "bfloat16"
        device = "cuda" if self._uses_gpu() else "cpu"
        return machine.probe(self.model.architecture, Rows(2, self.height, self.width), device, half=half)

    def _host(self) -> int:
        return self.assumed.memory_bytes or machine.available_memory()

    def _gpu(self) -> int | None:
        if self.assumed.gpu_memory_bytes:
            return self.assumed.gpu_memory_bytes
        return min(gpu.free_bytes for gpu in self.gpus) if self.gpus else None


@dataclass(frozen=True)
class _Counts:
    """How many images and texts a run has."""

    labelled: int
    generated: int
    """All that are drawn from the model before evaluation."""
    evaluated: int
    sources: int
    latents: int
    texts: int
    has_control: bool

    @staticmethod
    def of(recipe: Recipe) -> _Counts:
        labelled, unlabelled = _images(recipe.collect.labelled), _images(recipe.collect.unlabelled)
        rounds = recipe.on_policy.rounds * _images(recipe.on_policy.images)
        uses_pretraining = recipe.finetune.beta > 0 and recipe.finetune.pretraining_batch_size > 0
        pretraining = recipe.pretraining.count
        prompts = sum(
            sum(part.prompts.values()) for part in (recipe.collect.labelled, recipe.collect.unlabelled)
        )
        return _Counts(
            labelled=labelled,
            generated=labelled + unlabelled + rounds,
            evaluated=_evaluated(recipe, 3 if recipe.control and uses_pretraining else 2),
            sources=pretraining + (recipe.reference.count if recipe.reference else 0),
            latents=labelled + unlabelled + pretraining,
            texts=prompts + pretraining,
            has_control=recipe.control and uses_pretraining,
        )


def _images(part: CollectPart) -> int:
    return sum(count * part.images_per_prompt.get(name, 0) for name, count in part.prompts.items())


def _evaluated(recipe: Recipe, models: int) -> int:
    """Images of the evaluation, if there is one."""
    if recipe.evaluator is None:
        return 0
    config = recipe.evaluate
    groups = draw_prompts(config, load_grammar(recipe.grammar), recipe.seed)
    each = (
        len(groups["choice"]) * config.choice.images_per_prompt * len(config.guidance_scales)
        + len(groups["test"]) * config.test.images_per_prompt
        + len(groups["best_of"]) * config.best_of.candidates
    )
    return models * each


def _adapter_bytes(model: Model, recipe: Recipe) -> int:
    from accord.doctor.simulate import trained_bytes

    return trained_bytes(model.architecture, recipe.finetune)
