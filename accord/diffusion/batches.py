"""The batches of fine-tuning: which images, how much each counts, at which noise level, with which noise.

Two rules make any number of workers compute the same, and a resumed run the same as an uninterrupted one:
 - the batch of step s (images, noise, timesteps, dropped prompts) is drawn WHOLE by generators
   seeded with (seed, s), and each worker takes every world_size-th sample (or pair) of it: no data cursor
   to save;
 - losses are divided by the size of the whole batch: so the workers' losses add up (see objectives.py).

Shapes: N generated images, Q pairs of them, M pre-training images, B samples of one worker's part of a
batch, C latent channels, H W latent height and width, K prompts, T text tokens (of alphas_cumprod_T: noise
levels), D text width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accord.diffusion.finetune_data import FinetuneData, check_data, check_preferences
from accord.diffusion.model import DiffusionModel
from accord.diffusion.objectives import add_noise, denoising_target, prompt_advantages, reward_weights
from accord.diffusion.rows import MappedRows
from accord.diffusion.settings import FinetuneConfig
from accord.errors import FeedbackError
from accord.training import generator_for

NEAR_BYTES = 2**30
"""Of encoded prompts that are kept on the device: thousands of them."""


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step's batch: generated images first, then pre-training images. Of pairs, the
    chosen image comes before the rejected one."""

    noisy_BCHW: Tensor
    target_BCHW: Tensor
    timesteps_B: Tensor
    conditioning: dict[str, Tensor]
    """By name; see conditioning.py."""
    weight_B: Tensor  # weight, advantage or label of generated images, 0 for pre-training images
    num_model: int  # generated images, which come first

    @property
    def text_BTD(self) -> Tensor:  # noqa: N802 - named as tensors are
        return self.conditioning["states"]

    def inputs(self, rows: slice) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What a network predicts the targets of these rows from: noisy_BCHW, timesteps_B, conditioning."""
        conditioning = {name: tensor[rows] for name, tensor in self.conditioning.items()}
        return self.noisy_BCHW[rows], self.timesteps_B[rows], conditioning


class Batches:
    """Draws worker `rank`'s part of any step's batch; holds nothing that changes from step to step.

    `num_model` and `num_pretraining` are the images of the whole batch, and `per_unit` generated images are
    drawn together: two of a pair, else one. Raises FeedbackError when there is nothing to learn from,
    ConfigError for data or workers that do not fit.
    """

    def __init__(
        self,
        model: DiffusionModel,
        data: FinetuneData,
        config: FinetuneConfig,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.data, self.seed = config, data, seed
        self.rank, self.world_size = rank, world_size
        self.device = model.device
        self.num_model = 0 if config.objective == "pretraining_only" else config.batch_size
        self.num_pretraining = config.pretraining_batch_size if config.beta > 0 else 0
        self.per_unit = 2 if config.objective == "diffusion_dpo" else 1
        check_data(model, data, self.num_model // self.per_unit, self.num_pretraining, world_size)
        check_preferences(data, config.objective)
        self.prediction_type = model.prediction_type
        self.alphas_cumprod_T = model.alphas_cumprod().to(self.device)
        self.conditioning = _near(data.conditioning(), self.device)
        self.empty = {name: t.to(self.device, torch.float32) for name, t in data.empty().items()}
        self._weigh_images()
        self.pretraining_indices = _pretraining_indices(data, config)

    @property
    def are_shared_evenly(self) -> bool:
        """Whether every worker has as many images in every step, of a pair both."""
        numbers = self.num_model // self.per_unit, self.num_pretraining
        return all(n % self.world_size == 0 for n in (numbers if self.per_unit > 1 else (sum(numbers),)))

    def draw(self, step: int) -> Batch:
        """This worker's part of the batch of `step`.

        Numbers are drawn on the CPU, so that they are the same on any device; noise is drawn by unit (an
        image, or a pair that shares timestep and noise), so that a worker draws none of the others'.
        """
        config, data = self.config, self.data
        num_units = self.num_model // self.per_unit
        total = num_units + self.num_pretraining
        generator = generator_for(self.seed, step)
        model_index_UP = self._choose_images(num_units, generator)
        pretraining_index = self.pretraining_indices[
            _choose(len(self.pretraining_indices), self.num_pretraining, generator)
        ]
        levels = len(self.alphas_cumprod_T)
        uniform = torch.rand(total, generator=generator, dtype=torch.float64)
        timesteps = (levels * uniform ** (1.0 / config.timestep_power)).long().clamp(max=levels - 1)
        dropout = torch.full((total,), config.condition_dropout)
        if config.pretraining_condition_dropout is not None:
            dropout[num_units:] = config.pretraining_condition_dropout
        dropped = torch.rand(total, generator=generator) < dropout

        positions = range(self.rank, total, self.world_size)
        mine = torch.tensor(positions)
        is_model = mine < num_units
        model_index = model_index_UP[mine[is_model]].flatten()
        pretraining_index = pretraining_index[mine[~is_model] - num_units]
        # Which unit of mine each image is of: a pair's two are neighbours, and share all that is drawn.
        unit_B = torch.arange(len(mine)).repeat_interleave(torch.where(is_model, self.per_unit, 1))
        latents_BCHW = torch.cat(
            [
                self._take(data.latents_NCHW, model_index),
                self._take(data.pretraining_latents_MCHW, pretraining_index),
            ]
        ).float()
        text_index_B = torch.cat(
            [
                self._take(data.text_index_N, model_index),
                self._take(data.pretraining_text_index_M, pretraining_index),
            ]
        )
        shape = latents_BCHW.shape[1:]
        noise_BCHW = self._put(
            torch.stack([torch.randn(shape, generator=generator_for(self.seed, step, i)) for i in positions])[
                unit_B
            ]
        )
        timesteps_B, dropped_B = self._put(timesteps[mine][unit_B]), self._put(dropped[mine][unit_B])
        alphas = self.alphas_cumprod_T
        return Batch(
            noisy_BCHW=add_noise(latents_BCHW, noise_BCHW, timesteps_B, alphas),
            target_BCHW=denoising_target(latents_BCHW, noise_BCHW, timesteps_B, alphas, self.prediction_type),
            timesteps_B=timesteps_B,
            conditioning=self._texts(text_index_B, dropped_B),
            weight_B=self._put(torch.cat([self.weight_N[model_index], torch.zeros(len(pretraining_index))])),
            num_model=len(model_index),
        )

    def _choose_images(self, count: int, generator: torch.Generator) -> Tensor:
        """Places of the generated images of a step, index_UP: U units (`count`) of P images each."""
        config = self.config
        if config.objective == "diffusion_dpo":
            pairs: Tensor = self.data.pair_Q2.cpu()
            return pairs[_choose(len(pairs), count, generator)]
        if config.objective == "diffusion_kto":
            is_good = torch.rand(count, generator=generator) < config.kto_good_share
            good, bad = self.good_indices, self.bad_indices
            chosen = good[_choose(len(good), count, generator)], bad[_choose(len(bad), count, generator)]
            return torch.where(is_good, *chosen)[:, None]
        return self.kept_indices[_choose(len(self.kept_indices), count, generator)][:, None]

    def _weigh_images(self) -> None:
        """Weights, advantages or labels over the whole data set; what `threshold` leaves out is not drawn."""
        self.kept_indices = torch.arange(len(self.data.reward_N))
        self.weight_N = torch.zeros(0)
        if not self.num_model:
            return
        config, reward_N, prompt_N = self.config, self.data.reward_N.cpu(), self.data.text_index_N.cpu()
        if config.objective == "diffusion_dpo":
            self.weight_N = torch.ones(len(reward_N))
        elif config.objective == "diffusion_kto":
            label_N = self.data.label_N.cpu().float()
            self.weight_N = label_N * torch.where(label_N > 0, config.kto_good_weight, config.kto_bad_weight)
            self.good_indices = torch.nonzero(label_N > 0).flatten()
            self.bad_indices = torch.nonzero(label_N < 0).flatten()
        elif config.objective == "reward_weighted_likelihood":
            self.weight_N = reward_weights(
                reward_N,
                prompt_N,
                config.weighting,
                threshold=config.threshold,
                temperature=config.temperature,
                per_prompt=config.per_prompt,
            )
            if config.weighting == "threshold":
                self.kept_indices = torch.nonzero(self.weight_N > 0).flatten()
        else:
            self.weight_N = prompt_advantages(reward_N, prompt_N, config.advantage_clip)

    def _texts(self, text_index_B: Tensor, dropped_B: Tensor) -> dict[str, Tensor]:
        """What the prompts mean, or no prompt where it is dropped."""
        texts = {}
        for name, rows in self.conditioning.items():
            chosen = self._take(rows, text_index_B).float()
            texts[name] = torch.where(dropped_B.view(-1, *[1] * (chosen.ndim - 1)), self.empty[name], chosen)
        return texts

    def _take(self, tensor: Tensor | MappedRows, index: Tensor) -> Tensor:
        return self._put(tensor[index.to(tensor.device, non_blocking=True)])

    def _put(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()  # a copy from other memory may wait for the device
        return tensor.to(self.device, non_blocking=True)


def _near(
    conditioning: dict[str, Tensor | MappedRows], device: torch.device
) -> dict[str, Tensor | MappedRows]:
    """On the device when they are small enough to lie there for good; else a step's are sent to it."""
    if sum(tensor.nbytes for tensor in conditioning.values()) > NEAR_BYTES:
        return conditioning
    return {
        name: rows if isinstance(rows, MappedRows) else rows.to(device, torch.float32)
        for name, rows in conditioning.items()
    }


def _choose(population: int, count: int, generator: torch.Generator) -> Tensor:
    if count == 0:
        return torch.zeros(0, dtype=torch.long)
    return torch.randint(population, (count,), generator=generator)


def _pretraining_indices(data: FinetuneData, config: FinetuneConfig) -> Tensor:
    """Places of the pre-training images that are learned from."""
    least, reward_M = config.pretraining_threshold, data.pretraining_reward_M.cpu()
    if least is None:
        return torch.arange(len(data.pretraining_latents_MCHW))
    kept = torch.nonzero(reward_M >= least).flatten()
    if len(kept) == 0 and len(reward_M):
        raise FeedbackError(
            f"no pre-training image has a reward of at least pretraining_threshold ({least}): the highest of "
            f"{len(reward_M)} is {float(reward_M.max()):.3f}. Lower it, or set it to null to learn from all."
        )
    return kept
