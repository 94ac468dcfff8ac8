"""A latent diffusion model as one object: any directory in the format of diffusers' StableDiffusionPipeline
or StableDiffusionXLPipeline."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from accord.artifacts import (
    Manifest,
    artifact_writer,
    check_model_directory,
    content_digest,
    read_manifest,
    sha256_file,
    verify,
)
from accord.diffusion.fit import check_index, check_parts
from accord.errors import ArtifactError

KIND = "diffusion_model"
VAE_PIXELS = 2**20
"""That the VAE works on at once: four images of 512 x 512. It holds three kilobytes for each, many times
what the UNet needs, and more images at once are no faster."""
ORIGIN_KEYS = frozenset({"_name_or_path", "name_or_path", "is_local", "local_files_only"})


@dataclass
class DiffusionModel:
    """The parts of a pipeline, frozen and in eval mode, and what identifies their content."""

    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL
    text_encoder: Any  # CLIPTextModel
    tokenizer: Any  # CLIPTokenizer
    scheduler: Any  # a diffusers scheduler; its config states the noise schedule and the prediction type
    directory: str
    digest: str
    text_encoder_2: Any = None  # CLIPTextModelWithProjection, of SDXL only
    tokenizer_2: Any = None
    zero_empty_prompt: bool = False
    """Whether guidance leads away from zeros, not from the encoded empty prompt, when no other is given."""

    @property
    def is_xl(self) -> bool:
        """Two text encoders, and the picture's size as a condition."""
        return self.text_encoder_2 is not None

    @property
    def networks(self) -> dict[str, Any]:
        """The parts that have weights, by their folder's name."""
        networks = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return networks | ({"text_encoder_2": self.text_encoder_2} if self.is_xl else {})

    @property
    def prediction_type(self) -> str:
        """epsilon, v_prediction or sample: what the UNet predicts."""
        return str(self.scheduler.config.get("prediction_type", "epsilon"))

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent cell is wide and high."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the UNet was trained at."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def device(self) -> torch.device:
        return next(iter(self.unet.parameters())).device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.unet.parameters())).dtype  # type: ignore[no-any-return]

    @property
    def vae_dtype(self) -> torch.dtype:
        """Not always that of the rest: see `to`."""
        return next(iter(self.vae.parameters())).dtype  # type: ignore[no-any-return]

    def latent_scaling(self) -> tuple[Tensor, Tensor]:
        """scale_C11 and shift_C11, float32 on the CPU: the UNet works on (latents - shift) * scale."""
        config = self.vae.config
        scale_C11 = torch.full((self.latent_channels, 1, 1), float(config.scaling_factor))
        shift_C11 = torch.full_like(scale_C11, float(config.get("shift_factor") or 0.0))
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if self.is_xl and mean is not None and deviation is not None:
            scale_C11 = scale_C11 / torch.tensor(deviation).view(-1, 1, 1)
            shift_C11 = torch.tensor(mean).view(-1, 1, 1)
        return scale_C11, shift_C11

    def alphas_cumprod(self) -> Tensor:
        """The training noise schedule alpha_bar, float32 [T] on the CPU.

        Made by DDPMScheduler from the model's scheduler config, since some samplers replace an exact 0 at the
        end (zero terminal signal-to-noise ratio) by a small number that training must not see.
        """
        scheduler_class: Any = DDPMScheduler
        alphas_cumprod_T: Tensor = scheduler_class.from_config(self.scheduler.config).alphas_cumprod
        return alphas_cumprod_T.float()

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> DiffusionModel:
        """Moves all networks in place; returns self.

        SDXL's VAE overflows in float16 and says so in its config (force_upcast): it is float32 then, as in
        its pipeline.
        """
        for name, network in self.networks.items():
            upcast = name == "vae" and self.is_xl and dtype == torch.float16 and network.config.force_upcast
            nn.Module.to(network, device=device, dtype=torch.float32 if upcast else dtype)
        return self


def vae_batch(wanted: int, height: int, width: int) -> int:
    """How many images of this size the VAE is given at once: at most `wanted`, at least one."""
    return max(1, min(wanted, VAE_PIXELS // (height * width)))


def load_diffusion_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusionModel:
    """Loads a pipeline's directory from the disk; never asks the network.

    Weights stored in any float type are loaded as `dtype`. The digest is that of manifest.json when there is
    one (checked against the files), else made of the files in the same way.

    Raises ArtifactError for a directory that is none, pickled weights, non-finite, missing or superfluous
    tensors, parts that do not fit each other, or a changed file.
    """
    directory = Path(path)
    index = read_model_index(directory)
    check_model_directory(directory)
    digest = _digest(directory)
    scheduler_class = getattr(diffusers, str(index["scheduler"][1]), None)
    if scheduler_class is None:
        raise ArtifactError(
            f"{directory}: diffusers has no scheduler {index['scheduler'][1]!r} (model_index.json)"
        )
    try:
        parts = _load_parts(directory, index, scheduler_class, dtype)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).partition("If you want to instead")[0]  # the library's advice is to make them up
        raise ArtifactError(
            f"{directory}: could not be loaded as a {index['_class_name']} with safetensors weights: {reason}"
        ) from error
    model = DiffusionModel(directory=str(directory), digest=digest, **parts)
    check_parts(model, directory)
    for network in model.networks.values():
        network.eval().requires_grad_(False)
    # The pipeline corrects outdated scheduler configs when it is made: so we sample as it does.
    model.scheduler = _pipeline(model, model.networks).scheduler
    return model.to(device, dtype)


def save_diffusion_model(
    model: DiffusionModel,
    directory: str | Path,
    *,
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
    seed: int,
    dtype: torch.dtype | None = None,
) -> Manifest:
    """Writes a whole pipeline directory with its manifest, all or nothing; unmodified diffusers loads it.

    `dtype` (say torch.float16, half the size) casts copies of the networks; the model itself is left alone.
    The same weights give the same digest, wherever they were loaded from.

    Raises ArtifactError for a non-finite weight (also one that `dtype` cannot hold), StorageError for a full
    disk.
    """
    pipeline = _pipeline(model, {name: _stored(part, name, dtype) for name, part in model.networks.items()})
    with artifact_writer(directory, KIND, inputs=inputs, config=config, seed=seed) as temporary:
        with _no_progress_bars():
            pipeline.save_pretrained(temporary, safe_serialization=True)
        for file in sorted(temporary.rglob("*.json")):
            _forget_origin(file)
    return read_manifest(directory)


def read_model_index(directory: Path) -> dict[str, Any]:
    """model_index.json: which pipeline the directory is of, and the class of each part.

    Raises ArtifactError for no such file, another kind of pipeline, or one that lacks a part.
    """
    file = directory / "model_index.json"
    if not file.is_file():
        raise ArtifactError(
            f"{directory}: no model_index.json, so this is no diffusers pipeline directory. Give the folder "
            "that holds model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/."
        )
    try:
        index = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{file}: not the index of a text-to-image pipeline: {error!r}") from error
    check_index(index, file)
    return index


def _load_parts(
    directory: Path, index: dict[str, Any], scheduler_class: Any, dtype: torch.dtype
) -> dict[str, Any]:
    """The fields of a DiffusionModel that are read from the directory."""
    is_xl = "text_encoder_2" in index
    with _no_progress_bars():
        parts = {
            "unet": _load_network(UNet2DConditionModel, directory / "unet", torch_dtype=dtype),
            "vae": _load_network(AutoencoderKL, directory / "vae", torch_dtype=dtype),
            "text_encoder": _load_network(CLIPTextModel, directory / "text_encoder", dtype=dtype),
        }
        if is_xl:
            parts["text_encoder_2"] = _load_network(
                CLIPTextModelWithProjection, directory / "text_encoder_2", dtype=dtype
            )
    for name in ("tokenizer", "tokenizer_2") if is_xl else ("tokenizer",):
        parts[name] = CLIPTokenizer.from_pretrained(directory / name, local_files_only=True)
    parts["scheduler"] = scheduler_class.from_pretrained(directory / "scheduler", local_files_only=True)
    return parts | {"zero_empty_prompt": is_xl and bool(index.get("force_zeros_for_empty_prompt", True))}


def _pipeline(model: DiffusionModel, networks: Mapping[str, Any]) -> Any:
    """diffusers' own pipeline of these networks, with the model's other parts."""
    pipeline_class: Any
    if model.is_xl:
        pipeline_class = StableDiffusionXLPipeline
        return pipeline_class(
            **networks,
            tokenizer=model.tokenizer,
            tokenizer_2=model.tokenizer_2,
            scheduler=model.scheduler,
            force_zeros_for_empty_prompt=model.zero_empty_prompt,
            add_watermarker=False,
        )
    pipeline_class = StableDiffusionPipeline
    return pipeline_class(
        **networks,
        tokenizer=model.tokenizer,
        scheduler=model.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading a model draws a bar for each part of it, over the progress of whoever loads it."""
    settings: Any = transformers_logging
    shown = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            settings.enable_progress_bar()


def _digest(directory: Path) -> str:
    """As of the manifest: of the content only, and the same whether a manifest is there or not."""
    if (directory / "manifest.json").is_file():
        return verify(directory, KIND).digest
    files = {
        relative.as_posix(): sha256_file(directory / relative)
        for relative in sorted(file.relative_to(directory) for file in directory.rglob("*") if file.is_file())
        if not any(part.startswith(".") for part in relative.parts)
    }
    return content_digest(KIND, files)


def _load_network(network_class: Any, directory: Path, **dtype: torch.dtype) -> Any:
    """from_pretrained, but a tensor that is missing, of another shape or unknown is an error: the library
    would make up the first, and leave out the last."""
    network, info = network_class.from_pretrained(
        directory, use_safetensors=True, local_files_only=True, output_loading_info=True, **dtype
    )
    missing = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if missing:
        raise ArtifactError(
            f"{directory}: {len(missing)} tensors are missing or do not fit config.json: {_some(missing)}"
        )
    # Old files list the numbers 0, 1, 2 ... beside the weights.
    unknown = sorted(key for key in map(str, info["unexpected_keys"]) if not key.endswith("position_ids"))
    if unknown:
        raise ArtifactError(
            f"{directory}: {len(unknown)} tensors have no place in the network that config.json describes: "
            f"{_some(unknown)}. Is it the config of other weights?"
        )
    return network


def _some(names: list[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def _stored(network: nn.Module, name: str, dtype: torch.dtype | None) -> nn.Module:
    if dtype is not None:
        network = nn.Module.to(copy.deepcopy(network), dtype)  # diffusers' own `to` warns needlessly
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(
                f"{name}: {key} is not finite" + (f" as {dtype}" if dtype else "") + "; nothing was written"
            )
    return network


def _forget_origin(file: Path) -> None:
    """Drops how and from where a part was once loaded: it is no content, and would change the digest."""
    content = json.loads(file.read_text())
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if key not in ORIGIN_KEYS}
        if kept != content:
            file.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
