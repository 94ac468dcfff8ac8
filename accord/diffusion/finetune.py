"""Fine-tuning of a diffusion model's UNet on rewarded images (objectives.py), one `step` at a time.

It knows nothing of Ray. What it needs of a distributed run are `rank`, `world_size` and `wrap` (say DDP), and
two rules make any number of workers compute the same, and a resumed run the same as an uninterrupted one:
 - the batch of step s (images, noise, timesteps, dropped prompts) is drawn WHOLE by generators
   seeded with (seed, s), and each worker takes every world_size-th sample of it: no data cursor to save;
 - losses are divided by the size of the whole batch: so the workers' losses add up (see objectives.py).

Shapes: N generated images, M pre-training images, B samples of one worker's part of a batch, C latent
channels, H W latent height and width, K prompts, T text tokens, D text width.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from accord.artifacts import Manifest, sha256_bytes
from accord.diffusion import checkpoint
from accord.diffusion.model import DiffusionModel
from accord.diffusion.objectives import (
    add_noise,
    advantage_weighted_matching,
    batch_loss,
    denoising_loss,
    denoising_target,
    diffusion_nft,
    prompt_advantages,
    reward_weighted_likelihood,
    reward_weights,
)
from accord.diffusion.sample import autocast
from accord.diffusion.settings import FinetuneConfig
from accord.errors import ConfigError, FeedbackError
from accord.training import generator_for, scheduled_rate

__all__ = ["FinetuneConfig", "FinetuneData", "Finetuner"]


@dataclass(frozen=True)
class FinetuneData:
    """Everything encoded once (encode.py), on any device, latents in any float type."""

    latents_NCHW: Tensor
    text_index_N: Tensor  # rows of text_KTD
    reward_N: Tensor
    pretraining_latents_MCHW: Tensor
    pretraining_text_index_M: Tensor
    pretraining_reward_M: Tensor  # of each image for its caption; read only if a threshold asks for it
    text_KTD: Tensor
    empty_text_TD: Tensor  # of the empty prompt, for condition dropout

    def fingerprint(self) -> str:
        """A digest of rewards, captions and sizes (not of the latents, which may be many gigabytes)."""
        parts = [
            str([tuple(t.shape) for t in (self.latents_NCHW, self.pretraining_latents_MCHW, self.text_KTD)])
        ]
        for tensor in (
            self.text_index_N,
            self.reward_N.float(),
            self.pretraining_text_index_M,
            self.pretraining_reward_M.float(),
        ):
            parts.append(sha256_bytes(tensor.cpu().contiguous().numpy().tobytes()))
        return sha256_bytes(" ".join(parts).encode())


@dataclass(frozen=True)
class _Batch:
    """One worker's part of a step's batch: generated images first, then pre-training images."""

    noisy_BCHW: Tensor
    target_BCHW: Tensor
    timesteps_B: Tensor
    text_BTD: Tensor
    weight_B: Tensor  # weight or advantage of generated images, 0 for pre-training images
    num_model: int  # generated images, which come first


class Finetuner:
    """Trains a copy of `model`'s UNet; everything else of it, and `model` itself, stay as they are.

    `wrap` makes the UNet distributed (DistributedDataParallel, which averages gradients over the workers).
    The wrapped module must share its parameters with the UNet that it is given.

    Raises FeedbackError when there is nothing to learn from, ConfigError for data or workers that do not fit.
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
        wrap: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self.config, self.data, self.seed = config, data, seed
        self.rank, self.world_size = rank, world_size
        self.device = model.device
        self.num_model = 0 if config.objective == "pretraining_only" else config.batch_size
        self.num_pretraining = config.pretraining_batch_size if config.beta > 0 else 0
        _check(model, data, self.num_model, self.num_pretraining, world_size)
        self.identity = {"model": model.digest, "data": data.fingerprint()}
        self.prediction_type = model.prediction_type
        self.alphas_cumprod_T = model.alphas_cumprod().to(self.device)
        self.text_KTD = data.text_KTD.to(self.device, torch.float32)
        self.empty_text_TD = data.empty_text_TD.to(self.device, torch.float32)
        self._weigh_images()
        self.pretraining_indices = _pretraining_indices(data, config)

        is_signed = config.objective in ("advantage_weighted_matching", "diffusion_nft")
        self.reference: nn.Module | None = model.unet if is_signed else None  # frozen
        self.unet: nn.Module = copy.deepcopy(model.unet).float().train().requires_grad_(True)
        self.forward_unet = wrap(self.unet) if wrap else self.unet
        self.parameters = list(self.unet.parameters())
        self.average = [p.detach().clone() for p in self.parameters] if config.ema_decay > 0 else []
        # average <- decay * average + (1 - decay) * weights
        self._average_in: Callable[..., None] = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.step_index = 0

    def step(self) -> dict[str, Tensor]:
        """One optimiser step. Returns scalar tensors that stay on the device: a caller that reads them waits
        for it.

        The losses are those of the whole batch when torch.distributed runs, else of this worker's share,
        which add up.
        """
        metrics = self.backward()
        metrics |= self.update()
        return metrics

    def backward(self) -> dict[str, Tensor]:
        """This step's gradients, scaled so that their average over the workers is the whole batch's."""
        self.optimizer.zero_grad(set_to_none=True)
        batch = self._draw(self.step_index)
        count = len(batch.timesteps_B)
        size = math.ceil(count / self.config.gradient_accumulation)
        parts = [slice(start, start + size) for start in range(0, count, size)]
        totals: dict[str, Tensor] = {}
        for number, part in enumerate(parts, start=1):
            with contextlib.ExitStack() as stack:
                if number < len(parts):  # workers exchange gradients once a step
                    no_sync: Any = getattr(self.forward_unet, "no_sync", contextlib.nullcontext)
                    stack.enter_context(no_sync())
                loss, metrics = self._loss(batch, part)
                (loss * self.world_size).backward()  # type: ignore[no-untyped-call]
            totals = {name: value + totals[name] if totals else value for name, value in metrics.items()}
        return self._over_workers(totals)

    def update(self) -> dict[str, Tensor]:
        """Clips the gradients, steps AdamW, averages the weights."""
        config = self.config
        rate = scheduled_rate(
            config.learning_rate,
            config.schedule,
            self.step_index,
            config.steps,
            warmup_steps=config.warmup_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        if self.average:
            self._average_in(self.average, self.parameters, None)
        self.step_index += 1
        return {"grad_norm": norm.detach(), "learning_rate": torch.full((), rate, device=self.device)}

    def averaged_unet(self) -> nn.Module:
        """A frozen copy of the UNet with the averaged weights (the current ones when ema_decay is 0)."""
        unet = copy.deepcopy(self.unet).eval().requires_grad_(False)
        with torch.no_grad():
            for parameter, average in zip(unet.parameters(), self.average or self.parameters, strict=True):
                parameter.copy_(average)
        return unet

    def save(self, directory: str | Path) -> Manifest:
        """Weights, average, optimiser state and step: all or nothing. Call it on one worker; all hold the
        same.

        Raises StorageError for a full disk.
        """
        return checkpoint.save(self, directory)

    def load(self, directory: str | Path) -> None:
        """Goes on from a checkpoint, exactly as if never interrupted, with any number of workers.

        Raises ArtifactError for a damaged checkpoint, ConfigError when config, seed, model or data differ
        from those that it was made with.
        """
        checkpoint.load(self, directory)

    def _weigh_images(self) -> None:
        """Weights, or advantages, over the whole data set. An image that `threshold` leaves out is never
        drawn."""
        self.kept_indices = torch.arange(len(self.data.reward_N))
        self.weight_N = torch.zeros(0)
        if not self.num_model:
            return
        config, reward_N, prompt_N = self.config, self.data.reward_N.cpu(), self.data.text_index_N.cpu()
        if config.objective == "reward_weighted_likelihood":
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

    def _draw(self, step: int) -> _Batch:
        """This worker's part of the batch of `step`.

        Numbers are drawn on the CPU, so that they are the same on any device; noise is drawn by sample, so
        that a worker draws none of the others'.
        """
        config, data = self.config, self.data
        total = self.num_model + self.num_pretraining
        generator = generator_for(self.seed, step)
        model_index = self.kept_indices[_choose(len(self.kept_indices), self.num_model, generator)]
        pretraining_index = self.pretraining_indices[
            _choose(len(self.pretraining_indices), self.num_pretraining, generator)
        ]
        levels = len(self.alphas_cumprod_T)
        uniform = torch.rand(total, generator=generator, dtype=torch.float64)
        timesteps = (levels * uniform ** (1.0 / config.timestep_power)).long().clamp(max=levels - 1)
        dropout = torch.full((total,), config.condition_dropout)
        if config.pretraining_condition_dropout is not None:
            dropout[self.num_model :] = config.pretraining_condition_dropout
        dropped = torch.rand(total, generator=generator) < dropout

        positions = range(self.rank, total, self.world_size)
        mine = torch.tensor(positions)
        model_index = model_index[mine[mine < self.num_model]]
        pretraining_index = pretraining_index[mine[mine >= self.num_model] - self.num_model]
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
            torch.stack([torch.randn(shape, generator=generator_for(self.seed, step, i)) for i in positions])
        )
        timesteps_B, dropped_B = self._put(timesteps[mine]), self._put(dropped[mine])
        text_BTD = torch.where(dropped_B[:, None, None], self.empty_text_TD, self.text_KTD[text_index_B])
        alphas = self.alphas_cumprod_T
        return _Batch(
            noisy_BCHW=add_noise(latents_BCHW, noise_BCHW, timesteps_B, alphas),
            target_BCHW=denoising_target(latents_BCHW, noise_BCHW, timesteps_B, alphas, self.prediction_type),
            timesteps_B=timesteps_B,
            text_BTD=text_BTD,
            weight_B=self._put(torch.cat([self.weight_N[model_index], torch.zeros(len(pretraining_index))])),
            num_model=len(model_index),
        )

    def _loss(self, batch: _Batch, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = batch.noisy_BCHW[part], batch.timesteps_B[part], batch.text_BTD[part]
        prediction_BCHW, target_BCHW = self._predict(self.forward_unet, *inputs), batch.target_BCHW[part]
        ours = slice(0, min(max(batch.num_model - part.start, 0), len(prediction_BCHW)))  # generated images
        weight_B = batch.weight_B[part][ours]
        loss, metrics = batch_loss(
            self._model_loss(prediction_BCHW[ours], target_BCHW[ours], weight_B, [x[ours] for x in inputs]),
            denoising_loss(prediction_BCHW[ours.stop :], target_BCHW[ours.stop :]),
            self.config.beta,
            self.num_model,
            self.num_pretraining,
        )
        unweighted_B = denoising_loss(prediction_BCHW[ours].detach(), target_BCHW[ours])
        metrics["model_loss_unweighted"] = unweighted_B.sum() / max(self.num_model, 1)
        metrics["weight_mean"] = weight_B.sum() / max(self.num_model, 1)
        return loss, metrics

    def _model_loss(
        self, prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor, inputs: Sequence[Tensor]
    ) -> Tensor:
        """The objective's loss of each generated image; `inputs` are what the network predicted it from."""
        config = self.config
        if self.reference is None or len(weight_B) == 0:
            return reward_weighted_likelihood(prediction_BCHW, target_BCHW, weight_B)
        with torch.no_grad():
            reference_BCHW = self._predict(self.reference, *inputs)
        if config.objective == "advantage_weighted_matching":
            return advantage_weighted_matching(
                prediction_BCHW, target_BCHW, reference_BCHW, weight_B, config.anchor
            )
        optimality_B = 0.5 + 0.5 * weight_B / config.advantage_clip
        return diffusion_nft(prediction_BCHW, target_BCHW, reference_BCHW, optimality_B, config.nft_strength)

    def _predict(self, unet: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_BTD: Tensor) -> Tensor:
        with autocast(self.device, self.config.precision):
            prediction: Tensor = unet(noisy_BCHW, timesteps_B, encoder_hidden_states=text_BTD).sample
        return prediction.float()

    def _over_workers(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.world_size == 1 or not torch.distributed.is_initialized():
            return metrics
        stacked = torch.stack(list(metrics.values()))
        torch.distributed.all_reduce(stacked)
        return dict(zip(metrics, stacked.unbind(), strict=True))

    def _take(self, tensor: Tensor, index: Tensor) -> Tensor:
        return self._put(tensor[index.to(tensor.device, non_blocking=True)])

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


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


def _check(
    model: DiffusionModel, data: FinetuneData, num_model: int, num_pretraining: int, world_size: int
) -> None:
    """Says early and plainly what would fail late and darkly."""
    if num_model and len(data.latents_NCHW) == 0:
        raise FeedbackError("fine-tuning has no generated images: collect and score some first")
    if num_pretraining and len(data.pretraining_latents_MCHW) == 0:
        raise ConfigError(
            "fine-tuning has no pre-training images, but beta and pretraining_batch_size ask for some: give "
            "a pre-training source, or set finetune.beta=0"
        )
    if num_model + num_pretraining < world_size:
        raise ConfigError(
            f"a batch of {num_model} + {num_pretraining} images is too small for {world_size} workers"
        )
    used: list[tuple[str, Tensor, Tensor]] = []
    if num_model:
        used.append(("generated", data.latents_NCHW, data.text_index_N))
        if len(data.reward_N) != len(data.latents_NCHW) or not bool(torch.isfinite(data.reward_N).all()):
            raise FeedbackError("fine-tuning needs one finite reward for each generated image")
    if num_pretraining:
        used.append(("pre-training", data.pretraining_latents_MCHW, data.pretraining_text_index_M))
    for name, latents, index in used:
        if latents.ndim != 4 or latents.shape[1] != model.latent_channels:
            raise ConfigError(
                f"{name} latents are {tuple(latents.shape)}; expected [N, {model.latent_channels}, H, W]"
            )
        if len(index) != len(latents) or int(index.min()) < 0 or int(index.max()) >= len(data.text_KTD):
            raise ConfigError(
                f"each {name} image needs a text_index into the {len(data.text_KTD)} encoded prompts"
            )
    width: Any = model.unet.config.cross_attention_dim
    if (
        data.text_KTD.ndim != 3
        or data.text_KTD.shape[2] != width
        or data.text_KTD.shape[1:] != data.empty_text_TD.shape
    ):
        raise ConfigError(
            f"text states are {tuple(data.text_KTD.shape)}, of the empty prompt "
            f"{tuple(data.empty_text_TD.shape)}; expected [K, T, {width}] and [T, {width}]"
        )
