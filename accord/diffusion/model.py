"""A latent diffusion model as one object: any directory in diffusers' StableDiffusionPipeline format."""

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
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
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
from accord.errors import ArtifactError

KIND = "diffusion_model"
ORIGIN_KEYS = frozenset({"_name_or_path", "name_or_path", "is_local", "local_files_only"})
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass
class DiffusionModel:
    """The parts of a StableDiffusionPipeline, frozen and in eval mode, and what identifies their content."""

    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL
    text_encoder: Any  # CLIPTextModel
    tokenizer: Any  # CLIPTokenizer
    scheduler: Any  # a diffusers scheduler; its config states the noise schedule and the prediction type
    directory: str
    digest: str

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

    def alphas_cumprod(self) -> Tensor:
        """The training noise schedule alpha_bar, float32 [T] on the CPU.

        Made by DDPMScheduler from the model's scheduler config, since some samplers replace an exact 0 at the
        end (zero terminal signal-to-noise ratio) by a small number that training must not see.
        """
        scheduler_class: Any = DDPMScheduler
        alphas_cumprod_T: Tensor = scheduler_class.from_config(self.scheduler.config).alphas_cumprod
        return alphas_cumprod_T.float()

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> DiffusionModel:
        """Moves all networks in place; returns self."""
        for network in (self.unet, self.vae, self.text_encoder):
            nn.Module.to(network, device=device, dtype=dtype)
        return self


def load_diffusion_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusionModel:
    """Loads a StableDiffusionPipeline directory from the disk; never asks the network.

    Weights stored in any float type are loaded as `dtype`. The digest is that of manifest.json when there is
    one (checked against the files), else made of the files in the same way.

    Raises ArtifactError for a directory that is none, pickled weights, non-finite or missing tensors, or a
    changed file.
    """
    directory = Path(path)
    index = _model_index(directory)
    check_model_directory(directory)
    digest = _digest(directory)
    scheduler_class = getattr(diffusers, str(index["scheduler"][1]), None)
    if scheduler_class is None:
        raise ArtifactError(
            f"{directory}: diffusers has no scheduler {index['scheduler'][1]!r} (model_index.json)"
        )
    try:
        with _no_progress_bars():
            unet = _load_network(UNet2DConditionModel, directory / "unet", torch_dtype=dtype)
            vae = _load_network(AutoencoderKL, directory / "vae", torch_dtype=dtype)
            text_encoder = _load_network(CLIPTextModel, directory / "text_encoder", dtype=dtype)
        tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer", local_files_only=True)
        scheduler = scheduler_class.from_pretrained(directory / "scheduler", local_files_only=True)
        # The pipeline corrects outdated scheduler configs when it is made: so we sample as it does.
        scheduler = _pipeline(unet, vae, text_encoder, tokenizer, scheduler).scheduler
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ArtifactError(
            f"{directory}: could not be loaded as a StableDiffusionPipeline with safetensors weights: {error}"
        ) from error
    model = DiffusionModel(unet, vae, text_encoder, tokenizer, scheduler, str(directory), digest)
    for network in (unet, vae, text_encoder):
        network.eval().requires_grad_(False)
    return model.to(device)


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
    pipeline = _pipeline(
        _stored(model.unet, "unet", dtype),
        _stored(model.vae, "vae", dtype),
        _stored(model.text_encoder, "text_encoder", dtype),
        model.tokenizer,
        model.scheduler,
    )
    with artifact_writer(directory, KIND, inputs=inputs, config=config, seed=seed) as temporary:
        with _no_progress_bars():
            pipeline.save_pretrained(temporary, safe_serialization=True)
        for file in sorted(temporary.rglob("*.json")):
            _forget_origin(file)
    return read_manifest(directory)


def _pipeline(unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, scheduler: Any) -> Any:
    pipeline_class: Any = StableDiffusionPipeline
    return pipeline_class(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
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


def _model_index(directory: Path) -> dict[str, Any]:
    file = directory / "model_index.json"
    if not file.is_file():
        raise ArtifactError(
            f"{directory}: no model_index.json, so this is no diffusers pipeline directory. Give the folder "
            "that holds model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/."
        )
    try:
        index = json.loads(file.read_text())
        missing = [name for name in COMPONENTS if len(index[name]) != 2 or None in index[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file}: not the index of a text-to-image pipeline: {error!r}") from error
    if missing or index.get("_class_name") != "StableDiffusionPipeline":
        raise ArtifactError(
            f"{file}: expected a StableDiffusionPipeline with {', '.join(COMPONENTS)}; found "
            f"{index.get('_class_name')!r}" + (f" without {', '.join(missing)}" if missing else "")
        )
    return dict(index)


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
    """from_pretrained, but a tensor that is missing or of another shape is an error, not a random start."""
    network, info = network_class.from_pretrained(
        directory, use_safetensors=True, local_files_only=True, output_loading_info=True, **dtype
    )
    missing = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if missing:
        raise ArtifactError(
            f"{directory}: {len(missing)} tensors are missing or do not fit config.json: "
            + ", ".join([*missing[:3], *(["..."] if len(missing) > 3 else [])])
        )
    return network


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
