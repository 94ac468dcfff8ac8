import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from accord.artifacts import verify
from accord.diffusion.model import DiffusionModel, load_diffusion_model, save_diffusion_model
from accord.diffusion.sample import SamplerConfig, initial_noise, sample_images
from accord.errors import ArtifactError
from tests.tiny import tiny_diffusion_directory

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(tiny_directory: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_directory, tmp_path / "copy")
    return tmp_path / "copy"


def test_load(tiny_model: DiffusionModel) -> None:
    assert tiny_model.prediction_type == "epsilon"
    assert tiny_model.latent_channels == 4
    assert tiny_model.vae_scale_factor == 8
    assert tiny_model.default_size == (64, 64)
    assert len(tiny_model.digest) == 64
    assert not any(p.requires_grad for p in tiny_model.unet.parameters())
    assert not tiny_model.unet.training


def test_zero_terminal_snr_schedule_is_exact(tiny_v_model: DiffusionModel) -> None:
    alphas = tiny_v_model.alphas_cumprod()
    assert tiny_v_model.prediction_type == "v_prediction"
    assert alphas.shape == (1000,)
    assert alphas[-1] == 0
    assert 0.99 < alphas[0] < 1


def test_saved_model_loads_in_the_unmodified_pipeline(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    save_diffusion_model(tiny_model, tmp_path / "saved", inputs={"base": "abc"}, config={"a": 1}, seed=3)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "red star",
        num_inference_steps=3,
        guidance_scale=2.0,
        latents=initial_noise([5], (4, 8, 8)),
        output_type="np",
    ).images
    ours = sample_images(
        tiny_model, ["red star"], [5], SamplerConfig(scheduler="DDIMScheduler", steps=3, guidance_scale=2.0)
    )
    assert np.abs((theirs * 255).round() - ours).max() <= 1


def test_manifest_and_digest_tell_the_content_only(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    first = save_diffusion_model(tiny_model, tmp_path / "a", inputs={"base": "x"}, config={}, seed=0)
    loaded = load_diffusion_model(tmp_path / "a")
    second = save_diffusion_model(loaded, tmp_path / "elsewhere" / "b", inputs={}, config={"k": 1}, seed=9)
    assert first.digest == second.digest == loaded.digest
    assert first.inputs == {"base": "x"}
    assert verify(tmp_path / "a", "diffusion_model") == first
    (tmp_path / "a" / "manifest.json").unlink()
    assert load_diffusion_model(tmp_path / "a").digest == first.digest, "made anew in the same way"
    for file in (tmp_path / "elsewhere" / "b").rglob("*.json"):
        assert str(tmp_path) not in file.read_text()


def test_stored_as_float16_loaded_as_float32(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    save_diffusion_model(tiny_model, tmp_path / "half", inputs={}, config={}, seed=0, dtype=torch.float16)
    stored = load_file(tmp_path / "half" / UNET_WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = load_diffusion_model(tmp_path / "half")
    for network in (loaded.unet, loaded.vae, loaded.text_encoder):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert tiny_model.dtype == torch.float32, "the model itself is left alone"
    torch.testing.assert_close(
        loaded.unet.conv_in.weight, tiny_model.unet.conv_in.weight, atol=1e-3, rtol=1e-3
    )


def test_a_changed_file_is_refused(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    save_diffusion_model(tiny_model, tmp_path / "m", inputs={}, config={}, seed=0)
    config = tmp_path / "m" / "unet" / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    with pytest.raises(ArtifactError, match=r"unet/config\.json was changed"):
        load_diffusion_model(tmp_path / "m")


def test_a_pickle_is_refused(copied: Path) -> None:
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ArtifactError, match=r"diffusion_pytorch_model\.bin.*pickle"):
        load_diffusion_model(copied)


def test_a_nan_is_refused(copied: Path) -> None:
    tensors = load_file(copied / UNET_WEIGHTS)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, copied / UNET_WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"conv_in\.weight.*NaN"):
        load_diffusion_model(copied)


def test_a_missing_tensor_is_refused_not_made_up(copied: Path) -> None:
    tensors = load_file(copied / UNET_WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, copied / UNET_WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"unet: 1 tensors are missing.*conv_in\.weight"):
        load_diffusion_model(copied)


def test_text_encoder_with_the_old_names_loads(copied: Path, tiny_model: DiffusionModel) -> None:
    """As the published Stable Diffusion 1.5 directories have them."""
    weights = copied / "text_encoder" / "model.safetensors"
    old = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in load_file(weights).items()
    }
    old["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(old, weights, metadata={"format": "pt"})
    loaded = load_diffusion_model(copied).text_encoder.state_dict()
    for name, tensor in tiny_model.text_encoder.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_a_truncated_file_is_refused(copied: Path) -> None:
    content = (copied / UNET_WEIGHTS).read_bytes()
    (copied / UNET_WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="diffusion_pytorch_model"):
        load_diffusion_model(copied)


def test_other_directories_are_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no model_index\.json"):
        load_diffusion_model(tmp_path / "nowhere")
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ArtifactError, match=r"expected a StableDiffusionPipeline.*FluxPipeline"):
        load_diffusion_model(copied)
    (copied / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(copied / "vae")
    with pytest.raises(ArtifactError, match="could not be loaded"):
        load_diffusion_model(copied)


def test_a_weight_that_is_not_finite_is_not_saved(tiny_directory: Path, tmp_path: Path) -> None:
    model = load_diffusion_model(tiny_directory)
    model.unet.conv_in.weight[0, 0, 0, 0] = 1e6  # finite, but not as float16
    with pytest.raises(ArtifactError, match=r"unet: conv_in\.weight is not finite as torch\.float16"):
        save_diffusion_model(model, tmp_path / "m", inputs={}, config={}, seed=0, dtype=torch.float16)
    assert not (tmp_path / "m").exists()
    assert list(tmp_path.iterdir()) == []


def test_replace_makes_a_model_with_another_unet(tiny_model: DiffusionModel) -> None:
    assert replace(tiny_model, unet=None).vae is tiny_model.vae


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"time_cond_proj_dim": 16}, "missing|condition that no prompt gives"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 77}, "takes 24 tokens.*gives 77"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow' is none of"),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "to be a CLIPTextModel"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline"},
            "without text_encoder_2, tokenizer_2",
        ),
        ("unet/config.json", {"layers_per_block": 2}, "unet: .*tensors are missing|expected shape"),
        ("unet/config.json", {"block_out_channels": [16, 64]}, "expected shape"),
        ("vae/config.json", {"block_out_channels": [8, 8, 16, 32]}, "expected shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    copied: Path, file: str, changes: dict[str, object], message: str
) -> None:
    edit(copied / file, **changes)
    with pytest.raises(ArtifactError, match=message):
        load_diffusion_model(copied)


def test_a_superfluous_tensor_is_refused_not_left_out(copied: Path) -> None:
    tensors = load_file(copied / UNET_WEIGHTS)
    tensors["another.weight"] = torch.zeros(1)
    save_file(tensors, copied / UNET_WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"unet: 1 tensors have no place.*another\.weight"):
        load_diffusion_model(copied)


def test_all_that_does_not_fit_is_said_at_once(copied: Path, tmp_path: Path) -> None:
    """A UNet for inpainting, whose text states are of another width."""
    other = tiny_diffusion_directory(
        tmp_path / "other", text_width=48, unet_options={"attention_head_dim": 8}
    )
    shutil.rmtree(copied / "text_encoder")
    shutil.copytree(other / "text_encoder", copied / "text_encoder")
    with pytest.raises(ArtifactError, match=r"do not fit each other: text states are 48 wide.*attends to 32"):
        load_diffusion_model(copied)
