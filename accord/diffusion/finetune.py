"""Fine-tuning of a diffusion model's UNet on rewarded images (objectives.py), one `step` at a time.

It knows nothing of Ray. What it needs of a distributed run are `rank`, `world_size` and `wrap` (say DDP);
that any number of workers compute the same, and a resumed run the same as an uninterrupted one, follows from
how batches are drawn (batches.py) and losses divided (objectives.py).

Shapes: B samples of one worker's part of a batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from accord.artifacts import Manifest
from accord.diffusion import checkpoint, sharding
from accord.diffusion.batches import Batch, Batches
from accord.diffusion.conditioning import Conditioning, unet_arguments
from accord.diffusion.finetune_data import FinetuneData
from accord.diffusion.model import DiffusionModel
from accord.diffusion.objectives import (
    batch_loss,
    denoising_loss,
    implicit_reward,
    kto_reference_point,
    model_loss,
    needs_reference,
    preference_loss,
)
from accord.diffusion.sample import autocast
from accord.diffusion.settings import FinetuneConfig
from accord.diffusion.trainable import make_trainable, put_weights, without_adapters
from accord.errors import ConfigError
from accord.training import scheduled_rate

__all__ = ["FinetuneConfig", "FinetuneData", "Finetuner"]


class Finetuner:
    """Trains a copy of `model`'s UNet, or adapters in it (trainable.py); everything else of it, and `model`
    itself, stay as they are.

    `wrap` makes the UNet distributed: DistributedDataParallel, or sharding.shard, both of which average
    gradients over the workers. The wrapped module must name its parameters as the UNet that it is given does,
    which must hold them too.

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
        self.config, self.seed = config, seed
        self.rank, self.world_size = rank, world_size
        self.device, self.pixels_per_latent = model.device, model.vae_scale_factor
        self.batches = Batches(model, data, config, seed, rank=rank, world_size=world_size)
        self.identity = {"model": model.digest, "data": data.fingerprint()}

        self.unet = make_trainable(model.unet, config, seed)
        self.forward_unet = wrap(self.unet) if wrap else self.unet
        trained = [(name, p) for name, p in self.unet.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in trained], [parameter for _, parameter in trained]
        # The frozen reference model: a network of its own, or that with adapters without them.
        self.reference: nn.Module | None = None
        if needs_reference(config):
            self.reference = model.unet if config.parameters == "full" else self.unet
        if self.is_sharded and not self.batches.are_shared_evenly:
            raise ConfigError(
                f"sharding fsdp needs batches that {world_size} workers share evenly: batch_size + "
                f"pretraining_batch_size is {self.batches.num_model} + {self.batches.num_pretraining} (with "
                "diffusion_dpo, both the number of pairs and that of pre-training images must be multiples)"
            )
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

    @property
    def is_sharded(self) -> bool:
        return any(isinstance(parameter, DTensor) for parameter in self.parameters[:1])

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
        batch = self.batches.draw(self.step_index)
        count = len(batch.timesteps_B)
        size = math.ceil(count / self.config.gradient_accumulation)
        size += size % self.batches.per_unit  # no pair is split
        parts = [slice(start, start + size) for start in range(0, count, size)]
        reference_point = self._reference_point(batch, parts)
        totals: dict[str, Tensor] = {}
        for number, part in enumerate(parts, start=1):
            with contextlib.ExitStack() as stack:
                if number < len(parts):  # workers exchange gradients once a step
                    no_sync: Any = getattr(self.forward_unet, "no_sync", contextlib.nullcontext)
                    stack.enter_context(no_sync())
                loss, metrics = self._loss(batch, part, reference_point)
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
            self._average_in(sharding.local(self.average), sharding.local(self.parameters), None)
        self.step_index += 1
        return {
            "grad_norm": sharding.gathered(norm.detach()),
            "learning_rate": torch.full((), rate, device=self.device),
        }

    def averaged_unet(self, base: nn.Module | None = None) -> nn.Module:
        """A frozen float32 copy of the UNet with the averaged weights (the current ones when ema_decay is 0).

        Where adapters are trained it is a copy of `base`, the reference model's UNet, with them merged.
        Raises ConfigError without it, and where weights are sharded: then use checkpoint.put_trained.
        """
        source = base if self.config.parameters == "lora" else self.unet
        if source is None or self.is_sharded:
            raise ConfigError(
                "averaged_unet needs the whole network: give the reference model's UNet as `base` where "
                "adapters are trained, and use checkpoint.put_trained where weights are sharded"
            )
        unet = copy.deepcopy(source).float().eval()
        put_weights(unet, dict(zip(self.names, self.average or self.parameters, strict=True)), self.config)
        return unet

    def snapshot(self, *, copy: bool = True) -> checkpoint.Snapshot | None:
        """The state as it is now, whose `write(directory)` may take its time while training goes on (with
        `copy`: in memory of its own). None on all workers but the first; where weights are sharded, all must
        call it."""
        return checkpoint.snapshot(self, copy=copy)

    def trained(self) -> dict[str, Tensor] | None:
        """The averaged trained tensors by name, for trainable.put_weights. None on all workers but the first;
        where weights are sharded, all must call it."""
        return checkpoint.trained(self)

    def save(self, directory: str | Path) -> Manifest:
        """Weights, average, optimiser state and step: all or nothing. Call it on the first worker; where
        weights are sharded use `snapshot`.

        Raises StorageError for a full disk.
        """
        taken = None if self.is_sharded else self.snapshot(copy=False)
        if taken is None:
            raise ConfigError(
                "save works on the first worker, with whole weights; call snapshot on all workers"
            )
        return taken.write(directory)

    def load(self, directory: str | Path) -> None:
        """Goes on from a checkpoint, exactly as if never interrupted, with any number of workers.

        Raises ArtifactError for a damaged checkpoint, ConfigError when config, seed, model or data differ
        from those that it was made with.
        """
        checkpoint.load(self, directory)

    def _loss(
        self, batch: Batch, part: slice, reference_point: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, num_model = self.config, self.batches.num_model
        prediction_BCHW = self._predict(self.forward_unet, *batch.inputs(part))
        target_BCHW = batch.target_BCHW[part]
        ours = slice(0, min(max(batch.num_model - part.start, 0), len(prediction_BCHW)))  # generated images
        weight_B = batch.weight_B[part][ours]
        reference_BCHW = self._reference_prediction(batch, part.start, ours.stop)
        more: dict[str, Tensor] = {}
        if config.is_preference:
            reward_B = _implicit_rewards(prediction_BCHW[ours], target_BCHW[ours], reference_BCHW)
            if reference_point is None:
                reference_point = self._point_of(reward_B.detach().sum())
            loss_B, more = preference_loss(config, reward_B, weight_B, reference_point)
        else:
            loss_B = model_loss(config, prediction_BCHW[ours], target_BCHW[ours], reference_BCHW, weight_B)
        loss, metrics = batch_loss(
            loss_B,
            denoising_loss(prediction_BCHW[ours.stop :], target_BCHW[ours.stop :]),
            config.beta,
            num_model,
            self.batches.num_pretraining,
        )
        unweighted_B = denoising_loss(prediction_BCHW[ours].detach(), target_BCHW[ours])
        metrics["model_loss_unweighted"] = unweighted_B.sum() / max(num_model, 1)
        metrics["weight_mean"] = weight_B.sum() / max(num_model, 1)
        metrics |= {name: value / max(num_model, 1) for name, value in more.items()}
        return loss, metrics

    @torch.no_grad()
    def _reference_point(self, batch: Batch, parts: Sequence[slice]) -> Tensor | None:
        """Q of diffusion_kto is the whole batch's: so it takes a pass of its own before the first gradient.
        None where a single part's own pass will do (see _loss), and for any other objective.
        """
        # Not len(parts): workers must agree on it, and one may have an image less than another.
        if self.config.objective != "diffusion_kto" or self.config.gradient_accumulation == 1:
            return None
        total = torch.zeros((), device=self.device)
        for part in parts:
            count = min(max(batch.num_model - part.start, 0), len(batch.timesteps_B[part]))
            reference_BCHW = self._reference_prediction(batch, part.start, count)
            if reference_BCHW is not None:
                rows = slice(part.start, part.start + max(count, 1))
                prediction_BCHW = self._predict(self.forward_unet, *batch.inputs(rows))
                rewards = prediction_BCHW[:count], batch.target_BCHW[part][:count], reference_BCHW
                total += implicit_reward(*rewards).sum()
        return self._point_of(total)

    def _point_of(self, reward_sum: Tensor) -> Tensor | None:
        """Q of diffusion_kto from this worker's sum of implicit rewards; None for any other objective."""
        if self.config.objective != "diffusion_kto":
            return None
        total = self._over_workers({"reward": reward_sum})["reward"]
        return kto_reference_point(total, self.batches.num_model)

    @torch.no_grad()
    def _reference_prediction(self, batch: Batch, start: int, count: int) -> Tensor | None:
        """What the reference model predicts for `count` images from `start` on; None where
        the objective asks for none, or count is 0."""
        # Workers that share a network must run it equally often.
        least = max(count, 1) if self.is_sharded else count
        if self.reference is None or least == 0:
            return None
        with without_adapters(self.unet) if self.reference is self.unet else contextlib.nullcontext():
            return self._predict(self.reference, *batch.inputs(slice(start, start + least)))[:count]

    def _predict(
        self, unet: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning
    ) -> Tensor:
        arguments = unet_arguments(conditioning, noisy_BCHW, self.pixels_per_latent)
        with autocast(self.device, self.config.precision):
            prediction: Tensor = unet(noisy_BCHW, timesteps_B, **arguments).sample
        return prediction.float()

    def _over_workers(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.world_size == 1 or not torch.distributed.is_initialized():
            return metrics
        stacked = torch.stack(list(metrics.values()))
        torch.distributed.all_reduce(stacked)
        return dict(zip(metrics, stacked.unbind(), strict=True))


def _implicit_rewards(prediction_BCHW: Tensor, target_BCHW: Tensor, reference_BCHW: Tensor | None) -> Tensor:
    """As implicit_reward; there is no reference prediction where there is no image."""
    if reference_BCHW is None:
        return prediction_BCHW.new_zeros(0)
    return implicit_reward(prediction_BCHW, target_BCHW, reference_BCHW)
