"""Measures a snapshot of a model: images of fixed prompts from fixed noise, and what the networks predict.

Shapes: B images (all of a prompt follow one another), C channels, H W height and width.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from accord.diffusion.conditioning import encode_conditioning, unet_arguments
from accord.diffusion.model import DiffusionModel
from accord.diffusion.objectives import add_noise
from accord.diffusion.sample import SamplerConfig, autocast, decode_latents, initial_noise, sample_latents
from accord.errors import ArtifactError, ConfigError
from accord.guards import measures
from accord.guards.measures import Judge
from accord.guards.rule import HELD_OUT, REWARD, Measured
from accord.images import Pixels


class Probe:
    """Measures snapshots of one training, always on the same prompts and seeds.

    The distance to the reference model is taken on the reference's own images of these prompts, with noise of
    levels spread over the whole schedule: so it is 0 for the reference, and the same for the same weights.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompts: Sequence[str],
        images_per_prompt: int,
        sampler: SamplerConfig,
        seed: int,
        *,
        reward: Judge,
        held_out: Judge,
        features: Judge,
        further: Mapping[str, Judge] | None = None,
        batch_size: int = 32,
    ) -> None:
        """`model` is the reference, before fine-tuning. `features` gives a row of numbers an image, in which
        diversity is measured; `further` are measures of the user's."""
        self.reference, self.sampler, self.images_per_prompt = model, sampler, images_per_prompt
        self.prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        numbers = list(range(images_per_prompt)) * len(prompts)
        self.seeds = [_seed(seed, *pair) for pair in zip(self.prompts, numbers, strict=True)]
        self.features, self.batch_size = features, batch_size
        self.judges: dict[str, Judge] = {REWARD: reward, HELD_OUT: held_out, **(further or {})}
        self.candidate = replace(model, unet=copy.deepcopy(model.unet))
        self._reference_latents_BCHW: Tensor | None = None
        self._reference_prediction_BCHW = torch.zeros(0)

    def measure(self, step: int, weights: Mapping[str, Tensor] | None = None) -> tuple[Measured, Pixels]:
        """The measures of the reference with these UNet weights (of itself without), and the images.

        Raises ArtifactError when the weights are not of this UNet.
        """
        model = self.reference
        if weights is not None:
            model = self.candidate
            try:
                model.unet.load_state_dict(dict(weights))
            except RuntimeError as error:
                raise ArtifactError(f"a snapshot does not fit the UNet that is guarded: {error}") from None
        latents_BCHW = self._latents(model)
        images_BHWC: Pixels = decode_latents(model, latents_BCHW, self.batch_size)
        values: dict[str, Any] = {
            name: self._judged(name, judge, images_BHWC) for name, judge in self.judges.items()
        }
        values["saturation"] = measures.saturation(images_BHWC)
        values["edge_density"] = measures.edge_density(images_BHWC)
        values["diversity"] = measures.diversity(self.features(images_BHWC, self.prompts), self.prompts)
        values["reference_distance"] = self._distance(model, latents_BCHW if weights is None else None)
        by_prompt = {
            name: tuple(measures.by_prompt(found, self.images_per_prompt).tolist())
            for name, found in values.items()
        }
        return Measured(step, by_prompt), images_BHWC

    def _latents(self, model: DiffusionModel) -> Tensor:
        return torch.cat(
            [
                sample_latents(model, self.prompts[part], self.seeds[part], self.sampler)
                for part in self._parts()
            ]
        )

    def _judged(self, name: str, judge: Judge, images_BHWC: Pixels) -> ArrayLike:
        found: Any = judge(images_BHWC, self.prompts)
        if isinstance(found, Tensor):
            found = found.detach().cpu().numpy()
        values_B = np.asarray(found, dtype=np.float64)
        if values_B.shape != (len(self.prompts),):
            raise ConfigError(
                f"guards: {name} gave an array of shape {values_B.shape} for {len(self.prompts)} images; "
                "expected one number an image"
            )
        return values_B

    def _distance(self, model: DiffusionModel, reference_latents_BCHW: Tensor | None) -> Tensor:
        if self._reference_latents_BCHW is None:
            if reference_latents_BCHW is None:
                reference_latents_BCHW = self._latents(self.reference)
            self._reference_latents_BCHW = reference_latents_BCHW
            self._reference_prediction_BCHW = self._predictions(self.reference)
        return measures.prediction_distance(self._predictions(model), self._reference_prediction_BCHW)

    @torch.no_grad()
    def _predictions(self, model: DiffusionModel) -> Tensor:
        """What the UNet predicts of the reference's latents at fixed noise and noise levels."""
        latents_BCHW = self._reference_latents_BCHW
        assert latents_BCHW is not None
        device, count = model.device, len(self.prompts)
        alphas_T = model.alphas_cumprod().to(device)
        levels = len(alphas_T)
        # Each image of a prompt gets another level, and the levels of all together cover the schedule.
        timesteps_B = ((torch.arange(count) * 0.6180339887 + 0.5) % 1.0 * levels).long().to(device)
        noise_BCHW = initial_noise([seed ^ 1 for seed in self.seeds], tuple(latents_BCHW.shape[1:]))  # type: ignore[arg-type]
        noisy_BCHW = add_noise(latents_BCHW, noise_BCHW.to(device), timesteps_B, alphas_T)
        texts = encode_conditioning(model, self.prompts)
        found = []
        for part in self._parts():
            noisy = noisy_BCHW[part].to(model.dtype)
            own = {name: rows[part].to(model.dtype) for name, rows in texts.items()}
            arguments = unet_arguments(own, noisy, model.vae_scale_factor)
            with autocast(device, self.sampler.precision):
                output = model.unet(noisy, timesteps_B[part], **arguments)
            found.append(output.sample.float())
        return torch.cat(found)

    def _parts(self) -> Iterable[slice]:
        for start in range(0, len(self.prompts), self.batch_size):
            yield slice(start, start + self.batch_size)


def _seed(seed: int, prompt: str, number: int) -> int:
    """In [0, 2^31); no image of `collect` has it but by chance."""
    digest = hashlib.sha256(f"guards {seed} {prompt} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
