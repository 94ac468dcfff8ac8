from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from accord.diffusion.model import DiffusionModel
from accord.diffusion.sample import (
    SamplerConfig,
    decode_latents,
    initial_noise,
    make_scheduler,
    sample_images,
    sample_latents,
)
from accord.errors import ConfigError

PROMPTS = ["red star", "two circles on grass", "blue heart"]
SEEDS = [7, 8, 9]
SCHEDULERS = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "EulerAncestralDiscreteScheduler",  # draws noise at each step
]


def config(scheduler: str = "DPMSolverMultistepScheduler", **changes: object) -> SamplerConfig:
    return SamplerConfig.model_validate({"scheduler": scheduler, "steps": 4, "guidance_scale": 3.0} | changes)


def difference(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first.astype(int) - second.astype(int)).max())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("which", ["tiny_model", "tiny_v_model"])
def test_same_seed_same_bytes_whoever_shares_the_batch(
    scheduler: str, which: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    together = sample_images(model, PROMPTS, SEEDS, config(scheduler))
    again = sample_images(model, PROMPTS, SEEDS, config(scheduler))
    assert together.tobytes() == again.tobytes()
    alone = sample_images(model, PROMPTS[1:2], SEEDS[1:2], config(scheduler))
    assert difference(together[1:2], alone) <= 1
    assert together.shape == (3, 64, 64, 3)
    assert together.dtype == np.uint8
    assert difference(together[0], together[1]) > 10, "samples do differ, or the test would show nothing"


@pytest.mark.parametrize("scheduler", SCHEDULERS[:4])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_equals_the_unmodified_pipeline(
    tiny_directory: Path, tiny_model: DiffusionModel, scheduler: str, guidance_scale: float
) -> None:
    ours = config(scheduler, guidance_scale=guidance_scale, negative_prompt="cross")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_directory, safety_checker=None)
    pipeline.scheduler = make_scheduler(tiny_model, ours)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        negative_prompt=["cross"] * 3,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        latents=initial_noise(SEEDS, (4, 8, 8)),
        output_type="np",
    ).images
    theirs = (theirs * 255).round().astype(np.uint8)
    assert difference(sample_images(tiny_model, PROMPTS, SEEDS, ours), theirs) <= 1


def test_guidance_and_negative_prompt_matter(tiny_model: DiffusionModel) -> None:
    free = sample_latents(tiny_model, PROMPTS, SEEDS, config(guidance_scale=1.0))
    led = sample_latents(tiny_model, PROMPTS, SEEDS, config(guidance_scale=7.5))
    negative = sample_latents(tiny_model, PROMPTS, SEEDS, config(guidance_scale=7.5, negative_prompt="cross"))
    assert not torch.allclose(free, led, atol=1e-4)
    assert not torch.allclose(led, negative, atol=1e-4)


def test_without_guidance_the_unet_sees_no_second_half(
    tiny_model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    forward = tiny_model.unet.forward

    def counting(sample: torch.Tensor, *arguments: object, **named: object) -> object:
        batches.append(len(sample))
        return forward(sample, *arguments, **named)

    monkeypatch.setattr(tiny_model.unet, "forward", counting)
    sample_latents(tiny_model, PROMPTS, SEEDS, config(guidance_scale=1.0))
    sample_latents(tiny_model, PROMPTS, SEEDS, config(guidance_scale=1.5))
    assert batches == [3] * 4 + [6] * 4


def test_noise_is_each_seeds_own() -> None:
    noise_BCHW = initial_noise([3, 4, 3], (4, 8, 8))
    assert torch.equal(noise_BCHW[0], noise_BCHW[2])
    assert not torch.equal(noise_BCHW[0], noise_BCHW[1])
    assert torch.equal(noise_BCHW[0], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3)))


def test_progress_size_and_bfloat16(tiny_model: DiffusionModel) -> None:
    seen: list[tuple[int, int]] = []
    wide = config(height=32, width=64, precision="bfloat16")
    latents = sample_latents(
        tiny_model, PROMPTS, SEEDS, wide, progress=lambda done, steps: seen.append((done, steps))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert latents.shape == (3, 4, 4, 8)
    assert latents.dtype == torch.float32
    assert decode_latents(tiny_model, latents, batch_size=2).shape == (3, 32, 64, 3)
    exact = sample_latents(tiny_model, PROMPTS, SEEDS, wide.model_copy(update={"precision": "float32"}))
    assert 0 < (latents - exact).abs().max() < 0.2


def test_scheduler_options_reach_the_scheduler(tiny_model: DiffusionModel) -> None:
    scheduler = make_scheduler(tiny_model, config(scheduler_options={"use_karras_sigmas": True}))
    assert scheduler.config.use_karras_sigmas is True
    assert scheduler.config.beta_end == 0.012, "the noise schedule is the model's"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "NoSuchScheduler"}, "no scheduler 'NoSuchScheduler'.*DDIMScheduler"),
        ({"scheduler": "AutoencoderKL"}, "no scheduler 'AutoencoderKL'"),
        ({"scheduler_options": {"karas": True}}, "no option karas; it has .*use_karras_sigmas"),
        ({"height": 60}, "multiples of 8 pixels, got 60 x 64"),
    ],
)
def test_bad_config_is_a_clear_error(
    tiny_model: DiffusionModel, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sample_latents(tiny_model, PROMPTS, SEEDS, config(**changes))  # type: ignore[arg-type]


def test_a_seed_for_each_prompt(tiny_model: DiffusionModel) -> None:
    with pytest.raises(ConfigError, match="3 prompts and 2 seeds"):
        sample_latents(tiny_model, PROMPTS, SEEDS[:2], config())
