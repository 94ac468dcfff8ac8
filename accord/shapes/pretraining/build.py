"""From nothing to the sandbox's weights, each an artifact: autoencoder, evaluator, CLIP, diffusion model.

Every function stands alone, so that any scheduler of work can run it (ray_jobs.pretrain_shapes uses Ray).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTokenizer

from accord.artifacts import Manifest, artifact_writer, load_tensors, read_manifest, save_tensors
from accord.config import Config
from accord.diffusion.model import DiffusionModel, save_diffusion_model
from accord.diffusion.sample import SamplerConfig, sample_images
from accord.prompts import load_grammar
from accord.shapes.evaluator import ShapesEvaluator
from accord.shapes.judge import Reading, fits, read
from accord.shapes.pretraining.clip import ClipConfig, train_clip, zero_shot
from accord.shapes.pretraining.data import Log, SceneConfig, draw_scenes, random_scenes, to_float
from accord.shapes.pretraining.diffusion import DiffusionConfig, DiffusionPretrainer
from accord.shapes.pretraining.evaluator import EvaluatorConfig, train_evaluator
from accord.shapes.pretraining.tokenizer import write_tokenizer
from accord.shapes.pretraining.vae import VaeConfig, encode_mean, train_vae
from accord.shapes.scene import ATTRIBUTES, Scene

LATENTS = "latents"


class PretrainConfig(Config):
    """The recipe of the shipped weights (recipes/sandbox/pretrain.yaml)."""

    output: Path
    grammar: str = "shapes"
    scenes: SceneConfig = SceneConfig()
    vae: VaeConfig = VaeConfig()
    evaluator: EvaluatorConfig = EvaluatorConfig()
    clip: ClipConfig = ClipConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    threads: int = 1
    """Of each training. Results depend on it in the last bits, so the shipped weights are made with one."""
    held_out: int = 600
    """Scenes that nothing is trained on, to say how well each part reads or redraws."""


def build_vae(config: PretrainConfig, log: Log) -> Manifest:
    """Train the autoencoder; measures what the judge still reads in its reconstructions."""
    torch.set_num_threads(config.threads)
    vae = train_vae(draw_scenes(config.scenes), config.vae, log)
    held_out = draw_scenes(SceneConfig(count=config.held_out, seed=99))
    images = reconstruct(vae, held_out.images_NCHW)
    readings = read(images.permute(0, 2, 3, 1).numpy())
    log(f"vae: read in reconstructions {_accuracy(readings, held_out.scenes)}")
    with _writer(config, "vae", {}, config.vae) as directory:
        vae.half().save_pretrained(directory)
    return read_manifest(config.output / "vae")


def build_evaluator(config: PretrainConfig, log: Log) -> Manifest:
    """Train the evaluator CNN."""
    torch.set_num_threads(config.threads)
    scenes = config.scenes.model_copy(update={"count": config.evaluator.scenes})
    reader = train_evaluator(draw_scenes(scenes), config.evaluator, log)
    with _writer(config, "evaluator", {}, config.evaluator) as directory:
        save_tensors(directory / "evaluator.safetensors", _half(reader))
        (directory / "config.json").write_text(json.dumps({"width": 32}) + "\n")
    held_out = draw_scenes(SceneConfig(count=config.held_out, seed=99))
    _, names = ShapesEvaluator(config.output / "evaluator").read(
        held_out.images_NCHW.permute(0, 2, 3, 1).numpy()
    )
    right = {a: [n == s.words[a] for n, s in zip(names[a], held_out.scenes, strict=True)] for a in ATTRIBUTES}
    log(f"evaluator: reads { ({a: round(float(np.mean(r)), 3) for a, r in right.items()}) }")
    return read_manifest(config.output / "evaluator")


def build_clip(config: PretrainConfig, log: Log) -> Manifest:
    """Train CLIP; needs the autoencoder."""
    torch.set_num_threads(config.threads)
    vae, grammar = _load_vae(config), load_grammar(config.grammar)
    with _writer(
        config, "clip", {"vae": read_manifest(config.output / "vae").digest}, config.clip
    ) as directory:
        data = draw_scenes(config.scenes)
        model = train_clip(
            data, lambda images: reconstruct(vae, images), grammar, directory, config.clip, log
        )
        log(f"clip: zero-shot {zero_shot(model, directory, grammar, count=min(400, config.held_out))}")
        save_tensors(directory / "open_clip_model.safetensors", _half(model))
    return read_manifest(config.output / "clip")


def encode_scenes(config: PretrainConfig) -> Manifest:
    """The latents that the text-to-image model learns from, once for all workers; needs the autoencoder."""
    torch.set_num_threads(config.threads)
    scenes = diffusion_scenes(config)
    latents_NCHW = encode_mean(_load_vae(config), draw_scenes(scenes).images_NCHW)
    inputs = {"vae": read_manifest(config.output / "vae").digest}
    with _writer(config, LATENTS, inputs, scenes) as directory:
        save_tensors(directory / "latents.safetensors", {"latents_NCHW": latents_NCHW})
    return read_manifest(config.output / LATENTS)


def diffusion_pretrainer(config: PretrainConfig, **distributed: Any) -> DiffusionPretrainer:
    """The learner of the text-to-image model, after `encode_scenes`.

    Args:
        distributed: rank, world_size and wrap.
    """
    grammar = load_grammar(config.grammar)
    with tempfile.TemporaryDirectory() as words:
        write_tokenizer(Path(words), grammar)
        tokenizer = CLIPTokenizer.from_pretrained(words)
    latents_NCHW = load_tensors(config.output / LATENTS / "latents.safetensors")["latents_NCHW"]
    return DiffusionPretrainer(
        random_scenes(diffusion_scenes(config)),
        latents_NCHW,
        _load_vae(config),
        tokenizer,
        grammar,
        config.diffusion,
        inputs={"latents": read_manifest(config.output / LATENTS).digest, "grammar": config.grammar},
        **distributed,
    )


def diffusion_scenes(config: PretrainConfig) -> SceneConfig:
    """What the text-to-image model learns from."""
    return config.scenes.model_copy(update={"count": config.diffusion.scenes})


def save_diffusion(config: PretrainConfig, model: DiffusionModel, log: Log) -> Manifest:
    """The trained text-to-image model as an artifact; says what it can draw."""
    for scale in (1.5, 2.0, 3.0):
        log(f"diffusion: {probe_success(model, config.grammar, scale, min(36, config.held_out))}")
    return save_diffusion_model(
        model,
        config.output / "diffusion",
        inputs={"vae": read_manifest(config.output / "vae").digest},
        config=config.diffusion.model_dump(mode="json"),
        seed=config.diffusion.seed,
        dtype=torch.float16,
    )


@torch.no_grad()
def reconstruct(vae: Any, images_NCHW: Tensor) -> Tensor:
    """uint8 images through the autoencoder and back."""
    parts = []
    for part in torch.split(images_NCHW, 100):
        decoded = vae.decode(vae.encode(to_float(part)).latent_dist.mean).sample
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(parts)


def probe_success(
    model: DiffusionModel, grammar: str, guidance_scale: float = 3.0, per_category: int = 36
) -> str:
    """Success by category as the judge sees it, and readable images, on prompts of every split."""
    rng = np.random.default_rng(8)
    prompts = []
    for category in ("count", "colour", "background", "combination"):
        known = [p for p in load_grammar(grammar).all_prompts() if p.category == category]
        prompts += [known[i] for i in rng.integers(len(known), size=per_category)]
    sampler = SamplerConfig(steps=10, guidance_scale=guidance_scale)
    images = [
        sample_images(model, [p.text for p in prompts[i : i + 36]], range(len(prompts))[i : i + 36], sampler)
        for i in range(0, len(prompts), 36)
    ]
    readings = read(np.concatenate(images))
    success = [fits(r, p) for r, p in zip(readings, prompts, strict=True)]
    shares = {
        str(c): round(
            float(np.mean([s for s, p in zip(success, prompts, strict=True) if p.category == c])), 2
        )
        for c in dict.fromkeys(p.category for p in prompts)
    }
    readable = round(float(np.mean([r.readable for r in readings])), 2)
    objects = round(float(np.mean([r.object == p.object for r, p in zip(readings, prompts, strict=True)])), 2)
    return f"guidance {guidance_scale}: success {shares}, right object {objects}, readable {readable}"


def _load_vae(config: PretrainConfig) -> Any:
    autoencoder: Any = AutoencoderKL  # diffusers is untyped
    return autoencoder.from_pretrained(config.output / "vae").float().eval().requires_grad_(False)


def _half(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }


def _writer(config: PretrainConfig, name: str, inputs: dict[str, str], part: Config) -> Any:
    seed = int(part.model_dump()["seed"])
    return artifact_writer(config.output / name, f"shapes_{name}", inputs=inputs, config=part, seed=seed)


def _accuracy(readings: list[Reading], scenes: list[Scene]) -> dict[str, float]:
    """The share of images in which each attribute was read rightly."""
    shares = {}
    for name in ATTRIBUTES:
        right = [
            reading.words[name] == scene.words[name] for reading, scene in zip(readings, scenes, strict=True)
        ]
        shares[name] = round(float(np.mean(right)), 3)
    return shares
