import logging

import numpy as np
import pytest
import torch

from accord.diffusion.encode import encode_images, encode_prompts
from accord.diffusion.model import DiffusionModel
from accord.errors import ImageError


def make_images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def test_prompts_come_back_in_order_whatever_the_batches(tiny_model: DiffusionModel) -> None:
    prompts = ["red star", "two circles", "red star", "blue heart on grass"]
    text_KTD = encode_prompts(tiny_model, prompts, batch_size=2)
    assert text_KTD.shape == (4, 24, 32)
    assert torch.equal(text_KTD[0], text_KTD[2])
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(text_KTD[row], encode_prompts(tiny_model, [prompt])[0])
    assert not torch.allclose(text_KTD[0], text_KTD[1], atol=1e-3)


def test_prompt_states_are_the_pipelines(tiny_model: DiffusionModel) -> None:
    tokens = tiny_model.tokenizer("red star", padding="max_length", max_length=24, return_tensors="pt")
    expected = tiny_model.text_encoder(tokens.input_ids).last_hidden_state
    torch.testing.assert_close(encode_prompts(tiny_model, ["red star"]), expected)


def test_long_prompt_is_cut_with_a_warning(
    tiny_model: DiffusionModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        text = encode_prompts(tiny_model, ["red " * 30])
    assert text.shape == (1, 24, 32)
    assert "cut at 24 of its 32 tokens" in caplog.text


def test_latents_are_the_scaled_posterior_mean(tiny_model: DiffusionModel) -> None:
    images = make_images()
    latents = encode_images(tiny_model, images, batch_size=2)
    assert latents.shape == (5, 4, 8, 8)
    assert torch.equal(latents, encode_images(tiny_model, images, batch_size=2)), "nothing is drawn"
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        mean = tiny_model.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents, mean * tiny_model.vae.config.scaling_factor, atol=1e-5, rtol=1e-4)


def test_what_was_encoded_can_be_learnt_from(tiny_model: DiffusionModel) -> None:
    weight = torch.ones(32, requires_grad=True)
    (encode_prompts(tiny_model, ["star"]) * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None


def test_no_images_no_latents(tiny_model: DiffusionModel) -> None:
    assert encode_images(tiny_model, make_images(0)).shape == (0, 4, 8, 8)


@pytest.mark.parametrize(
    "bad",
    [make_images(1).astype(np.float32), make_images(1)[..., :1], make_images(1)[:, :60], make_images(1)[0]],
)
def test_other_arrays_are_refused(tiny_model: DiffusionModel, bad: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"expected uint8 images \[B, H, W, 3\].*got"):
        encode_images(tiny_model, bad)
