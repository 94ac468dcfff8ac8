"""Low-rank adapters: what is trained, from where it begins, and that the model handed on is whole."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from accord.artifacts import load_tensors
from accord.diffusion import trainable
from accord.diffusion.checkpoint import put_trained
from accord.diffusion.finetune import Finetuner
from accord.diffusion.model import DiffusionModel, load_diffusion_model, save_diffusion_model
from accord.errors import ConfigError
from tests.diffusion.tuning import config, make_data

SMALL = {"rank": 4, "alpha": 8}
CONVOLUTIONS = {**SMALL, "target_modules": ["to_q", "to_out.0", "conv1", "proj_in"]}


def tuned(model: DiffusionModel, steps: int = 0, **changes: Any) -> Finetuner:
    tuner = Finetuner(
        model, make_data(model), config(**{"parameters": "lora", "lora": SMALL} | changes), seed=4
    )
    for _ in range(steps):
        tuner.step()
    return tuner


def predict(unet: Any, tuner: Finetuner) -> torch.Tensor:
    batch = tuner.batches.draw(7)
    with torch.no_grad():
        prediction: torch.Tensor = unet(
            batch.noisy_BCHW, batch.timesteps_B, encoder_hidden_states=batch.text_BTD
        ).sample
    return prediction


def test_adapters_alone_are_trained_and_begin_as_the_reference_model(tiny_model: DiffusionModel) -> None:
    before = copy.deepcopy(tiny_model.unet.state_dict())
    tuner = tuned(tiny_model)
    assert all("lora_" in name for name in tuner.names)
    assert sum(p.numel() for p in tuner.parameters) < 0.2 * sum(t.numel() for t in before.values())
    torch.testing.assert_close(predict(tuner.unet, tuner), predict(tiny_model.unet, tuner))
    losses = [float(tuner.step()["loss"]) for _ in range(3)]
    assert len(set(losses)) == 3
    assert not torch.allclose(predict(tuner.unet, tuner), predict(tiny_model.unet, tuner), atol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.unet.state_dict().items())


@pytest.mark.parametrize("lora", [SMALL, CONVOLUTIONS])
def test_merged_adapters_predict_what_the_trained_network_does(
    tiny_model: DiffusionModel, lora: dict[str, Any]
) -> None:
    tuner = tuned(tiny_model, steps=3, lora=lora, ema_decay=0.0, learning_rate=1e-2)
    merged = tuner.averaged_unet(tiny_model.unet)
    assert set(merged.state_dict()) == set(tiny_model.unet.state_dict())
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    expected = predict(tuner.unet, tuner)
    assert not torch.allclose(expected, predict(tiny_model.unet, tuner), atol=1e-2)
    torch.testing.assert_close(predict(merged, tuner), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match="as `base` where adapters are trained"):
        tuner.averaged_unet()


def test_the_model_handed_on_is_a_whole_pipeline(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    tuner = tuned(tiny_model, steps=2, learning_rate=1e-2)
    tuner.save(tmp_path / "checkpoint")
    held = load_tensors(tmp_path / "checkpoint" / "state.safetensors")
    assert {name.split(".")[0] for name in held} == {"unet", "average", "optimizer"}
    assert all("lora_" in name for name in held)

    model = load_diffusion_model(tiny_model.directory)
    put_trained(model.unet, tmp_path / "checkpoint", model.digest, tuner.config)
    expected = tuner.averaged_unet(tiny_model.unet).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.unet.state_dict().items())
    save_diffusion_model(model, tmp_path / "aligned", inputs={}, config={}, seed=0)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "aligned", safety_checker=None)
    torch.testing.assert_close(predict(pipeline.unet, tuner), predict(model.unet, tuner))
    with pytest.raises(ConfigError, match=r"lora \("):
        put_trained(model.unet, tmp_path / "checkpoint", model.digest, config(parameters="lora"))


def test_the_reference_model_is_the_network_without_its_adapters(tiny_model: DiffusionModel) -> None:
    tuner = tuned(tiny_model, steps=2, objective="advantage_weighted_matching", learning_rate=1e-2)
    assert tuner.reference is tuner.unet
    with trainable.without_adapters(tuner.unet):
        torch.testing.assert_close(
            predict(tuner.unet, tuner), predict(tiny_model.unet, tuner), rtol=0, atol=0
        )
    assert not torch.allclose(predict(tuner.unet, tuner), predict(tiny_model.unet, tuner), atol=1e-3)
    # The same loss and gradients as with a reference model of its own.
    expected = tuner.backward()["loss"]
    gradients = [parameter.grad for parameter in tuner.parameters]
    tuner.reference = tiny_model.unet
    torch.testing.assert_close(tuner.backward()["loss"], expected)
    for gradient, parameter in zip(gradients, tuner.parameters, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_adapters_begin_alike_whatever_was_drawn_before(tiny_model: DiffusionModel) -> None:
    first = tuned(tiny_model)
    torch.manual_seed(12345)
    before = torch.random.get_rng_state()
    second = tuned(tiny_model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, second.parameters, strict=True))
    assert any(float(parameter.detach().abs().max()) > 0 for parameter in first.parameters)
    other = Finetuner(tiny_model, make_data(tiny_model), first.config, seed=5)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters, other.parameters, strict=True))


def test_a_frozen_network_in_bfloat16_computes_the_same(
    tiny_model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    halved = tuned(tiny_model, steps=2, precision="bfloat16")
    kinds = {parameter.dtype for parameter in halved.unet.parameters() if not parameter.requires_grad}
    assert kinds == {torch.bfloat16, torch.float32}
    assert {parameter.dtype for parameter in halved.parameters} == {torch.float32}
    assert {parameter.dtype for parameter in tiny_model.unet.parameters()} == {torch.float32}
    monkeypatch.setattr(trainable, "_halve_frozen", lambda unet: None)
    whole = tuned(tiny_model, steps=2, precision="bfloat16")
    assert torch.equal(halved.backward()["loss"], whole.backward()["loss"])
    assert all(torch.equal(a, b) for a, b in zip(halved.parameters, whole.parameters, strict=True))


def test_a_layer_that_is_not_there_is_a_clear_error(tiny_model: DiffusionModel) -> None:
    with pytest.raises(ConfigError, match=r"no layer 'to_kk'; in most UNets the attention's are to_q"):
        tuned(tiny_model, lora={**SMALL, "target_modules": ["to_q", "to_kk"]})


@pytest.mark.parametrize("parameters", ["full", "lora"])
def test_activations_computed_again_change_nothing(tiny_model: DiffusionModel, parameters: str) -> None:
    kept, again = (
        tuned(tiny_model, parameters=parameters, gradient_checkpointing=value) for value in (False, True)
    )
    assert torch.equal(kept.backward()["loss"], again.backward()["loss"])
    for a, b in zip(kept.parameters, again.parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
    assert any(getattr(module, "gradient_checkpointing", False) for module in again.unet.modules())


@pytest.mark.parametrize("parameters", ["full", "lora"])
def test_weights_in_another_order_train_alike(
    tiny_model: DiffusionModel, parameters: str, tmp_path: Path
) -> None:
    usual = tuned(tiny_model, 2, parameters=parameters)
    other = tuned(tiny_model, 1, parameters=parameters, channels_last=True)
    other.save(tmp_path / "checkpoint")
    resumed = tuned(tiny_model, parameters=parameters, channels_last=True)
    resumed.load(tmp_path / "checkpoint")
    for parameter in resumed.parameters:
        strides = {t.stride() for t in resumed.optimizer.state[parameter].values() if t.ndim}
        assert strides == {parameter.stride()}
    other.step()
    resumed.step()
    for a, b, c in zip(usual.parameters, other.parameters, resumed.parameters, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=2e-4)
        assert torch.equal(b, c)
    assert all(parameter.is_contiguous() for parameter in tiny_model.unet.parameters())
