import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from accord.artifacts import verify
from accord.diffusion.encode import encode_images
from accord.diffusion.finetune import Finetuner
from accord.diffusion.model import DiffusionModel, load_diffusion_model, save_diffusion_model
from accord.diffusion.sample import SamplerConfig, sample_images
from accord.errors import ConfigError, FeedbackError, StorageError
from tests.diffusion.tuning import config, make_data, state
from tests.tiny import sd15_shaped_directory


def test_overfits_a_tiny_set(tiny_v_model: DiffusionModel) -> None:
    data = make_data(tiny_v_model, images=1, pretraining=1)
    tuner = Finetuner(tiny_v_model, data, config(steps=60, learning_rate=5e-3, condition_dropout=0.0), seed=0)
    losses = [float(tuner.step()["loss"]) for _ in range(60)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert tuner.step_index == 60


def test_zero_terminal_snr_trains_without_nan(tiny_v_model: DiffusionModel) -> None:
    tuner = Finetuner(tiny_v_model, make_data(tiny_v_model), config(timestep_power=1e9), seed=0)
    batch = tuner.batches.draw(0)
    assert set(batch.timesteps_B.tolist()) == {999}, "a high power draws the last timestep only"
    for _ in range(2):
        assert all(torch.isfinite(value) for value in tuner.step().values())
    assert all(torch.isfinite(tensor).all() for tensor in state(tuner))


def test_loss_is_equation_2_of_the_batch_drawn(tiny_model: DiffusionModel) -> None:
    tuner = Finetuner(tiny_model, make_data(tiny_model), config(beta=0.25), seed=3)
    batch = tuner.batches.draw(0)
    with torch.no_grad():
        prediction = tuner.unet(
            batch.noisy_BCHW, batch.timesteps_B, encoder_hidden_states=batch.text_BTD
        ).sample
    loss_B = ((prediction - batch.target_BCHW) ** 2).mean(dim=(1, 2, 3))
    assert batch.num_model == 5
    assert batch.weight_B[5:].tolist() == [0.0] * 3
    metrics = tuner.backward()
    expected = (batch.weight_B[:5] * loss_B[:5]).mean() + 0.25 * loss_B[5:].mean()
    torch.testing.assert_close(metrics["loss"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["model_loss_unweighted"], loss_B[:5].mean(), rtol=1e-4, atol=1e-5)


OBJECTIVES = ("reward_weighted_likelihood", "advantage_weighted_matching", "diffusion_nft")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("gradient_accumulation", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_number_of_workers_is_one(
    tiny_model: DiffusionModel, world_size: int, gradient_accumulation: int, objective: str
) -> None:
    data = make_data(tiny_model)
    whole = Finetuner(tiny_model, data, config(objective=objective), seed=5)
    parts = [
        Finetuner(
            tiny_model,
            data,
            config(objective=objective, gradient_accumulation=gradient_accumulation),
            seed=5,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    expected = whole.backward()
    metrics = [part.backward() for part in parts]
    for name, value in expected.items():
        torch.testing.assert_close(sum(m[name] for m in metrics), value, rtol=1e-4, atol=1e-6)
    for i, parameter in enumerate(whole.parameters):
        # DistributedDataParallel averages
        average = torch.stack([part.parameters[i].grad for part in parts]).mean(0)  # type: ignore[misc]
        torch.testing.assert_close(average, parameter.grad, rtol=1e-3, atol=1e-6)


def test_checkpoint_before_the_first_step(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    data = make_data(tiny_model)
    first = Finetuner(tiny_model, data, config(), seed=2)
    first.save(tmp_path / "checkpoint")
    second = Finetuner(tiny_model, data, config(), seed=2)
    second.load(tmp_path / "checkpoint")
    assert torch.equal(first.step()["loss"], second.step()["loss"])


def test_full_disk_leaves_the_last_checkpoint(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    tuner = Finetuner(tiny_model, make_data(tiny_model), config(), seed=2)
    before = tuner.save(tmp_path / "c")
    tuner.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="no room"):
            tuner.save(tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert verify(tmp_path / "c") == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_another_config_is_refused_by_name(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    data = make_data(tiny_model)
    Finetuner(tiny_model, data, config(), seed=2).save(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"beta \(1\.0 -> 0\.3\), learning_rate \(0\.001 -> 0\.002\)"):
        Finetuner(tiny_model, data, config(learning_rate=2e-3, beta=0.3), seed=2).load(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"seed \(2 -> 3\)"):
        Finetuner(tiny_model, data, config(), seed=3).load(tmp_path / "c")
    other = replace(data, reward_N=data.reward_N.flip(0))
    with pytest.raises(ConfigError, match=r"data \("):
        Finetuner(tiny_model, other, config(), seed=2).load(tmp_path / "c")


def test_averaged_weights_by_hand(tiny_model: DiffusionModel) -> None:
    tuner = Finetuner(tiny_model, make_data(tiny_model), config(ema_decay=0.75), seed=0)
    start = tuner.parameters[0].detach().clone()
    tuner.step()
    one = tuner.parameters[0].detach().clone()
    tuner.step()
    two = tuner.parameters[0].detach().clone()
    expected = 0.75 * (0.75 * start + 0.25 * one) + 0.25 * two
    averaged = next(iter(tuner.averaged_unet().parameters()))
    torch.testing.assert_close(averaged, expected)
    assert not torch.equal(averaged, two)
    plain = Finetuner(tiny_model, make_data(tiny_model), config(ema_decay=0.0), seed=0)
    plain.step()
    assert torch.equal(next(iter(plain.averaged_unet().parameters())), plain.parameters[0])


def test_the_model_given_is_left_alone(tiny_model: DiffusionModel) -> None:
    before = [p.clone() for p in tiny_model.unet.parameters()]
    tuner = Finetuner(tiny_model, make_data(tiny_model), config(), seed=0)
    tuner.step()
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_model.unet.parameters(), strict=True))
    assert not torch.equal(before[0], tuner.parameters[0])


def test_threshold_draws_kept_images_only(tiny_model: DiffusionModel) -> None:
    data = make_data(tiny_model)  # rewards 0.1, 0.26, 0.42, 0.58, 0.74, 0.9
    tuner = Finetuner(tiny_model, data, config(weighting="threshold", threshold=0.7), seed=0)
    assert tuner.batches.kept_indices.tolist() == [4, 5]
    assert tuner.batches.draw(0).weight_B.tolist() == [1.0] * 5 + [0.0] * 3
    with pytest.raises(FeedbackError, match=r"highest reward 0\.900, threshold 0\.95"):
        Finetuner(tiny_model, data, config(weighting="threshold", threshold=0.95), seed=0)


def test_condition_dropout_uses_the_empty_prompt(tiny_model: DiffusionModel) -> None:
    data = make_data(tiny_model)
    dropped = Finetuner(tiny_model, data, config(condition_dropout=1.0), seed=0).batches.draw(0)
    assert all(torch.equal(text, data.empty_text_TD) for text in dropped.text_BTD)
    kept = Finetuner(tiny_model, data, config(condition_dropout=0.0), seed=0).batches.draw(0)
    assert not any(torch.equal(text, data.empty_text_TD) for text in kept.text_BTD)


def test_pretraining_images_may_lose_their_captions_alone(tiny_model: DiffusionModel) -> None:
    data = make_data(tiny_model)
    settings = config(condition_dropout=0.0, pretraining_condition_dropout=1.0)
    batch = Finetuner(tiny_model, data, settings, seed=0).batches.draw(0)
    is_empty = [torch.equal(text, data.empty_text_TD) for text in batch.text_BTD]
    assert is_empty == [False] * 5 + [True] * 3


def test_pretraining_images_may_be_chosen_by_their_captions_reward(tiny_model: DiffusionModel) -> None:
    data = make_data(tiny_model)
    tuner = Finetuner(tiny_model, data, config(pretraining_threshold=0.6), seed=0)
    drawn = set()
    for step in range(20):
        batch = tuner.batches.draw(step)
        for text in batch.text_BTD[batch.num_model :]:
            drawn |= {row for row, known in enumerate(data.text_KTD) if torch.equal(known, text)}
    # Rewards are .1, .3, .5, .7 and .9, captions 0, 1, 2, 0 and 1: only the last two images are left.
    assert tuner.batches.pretraining_indices.tolist() == [3, 4]
    assert drawn == {0, 1}
    everything = Finetuner(tiny_model, data, config(), seed=0)
    assert everything.batches.pretraining_indices.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(FeedbackError, match=r"pretraining_threshold \(0.95\).*highest of 5 is 0.900"):
        Finetuner(tiny_model, data, config(pretraining_threshold=0.95), seed=0)


def test_favourites_are_chosen_by_reward() -> None:
    with pytest.raises(ValueError, match="give pretraining_threshold too"):
        config(pretraining_favourites=True)
    assert config(pretraining_favourites=True, pretraining_threshold=0.0).pretraining_favourites


def test_signed_objectives_go_towards_better_and_away_from_worse_images(tiny_model: DiffusionModel) -> None:
    data = make_data(tiny_model, images=2)
    data = replace(data, text_index_N=torch.zeros(2, dtype=torch.long), reward_N=torch.tensor([0.9, 0.1]))
    changes = {"condition_dropout": 0.0, "beta": 0.0, "batch_size": 16, "ema_decay": 0.0, "steps": 20}

    def losses(unet: torch.nn.Module) -> list[float]:
        """Denoising loss of the better and of the worse image, on the same noise."""
        settings = config(**{**changes, "weighting": "threshold", "batch_size": 64})
        found = []
        for reward in ([1.0, 0.0], [0.0, 1.0]):
            batch = Finetuner(
                tiny_model, replace(data, reward_N=torch.tensor(reward)), settings, seed=9
            ).batches.draw(0)
            with torch.no_grad():
                out = unet(batch.noisy_BCHW, batch.timesteps_B, encoder_hidden_states=batch.text_BTD).sample
            found.append(float((out - batch.target_BCHW).square().mean()))
        return found

    better, worse = losses(tiny_model.unet)
    for objective, options in (
        ("advantage_weighted_matching", {"advantage_clip": 1.0, "anchor": 1.2}),
        ("diffusion_nft", {"advantage_clip": 1.0, "nft_strength": 0.5}),
    ):
        tuner = Finetuner(tiny_model, data, config(objective=objective, **options, **changes), seed=0)
        assert tuner.batches.weight_N.tolist() == [1.0, -1.0]
        for _ in range(20):
            tuner.step()
        after = losses(tuner.unet)
        assert after[0] - better < after[1] - worse, objective


def test_an_anchor_too_weak_is_refused() -> None:
    with pytest.raises(ValueError, match=r"anchor \(1\.0\) is above advantage_clip \(2\.0\)"):
        config(objective="advantage_weighted_matching", anchor=1.0, advantage_clip=2.0)


def test_timestep_power_draws_towards_high_noise(tiny_model: DiffusionModel) -> None:
    data = make_data(tiny_model)
    drawn = {
        power: Finetuner(
            tiny_model, data, config(batch_size=500, pretraining_batch_size=0, timestep_power=power), seed=0
        ).batches.draw(0)
        for power in (1.0, 2.0)
    }
    # E[T u] = T / 2, E[T u^(1/2)] = 2T / 3
    assert drawn[1.0].timesteps_B.float().mean() == pytest.approx(500, abs=40)
    assert drawn[2.0].timesteps_B.float().mean() == pytest.approx(667, abs=40)
    assert int(drawn[1.0].timesteps_B.max()) <= 999


def test_control_learns_from_pretraining_images_alone(tiny_model: DiffusionModel) -> None:
    data = make_data(tiny_model)
    control = Finetuner(tiny_model, data, config(objective="pretraining_only"), seed=0)
    assert control.batches.draw(0).num_model == 0
    assert len(control.batches.draw(0).weight_B) == 3
    metrics = control.step()
    assert float(metrics["model_loss"]) == 0
    assert float(metrics["loss"]) == pytest.approx(float(metrics["pretraining_loss"]))
    with pytest.raises(ValueError, match="pretraining_only"):
        config(objective="pretraining_only", beta=0.0)


def test_nothing_to_learn_from_is_a_clear_error(tiny_model: DiffusionModel) -> None:
    data = make_data(tiny_model)
    no_images = replace(data, latents_NCHW=data.latents_NCHW[:0], text_index_N=data.text_index_N[:0])
    with pytest.raises(FeedbackError, match="no generated images"):
        Finetuner(tiny_model, no_images, config(), seed=0)
    no_pretraining = replace(data, pretraining_latents_MCHW=torch.zeros(0, 4, 8, 8))
    with pytest.raises(ConfigError, match="no pre-training images"):
        Finetuner(tiny_model, no_pretraining, config(), seed=0)
    Finetuner(tiny_model, no_pretraining, config(beta=0.0), seed=0).step()
    with pytest.raises(FeedbackError, match="one finite reward"):
        Finetuner(tiny_model, replace(data, reward_N=data.reward_N * float("nan")), config(), seed=0)
    with pytest.raises(ConfigError, match="text_index into the 3"):
        Finetuner(tiny_model, replace(data, text_index_N=data.text_index_N + 1), config(), seed=0)
    with pytest.raises(ConfigError, match=r"expected \[N, 4, H, W\]"):
        Finetuner(tiny_model, replace(data, latents_NCHW=data.latents_NCHW[:, :3]), config(), seed=0)
    with pytest.raises(ConfigError, match=r"expected \[K, T, 32\]"):
        Finetuner(tiny_model, replace(data, text_KTD=data.text_KTD[..., :16]), config(), seed=0)
    with pytest.raises(ConfigError, match="too small for 9 workers"):
        Finetuner(tiny_model, data, config(), seed=0, world_size=9)


class NoSync(TorchDispatchMode):
    """Fails when a tensor's value is read into Python, which waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten._local_scalar_dense.default, "a host sync in step()"
        return func(*args, **(kwargs or {}))


def test_step_reads_no_value_back(tiny_model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Finetuner(tiny_model, make_data(tiny_model), config(gradient_accumulation=2), seed=0)
    # AdamW reads its step counters, which are on the CPU unless it is fused.
    monkeypatch.setattr(tuner.optimizer, "step", lambda: None)
    with NoSync():
        tuner.step()
        with pytest.raises(AssertionError, match="host sync"):
            float(tuner.parameters[0].detach().sum())


@pytest.mark.gpu
def test_step_never_waits_for_the_gpu(tiny_directory: Path) -> None:
    model = load_diffusion_model(tiny_directory, device="cuda")
    tuner = Finetuner(model, make_data(model), config(precision="bfloat16"), seed=0)
    tuner.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = tuner.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics["loss"].device.type == "cuda"


def test_bfloat16_trains_float32_weights(tiny_model: DiffusionModel) -> None:
    data = make_data(tiny_model)
    exact = Finetuner(tiny_model, data, config(), seed=0).step()["loss"]
    tuner = Finetuner(tiny_model, data, config(precision="bfloat16"), seed=0)
    loss = tuner.step()["loss"]
    assert {p.dtype for p in tuner.parameters} == {torch.float32}
    assert loss != exact
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)


def test_sd15_architecture_loads_tunes_a_step_and_saves(tmp_path: Path) -> None:
    model = load_diffusion_model(sd15_shaped_directory(tmp_path))
    with torch.device("meta"):  # the real widths, without their weights
        full = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280)
        )
    assert sum(p.numel() for p in full.parameters()) == 859_520_964, "the UNet of Stable Diffusion 1.5"
    assert set(model.unet.state_dict()) == set(full.state_dict())
    images = sample_images(
        model, ["red star", "two circles"], [0, 1], SamplerConfig(steps=2, scheduler="DDIMScheduler")
    )
    data = replace(make_data(model, images=2), latents_NCHW=encode_images(model, images))
    tuner = Finetuner(model, data, config(batch_size=2, pretraining_batch_size=2), seed=0)
    tuner.step()
    aligned = replace(model, unet=tuner.averaged_unet())
    manifest = save_diffusion_model(
        aligned, tmp_path / "aligned", inputs={"model": model.digest}, config={}, seed=0, dtype=torch.float16
    )
    assert manifest.digest != model.digest
    assert load_diffusion_model(tmp_path / "aligned").digest == manifest.digest
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "aligned", safety_checker=None)
    assert list(pipeline.unet.config.block_out_channels) == [32, 64, 128, 128]
