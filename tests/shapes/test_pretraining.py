"""Making the weights from nothing, in miniature: reproducible, and every part is an artifact that loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from accord.artifacts import Manifest
from accord.diffusion.model import load_diffusion_model
from accord.errors import ConfigError
from accord.prompts import load_grammar
from accord.shapes.captions import LOOKALIKES, CaptionNoise, caption, captioned_renders, corrupt
from accord.shapes.pretraining import build
from accord.shapes.pretraining.clip import ClipConfig
from accord.shapes.pretraining.data import SceneConfig, draw_scenes
from accord.shapes.pretraining.diffusion import DiffusionConfig, draw_timesteps, make_scheduler
from accord.shapes.pretraining.evaluator import EvaluatorConfig
from accord.shapes.pretraining.vae import VaeConfig, encode_mean, train_vae
from accord.shapes.scene import ATTRIBUTES, Scene

TINY_VAE = VaeConfig(steps=3, batch_size=4)


def tiny(output: Path) -> build.PretrainConfig:
    return build.PretrainConfig(
        output=output,
        scenes=SceneConfig(count=24),
        vae=TINY_VAE,
        evaluator=EvaluatorConfig(scenes=24, steps=2, batch_size=16),
        clip=ClipConfig(steps=2, batch_size=12),
        diffusion=DiffusionConfig(
            scenes=24,
            legs=(2, 1),
            careless_from=2,
            batch_size=4,
            channels=(32, 32),
            text_width=32,
        ),
        held_out=4,  # how well it reads is not what these tests are about
    )


def pretrain_diffusion(config: build.PretrainConfig) -> Manifest:
    build.encode_scenes(config)
    learner = build.diffusion_pretrainer(config)
    while learner.step_index < config.diffusion.steps:
        learner.step()
    return build.save_diffusion(config, learner.model(), lambda line: None)


def test_twice_the_same_weights(tmp_path: Path) -> None:
    digests = []
    for name in ("first", "second"):
        config = tiny(tmp_path / name)
        parts = (build.build_vae, build.build_evaluator, build.build_clip)
        digests.append([part(config, lambda line: None).digest for part in parts])
        digests[-1].append(pretrain_diffusion(config).digest)
    assert digests[0] == digests[1]
    model = load_diffusion_model(tmp_path / "first" / "diffusion")
    assert model.prediction_type == "v_prediction"
    assert model.default_size == (64, 64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> build.PretrainConfig:
    """With an autoencoder and latents."""
    config = tiny(tmp_path_factory.mktemp("small"))
    build.build_vae(config, lambda line: None)
    build.encode_scenes(config)
    return config


def test_pretraining_resumes_exactly(small: build.PretrainConfig, tmp_path: Path) -> None:
    through, first = build.diffusion_pretrainer(small), build.diffusion_pretrainer(small)
    losses = [float(through.step()["loss"]) for _ in range(3)]
    first.step()
    first.save(tmp_path / "checkpoint")
    second = build.diffusion_pretrainer(small)
    second.load(tmp_path / "checkpoint")
    assert [float(second.step()["loss"]) for _ in range(2)] == losses[1:]
    for resumed, uninterrupted in zip(
        second.averaged.parameters(), through.averaged.parameters(), strict=True
    ):
        assert torch.equal(resumed, uninterrupted)
    longer = small.model_copy(update={"diffusion": small.diffusion.model_copy(update={"legs": (2, 9)})})
    with pytest.raises(ConfigError, match=r"legs \(\[2, 1\] -> \[2, 9\]\)"):
        build.diffusion_pretrainer(longer).load(tmp_path / "checkpoint")


def test_the_learning_rate_starts_again_in_each_leg() -> None:
    config = DiffusionConfig(legs=(300, 200), learning_rates=(1.0, 0.5), careless_from=400)
    assert config.steps == 500
    assert config.rate(99) == 1.0
    assert config.rate(299) < 1e-3
    assert config.rate(300 + 99) == 0.5
    assert config.rate(499) < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"legs": (100,)}, "1 legs and 2 learning_rates"),
        ({"careless_from": 14_000}, "nothing to align"),
        ({"workers": 3}, "cannot share batch_size 64 evenly"),
    ],
)
def test_what_would_fail_late_is_refused_at_once(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig.model_validate(changes)


def test_two_workers_share_a_batch(small: build.PretrainConfig) -> None:
    whole = build.diffusion_pretrainer(small)._draw()
    halves = [build.diffusion_pretrainer(small, rank=rank, world_size=2)._draw() for rank in (0, 1)]
    for all_of_it, one, other in zip(whole, *halves, strict=True):
        assert torch.equal(all_of_it[::2], one)
        assert torch.equal(all_of_it[1::2], other)


def test_the_text_encoder_rests_while_captions_are_careless(small: build.PretrainConfig) -> None:
    learner = build.diffusion_pretrainer(small)
    careless = []
    for _ in range(3):
        before = [p.detach().clone() for p in learner.trained.text.parameters()]
        careless.append(learner.careless)
        learner.step()
        after = learner.trained.text.parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == careless[-1]
    assert careless == [False, False, True]


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
    assert (timesteps == 999).float().mean() == pytest.approx(0.25, abs=0.02)
    # The others have density 2t: a quarter of them below the middle.
    assert (timesteps[timesteps < 999] < 500).float().mean() == pytest.approx(0.25, abs=0.02)
    assert make_scheduler().alphas_cumprod[-1] == 0.0


def test_captions_take_lookalikes_as_often_as_stated() -> None:
    rng = np.random.default_rng(0)
    scene = Scene("star", "red", 3, "at night", 0)
    seen = [corrupt(scene, CaptionNoise(colour=0.4, count=0.6, background=1.0), rng) for _ in range(3_000)]
    assert np.mean([s.colour == "orange" for s in seen]) == pytest.approx(0.4, abs=0.04)
    assert np.mean([s.count == 4 for s in seen]) == pytest.approx(0.6, abs=0.04)
    assert {s.colour for s in seen} == {"red", "orange"}
    assert all((s.object, s.background, s.seed) == ("star", "at night", 0) for s in seen)


def test_lookalikes_are_mutual_words_of_one_attribute() -> None:
    for one, other in LOOKALIKES.items():
        assert LOOKALIKES[other] == one
        assert sum({one, other} <= set(words) for words in ATTRIBUTES.values()) == 1


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
