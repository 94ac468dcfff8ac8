"""An interrupted fine-tuning ends bit for bit as one that nobody interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from accord.artifacts import verify
from accord.diffusion.checkpoint import put_trained
from accord.diffusion.finetune import Finetuner
from accord.diffusion.model import DiffusionModel, load_diffusion_model
from accord.errors import ArtifactError, ConfigError
from tests.diffusion.tuning import config, make_data, state
from tests.tiny import tiny_diffusion_directory

LORA = {"parameters": "lora", "lora": {"rank": 4}}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"schedule": "cosine", "warmup_steps": 2},
    "full, in two parts, no average": {"gradient_accumulation": 2, "ema_decay": 0.0},
    "full, signed, checkpointing": {"objective": "diffusion_nft", "gradient_checkpointing": True},
    "full, bfloat16": {"precision": "bfloat16"},
    "lora": LORA,
    "lora, signed, bfloat16": {**LORA, "precision": "bfloat16", "objective": "advantage_weighted_matching"},
}


def tuner(model: DiffusionModel, **changes: Any) -> Finetuner:
    return Finetuner(model, make_data(model), config(**changes), seed=2)


@pytest.mark.parametrize("way", WAYS)
def test_resumed_is_uninterrupted(tiny_model: DiffusionModel, tmp_path: Path, way: str) -> None:
    through = tuner(tiny_model, **WAYS[way])
    losses = [through.step()["loss"] for _ in range(5)]
    first = tuner(tiny_model, **WAYS[way])
    for _ in range(3):
        first.step()
    first.save(tmp_path / "checkpoint")
    torch.manual_seed(99)  # nothing is drawn from the global generator
    second = tuner(tiny_model, **WAYS[way])
    second.load(tmp_path / "checkpoint")
    assert second.step_index == 3
    assert [second.step()["loss"] for _ in range(2)] == losses[3:]
    for resumed, uninterrupted in zip(state(second), state(through), strict=True):
        assert torch.equal(resumed, uninterrupted)


def test_a_network_with_dropout_resumes_too(tmp_path: Path) -> None:
    directory = tiny_diffusion_directory(tmp_path, unet_options={"dropout": 0.5})
    model = load_diffusion_model(directory)
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.5 for m in model.unet.modules())
    through = tuner(model)
    for _ in range(3):
        through.step()
    first = tuner(model)
    first.step()
    first.save(tmp_path / "checkpoint")
    second = tuner(model)
    second.load(tmp_path / "checkpoint")
    for _ in range(2):
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(state(second), state(through), strict=True))


def test_a_snapshot_is_of_its_moment(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    going = tuner(tiny_model)
    going.step()
    expected = going.save(tmp_path / "then")
    taken = going.snapshot()
    assert taken is not None
    going.step()
    assert taken.write(tmp_path / "later").digest == expected.digest
    assert going.save(tmp_path / "now").digest != expected.digest
    assert verify(tmp_path / "later").config["step"] == 1


def test_where_and_in_how_many_parts_it_is_computed_may_change(
    tiny_model: DiffusionModel, tmp_path: Path
) -> None:
    first = tuner(tiny_model)
    first.step()
    first.save(tmp_path / "checkpoint")
    first.step()
    thrifty = tuner(tiny_model, gradient_accumulation=4, gradient_checkpointing=True, channels_last=True)
    thrifty.load(tmp_path / "checkpoint")
    thrifty.step()
    for a, b in zip(first.parameters, thrifty.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_another_adapter_is_refused(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    tuner(tiny_model, **LORA).save(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match=r"lora \(.*'rank': 4.* -> .*'rank': 8"):
        tuner(tiny_model, parameters="lora", lora={"rank": 8}).load(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match=r"parameters \(lora -> full\)"):
        tuner(tiny_model).load(tmp_path / "checkpoint")


def test_a_checkpoint_from_before_a_setting_was_known_goes_on(
    tiny_model: DiffusionModel, tmp_path: Path
) -> None:
    first = tuner(tiny_model)
    first.step()
    first.save(tmp_path / "checkpoint")
    manifest = tmp_path / "checkpoint" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["config"]["parameters"], content["config"]["lora"]
    manifest.write_text(json.dumps(content))
    second = tuner(tiny_model)
    second.load(tmp_path / "checkpoint")
    assert torch.equal(first.step()["loss"], second.step()["loss"])
    with pytest.raises(ConfigError, match=r"parameters \(full -> lora\)"):
        tuner(tiny_model, **LORA).load(tmp_path / "checkpoint")


def test_what_is_handed_on_is_the_average(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    for decay in (0.9, 0.0):
        trained = tuner(tiny_model, ema_decay=decay)
        for _ in range(2):
            trained.step()
        trained.save(tmp_path / "checkpoint")
        model = load_diffusion_model(tiny_model.directory)
        put_trained(model.unet, tmp_path / "checkpoint", model.digest, trained.config)
        expected = trained.averaged_unet().state_dict()
        assert all(torch.equal(expected[name], t) for name, t in model.unet.state_dict().items())
        with pytest.raises(ConfigError, match=r"model \("):
            put_trained(model.unet, tmp_path / "checkpoint", "another", trained.config)


def test_a_checkpoint_of_another_network_is_refused(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    small = tuner(tiny_model, **LORA)
    small.save(tmp_path / "checkpoint")
    other = load_diffusion_model(tiny_diffusion_directory(tmp_path, channels=(16, 16)))
    wrong = tuner(other, **LORA)
    wrong.identity = small.identity
    with pytest.raises(ArtifactError, match="does not fit this UNet"):
        wrong.load(tmp_path / "checkpoint")
