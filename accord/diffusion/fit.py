"""Whether the parts of a model fit each other: said when it is loaded, and not by the first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accord.errors import ArtifactError

if TYPE_CHECKING:
    from accord.diffusion.model import DiffusionModel

_SD = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "scheduler": "",  # any
}
_XL = {**_SD, "text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
PIPELINES = {"StableDiffusionPipeline": _SD, "StableDiffusionXLPipeline": _XL}
"""The class of each part, by the class of the pipeline."""
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Sizes of the picture that SDXL is told: original, crop, target.
_XL_SIZES = 6


def check_index(index: Mapping[str, Any], file: Path) -> None:
    """Raises ArtifactError unless model_index.json names a pipeline that we know, with all of its parts."""
    pipeline = index.get("_class_name")
    expected = PIPELINES.get(str(pipeline))
    if expected is None:
        raise ArtifactError(f"{file}: expected a {' or a '.join(PIPELINES)}; found {pipeline!r}")
    named = {name: index.get(name) for name in expected}
    missing = [
        name
        for name, entry in named.items()
        if not isinstance(entry, list) or len(entry) != 2 or None in entry
    ]
    if missing:
        raise ArtifactError(
            f"{file}: expected a {pipeline} with {', '.join(expected)}; found one without "
            f"{', '.join(missing)}"
        )
    for name, class_name in expected.items():
        found = str(index[name][1])
        if class_name and found.removesuffix("Fast") != class_name:
            raise ArtifactError(f"{file}: expected {name} to be a {class_name}, found {found}")


def check_parts(model: DiffusionModel, directory: Path) -> None:
    """Raises ArtifactError with everything that does not fit."""
    problems = [*_unet_problems(model), *_text_problems(model)]
    if problems:
        raise ArtifactError(f"{directory}: its parts do not fit each other: " + "; ".join(problems))


def _unet_problems(model: DiffusionModel) -> Iterator[str]:
    unet, latents = model.unet.config, model.vae.config.latent_channels
    if not unet.in_channels == unet.out_channels == latents:
        yield (
            f"the VAE has {latents} latent channels, but the UNet takes {unet.in_channels} and gives "
            f"{unet.out_channels} (those of inpainting, editing or upscaling are not supported)"
        )
    width = model.text_encoder.config.hidden_size
    if model.is_xl:
        width += model.text_encoder_2.config.hidden_size
    if isinstance(unet.cross_attention_dim, int) and unet.cross_attention_dim != width:
        yield f"text states are {width} wide, but the UNet attends to {unet.cross_attention_dim}"
    wanted = "text_time" if model.is_xl else None
    if unet.addition_embed_type != wanted:
        yield f"the UNet's addition_embed_type is {unet.addition_embed_type!r}; expected {wanted!r}"
    elif model.is_xl:
        pooled = model.text_encoder_2.config.projection_dim
        expected = _XL_SIZES * unet.addition_time_embed_dim + pooled
        if unet.projection_class_embeddings_input_dim != expected:
            yield (
                f"the UNet's added conditions are {unet.projection_class_embeddings_input_dim} wide, but "
                f"sizes and pooled text make {expected} (a refiner is not supported)"
            )
    for key in ("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type"):
        if unet.get(key) is not None:
            yield f"the UNet wants a condition that no prompt gives ({key}={unet[key]!r})"
    if model.prediction_type not in PREDICTIONS:
        yield f"prediction_type {model.prediction_type!r} is none of {', '.join(PREDICTIONS)}"


def _text_problems(model: DiffusionModel) -> Iterator[str]:
    pairs = {"text_encoder": (model.tokenizer, model.text_encoder)}
    if model.is_xl:
        pairs["text_encoder_2"] = (model.tokenizer_2, model.text_encoder_2)
    for name, (tokenizer, encoder) in pairs.items():
        config = encoder.config
        if tokenizer.model_max_length > config.max_position_embeddings:
            yield (
                f"{name} takes {config.max_position_embeddings} tokens, but its tokenizer gives "
                f"{tokenizer.model_max_length}"
            )
        if len(tokenizer) > config.vocab_size:
            yield f"{name} knows {config.vocab_size} words, but its tokenizer {len(tokenizer)}"
