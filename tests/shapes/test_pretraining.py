"""Making the weights from nothing, in miniature: reproducible, and every part is an artifact that loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from accord.diffusion.model import load_diffusion_model
from accord.prompts import load_grammar
from accord.shapes.captions import CaptionNoise, caption, captioned_renders, corrupt
from accord.shapes.pretraining import build
from accord.shapes.pretraining.clip import ClipConfig
from accord.shapes.pretraining.data import SceneConfig, draw_scenes
from accord.shapes.pretraining.diffusion import DiffusionConfig, draw_timesteps, make_scheduler
from accord.shapes.pretraining.evaluator import EvaluatorConfig
from accord.shapes.pretraining.vae import VaeConfig, encode_mean, train_vae
from accord.shapes.scene import Scene

TINY_VAE = VaeConfig(steps=3, batch_size=4)


def tiny(output: Path) -> build.PretrainConfig:
    return build.PretrainConfig(
        output=output,
        scenes=SceneConfig(count=24),
        vae=TINY_VAE,
        evaluator=EvaluatorConfig(scenes=24, steps=2, batch_size=16),
        clip=ClipConfig(steps=2, batch_size=12),
        diffusion=DiffusionConfig(steps=2, batch_size=4, channels=(32, 32), text_width=32, probe_every=100),
    )


def test_twice_the_same_weights(tmp_path: Path) -> None:
    digests = []
    for name in ("first", "second"):
        config = tiny(tmp_path / name)
        parts = (build.build_vae, build.build_evaluator, build.build_clip, build.build_diffusion)
        digests.append([part(config, lambda line: None).digest for part in parts])
    assert digests[0] == digests[1]
    model = load_diffusion_model(tmp_path / "first" / "diffusion")
    assert model.prediction_type == "v_prediction"
    assert model.default_size == (64, 64)


def test_whitening_makes_latents_standard_and_keeps_the_image() -> None:
    data = draw_scenes(SceneConfig(count=64))
    vae = train_vae(data, VaeConfig(steps=20, batch_size=8), lambda line: None)
    latents = encode_mean(vae, data.images_NCHW)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-2, rtol=0)


def test_folding_leaves_reconstructions_as_they_were() -> None:
    from accord.shapes.pretraining.vae import whiten

    torch.manual_seed(0)
    data = draw_scenes(SceneConfig(count=16))
    vae = (
        AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4)
        .eval()
        .requires_grad_(False)
    )
    before = build.reconstruct(vae, data.images_NCHW).float()
    whiten(vae, data)
    after = build.reconstruct(vae, data.images_NCHW).float()
    assert (before - after).abs().max() <= 1.0


def test_timesteps_favour_high_noise() -> None:
    timesteps = draw_timesteps(10_000, 0.25, torch.Generator().manual_seed(0))
    assert (timesteps[:2_500] == 999).all()
    # The others have density 2t: a quarter of them below the middle.
    assert (timesteps[2_500:] < 500).float().mean() == pytest.approx(0.25, abs=0.02)
    assert make_scheduler().alphas_cumprod[-1] == 0.0


def test_captions_are_wrong_as_often_as_stated() -> None:
    rng = np.random.default_rng(0)
    scene = Scene("star", "red", 2, "on grass", 0)
    seen = [corrupt(scene, CaptionNoise(colour=0.4), rng) for _ in range(3_000)]
    assert np.mean([s.colour != "red" for s in seen]) == pytest.approx(0.4, abs=0.04)
    assert all((s.object, s.count, s.background) == ("star", 2, "on grass") for s in seen)


def test_captions_are_prompts_of_the_grammar() -> None:
    grammar, rng = load_grammar("shapes"), np.random.default_rng(0)
    scene = Scene("cross", "blue", 3, "at night", 0)
    texts = {caption(scene, grammar, rng) for _ in range(200)}
    assert len(texts) == 7  # every subset of three attributes but the empty one
    for text in texts:
        meaning = grammar.parse(text).meaning
        assert meaning["object"] == "cross"
        assert meaning.get("count", "three") == "three"


def test_the_source_is_seeded() -> None:
    first, again, other = (list(captioned_renders(5, seed)) for seed in (1, 1, 2))
    assert [c.caption for c in first] == [c.caption for c in again]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert [c.caption for c in first] != [c.caption for c in other]
