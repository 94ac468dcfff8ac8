"""SDXL, small and random: what its own pipeline draws, we draw, alone and in any batch; and it learns."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from accord.diffusion.adapters import StableDiffusionAdapter, adapter_for
from accord.diffusion.conditioning import encode_conditioning, unet_arguments
from accord.diffusion.encode import encode_images
from accord.diffusion.engine import Engine, EngineConfig
from accord.diffusion.finetune import FinetuneConfig, FinetuneData, Finetuner
from accord.diffusion.model import DiffusionModel, load_diffusion_model, save_diffusion_model
from accord.diffusion.sample import (
    SamplerConfig,
    decode_latents,
    initial_noise,
    make_scheduler,
    sample_images,
    sample_latents,
)
from accord.errors import ConfigError
from tests.diffusion.engines import difference, reference, spec, together
from tests.tiny import tiny_xl_directory

PROMPTS = ["red star", "two circles on grass", "blue heart"]
SEEDS = [7, 8, 9]
MEANS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.9, 1.1, 1.3, 0.7]}


@pytest.fixture(scope="module")
def xl_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_xl_directory(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def xl_model(xl_directory: Path) -> DiffusionModel:
    """Shared by all tests: do not change it."""
    return load_diffusion_model(xl_directory)


def config(**changes: object) -> SamplerConfig:
    values = {"scheduler": "EulerDiscreteScheduler", "steps": 4, "guidance_scale": 5.0}
    return SamplerConfig.model_validate(values | changes)


def theirs(directory: Path, model: DiffusionModel, ours: SamplerConfig, **changes: object) -> np.ndarray:
    """The same images by the unmodified pipeline."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(directory, add_watermarker=False)
    pipeline.scheduler = make_scheduler(model, ours)
    pipeline.set_progress_bar_config(disable=True)
    height, width = ours.height or 64, ours.width or 64
    images = pipeline(
        PROMPTS,
        num_inference_steps=ours.steps,
        guidance_scale=ours.guidance_scale,
        latents=initial_noise(SEEDS, (4, height // 8, width // 8)),
        height=height,
        width=width,
        output_type="np",
        **changes,
    ).images
    return (images * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("changes", "negative"),
    [
        ({}, None),
        ({"guidance_scale": 1.0}, None),
        ({"negative_prompt": "cross"}, ["cross"] * 3),
        ({"height": 32, "width": 96}, None),
        ({"scheduler": "DPMSolverMultistepScheduler"}, None),
    ],
)
def test_equals_the_unmodified_pipeline(
    xl_directory: Path, xl_model: DiffusionModel, changes: dict[str, object], negative: list[str] | None
) -> None:
    ours = config(**changes)
    expected = theirs(xl_directory, xl_model, ours, negative_prompt=negative)
    assert difference(sample_images(xl_model, PROMPTS, SEEDS, ours), expected) <= 1


@pytest.mark.parametrize(
    ("options", "negative"),
    [
        ({"prediction_type": "v_prediction"}, None),
        ({"zero_empty_prompt": False}, None),
        ({"vae_options": MEANS}, None),
    ],
)
def test_equals_the_pipeline_of_unlike_models(
    tmp_path: Path, options: dict[str, object], negative: list[str] | None
) -> None:
    directory = tiny_xl_directory(tmp_path, **options)  # type: ignore[arg-type]
    model = load_diffusion_model(directory)
    expected = theirs(directory, model, config(), negative_prompt=negative)
    assert difference(sample_images(model, PROMPTS, SEEDS, config()), expected) <= 1
    # ... and the engine agrees, alone.
    with Engine(EngineConfig(max_batch=8)) as engine:
        engine.load("m", model)
        wanted = spec(SEEDS[0], scheduler="EulerDiscreteScheduler", guidance_scale=5.0, prompt=PROMPTS[0])
        assert difference(engine.submit(wanted).future.result(60), expected[0]) <= 1


def test_pictures_size_pooled_text_and_zeros_matter(xl_model: DiffusionModel) -> None:
    """Or the comparisons above would show nothing."""
    prompts = encode_conditioning(xl_model, PROMPTS)
    assert prompts["states"].shape == (3, 24, 48)
    assert prompts["pooled"].shape == (3, 24)
    empty = encode_conditioning(xl_model, ["", "cross"], negative=True)
    assert not empty["states"][0].any()
    assert not empty["pooled"][0].any()
    assert empty["states"][1].any()
    assert encode_conditioning(xl_model, [""])["states"].any()
    latents = initial_noise(SEEDS, (4, 8, 8))
    arguments = unet_arguments(prompts, latents, 8)
    assert arguments["added_cond_kwargs"]["time_ids"].tolist() == [[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 3

    def predict(**changes: torch.Tensor) -> torch.Tensor:
        added = arguments["added_cond_kwargs"] | changes
        with torch.no_grad():
            output: torch.Tensor = xl_model.unet(
                latents, 500, encoder_hidden_states=prompts["states"], added_cond_kwargs=added
            ).sample
        return output

    plain = predict()
    assert not torch.allclose(plain, predict(time_ids=torch.zeros(3, 6)), atol=1e-3)
    assert not torch.allclose(plain, predict(text_embeds=prompts["pooled"].flip(0)), atol=1e-4)


def test_in_any_batch_as_alone(xl_model: DiffusionModel) -> None:
    assert isinstance(adapter_for(xl_model), StableDiffusionAdapter)
    wanted = [spec(seed, prompt=prompt) for seed, prompt in zip(SEEDS, PROMPTS, strict=True)]
    wanted += [spec(4, guidance_scale=1.0), spec(5, steps=3, negative_prompt="cross"), spec(6, height=32)]
    with Engine(EngineConfig(max_batch=16, batch_sizes=(16,))) as engine:
        engine.load("m", xl_model)
        tickets = together(engine, wanted)
        images = [ticket.future.result(120) for ticket in tickets]
    for image, alone in zip(images, wanted, strict=True):
        assert difference(image, reference(xl_model, alone)) <= 1
    assert difference(images[0], images[1]) > 10, "samples do differ, or the test would show nothing"


def test_the_vae_stays_in_float32_where_float16_would_overflow(tmp_path: Path) -> None:
    model = load_diffusion_model(tiny_xl_directory(tmp_path), dtype=torch.float16)
    assert (model.dtype, model.vae_dtype) == (torch.float16, torch.float32)
    assert model.text_encoder_2.dtype == torch.float16
    latents = initial_noise(SEEDS, (4, 8, 8))
    assert decode_latents(model, latents).shape == (3, 64, 64, 3)
    assert encode_images(model, decode_latents(model, latents)).dtype == torch.float32
    model.vae.register_to_config(force_upcast=False)
    assert model.to("cpu", torch.float16).vae_dtype == torch.float16
    assert model.to("cpu", torch.bfloat16).vae_dtype == torch.bfloat16


def finetune_data(model: DiffusionModel) -> FinetuneData:
    images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    latents = encode_images(model, images)
    prompts, empty = encode_conditioning(model, PROMPTS), encode_conditioning(model, [""], negative=True)
    return FinetuneData(
        latents_NCHW=latents[:4],
        text_index_N=torch.tensor([0, 0, 1, 2]),
        reward_N=torch.tensor([0.9, 0.1, 0.8, 0.4]),
        pretraining_latents_MCHW=latents[4:],
        pretraining_text_index_M=torch.tensor([1, 2]),
        pretraining_reward_M=torch.zeros(2),
        text_KTD=prompts["states"],
        empty_text_TD=empty["states"][0],
        pooled_KP=prompts["pooled"],
        empty_pooled_P=empty["pooled"][0],
    )


def finetune_config(**changes: object) -> FinetuneConfig:
    values = {"steps": 4, "batch_size": 4, "pretraining_batch_size": 2, "learning_rate": 1e-3}
    return FinetuneConfig.model_validate(values | changes)


@pytest.mark.parametrize("objective", ["reward_weighted_likelihood", "advantage_weighted_matching"])
def test_finetunes_on_pooled_text_and_sizes(xl_model: DiffusionModel, tmp_path: Path, objective: str) -> None:
    """The first step's prediction is the UNet's own under the pipeline's conditions; then weights move, are
    saved, resumed and served."""
    data = finetune_data(xl_model)
    changed = finetune_config(objective=objective, condition_dropout=0.5, ema_decay=0.5)
    tuner = Finetuner(xl_model, data, changed, seed=0)
    batch = tuner.batches.draw(0)
    noisy, timesteps, conditioning = batch.inputs(slice(0, 6))
    dropped = [not row.any() for row in conditioning["states"]]
    assert dropped == [not row.any() for row in conditioning["pooled"]], "dropped together"
    assert any(dropped)
    assert not all(dropped)
    with torch.no_grad():
        expected = xl_model.unet(
            noisy,
            timesteps,
            encoder_hidden_states=conditioning["states"],
            added_cond_kwargs={
                "text_embeds": conditioning["pooled"],
                "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 6),
            },
        ).sample
        torch.testing.assert_close(tuner._predict(tuner.unet, noisy, timesteps, conditioning), expected)
    for _ in range(2):
        tuner.step()
    tuner.save(tmp_path / "checkpoint")
    resumed = Finetuner(xl_model, data, changed, seed=0)
    resumed.load(tmp_path / "checkpoint")
    tuner.step()
    resumed.step()
    for ours, again in zip(tuner.parameters, resumed.parameters, strict=True):
        assert torch.equal(ours, again)
    aligned = replace(xl_model, unet=tuner.averaged_unet())
    manifest = save_diffusion_model(aligned, tmp_path / "aligned", inputs={}, config={}, seed=0)
    loaded = load_diffusion_model(tmp_path / "aligned")
    assert loaded.digest == manifest.digest
    ours = sample_images(loaded, PROMPTS, SEEDS, config())
    assert difference(ours, theirs(tmp_path / "aligned", loaded, config())) <= 1
    assert not torch.allclose(
        sample_latents(loaded, PROMPTS, SEEDS, config()), sample_latents(xl_model, PROMPTS, SEEDS, config())
    )


def test_data_of_another_kind_of_model_is_refused(
    xl_model: DiffusionModel, tiny_model: DiffusionModel
) -> None:
    data = finetune_data(xl_model)
    with pytest.raises(ConfigError, match=r"SDXL needs pooled texts \[3, 24\].*None"):
        Finetuner(xl_model, replace(data, pooled_KP=None), finetune_config(), seed=0)
    with pytest.raises(ConfigError, match="only SDXL takes"):
        Finetuner(
            tiny_model,
            replace(data, text_KTD=torch.zeros(3, 24, 32), empty_text_TD=torch.zeros(24, 32)),
            finetune_config(),
            seed=0,
        )
