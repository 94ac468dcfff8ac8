"""Learning of the reward head on cached features (Lee et al. 2023, section 3.2), one `step` at a time.

It knows nothing of Ray. What it needs of a distributed run are `rank`, `world_size` and `wrap` (say DDP), and
two rules make any number of workers compute the same thing, and a resumed run the same as an uninterrupted
one:
 - the batch of a step, and what dropout drops, depend on (seed, step) alone, and are drawn for the WHOLE
   batch, of which each worker takes every world_size-th image: so there is no data cursor to save;
 - losses are divided by the weight of the whole batch: so the workers' losses add up (see losses.py).

An ensemble's heads see the same batches, each with weights of its own for the judgements; what is minimised
is the sum of their losses, and what is reported the mean.

Shapes: N judged images, B of them in a worker's part of a batch, G of these good, M wrong prompts an image, K
prompts, D features, E heads, H hidden units, L hidden layers, P pairs of an image and a prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from accord.artifacts import Manifest, artifact_writer, load_tensors, save_tensors, verify
from accord.errors import ArtifactError, ConfigError
from accord.reward.calibration import FITS, Platt, calibration_report
from accord.reward.data import RewardData, build_reward_data, require_both_labels
from accord.reward.ensemble import Head, combined, make_head, members, resampling_weights, uncertainty
from accord.reward.losses import GOOD, prompt_probabilities, reward_loss
from accord.reward.settings import RewardConfig
from accord.training import generator_for, refuse_another_run, scheduled_rate

__all__ = ["RewardConfig", "RewardData", "RewardLearner", "build_reward_data"]

CHECKPOINT_KIND = "reward_checkpoint"
# What may differ between two legs of a run: when it reports and saves.
FREE_KEYS = frozenset({"log_every", "checkpoint_every"})
_CHUNK = 8192
"""Pairs that are measured at once: bounds the memory that validation needs."""


@dataclass(frozen=True)
class _Batch:
    """One worker's part of a step's batch, as pairs: first each image with its own prompt, then each good
    image with its wrong prompts. `owner_P` is the row in the batch of a pair's image."""

    image_index_B: Tensor
    good_B: Tensor  # rows of the batch, [G]
    owner_P: Tensor
    text_index_P: Tensor
    mask_EBLH: Tensor | None
    weight_sum_E: list[float]  # of the whole batch
    good_weight_sum_E: list[float]


class RewardLearner:
    """Trains a RewardHead, or an ensemble of them. `wrap` makes it distributed (DistributedDataParallel,
    which averages gradients over the workers) and must share its parameters with the head that it is given.

    Raises FeedbackError when there is nothing to learn from, ConfigError for data or workers that do not fit.
    """

    def __init__(
        self,
        data: RewardData,
        config: RewardConfig,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config, self.seed, self.rank, self.world_size = config, seed, rank, world_size
        self.device = torch.device(device)
        _check(data, config, world_size)
        self.identity = {"data": data.fingerprint()}
        # Features live on the device; what batches are drawn from stays on the CPU, so that drawing never
        # waits for it.
        self.image_ND, self.text_KD = data.image_ND.to(self.device), data.text_KD.to(self.device)
        self.text_index_N, self.contrast_index_NM = data.text_index_N.cpu(), data.contrast_index_NM.cpu()
        self.label_N = data.label_N.cpu().float()
        self.weight_EN = data.weight_N.cpu().float() * resampling_weights(
            config.ensemble, len(self.label_N), seed
        )
        self.train_indices, self.validation_indices = split(self.label_N, config.validation_fraction, seed)
        require_both_labels(self.label_N[self.train_indices].tolist(), "the part of the snapshot to train on")
        dim = self.image_ND.shape[1]
        self.head = make_head(
            dim, config.hidden_size, config.layers, config.combine, config.ensemble, seed
        ).to(self.device)
        self.forward_head = wrap(self.head) if wrap else self.head
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True if config.fast else None,
        )
        self.step_index = 0

    def step(self) -> dict[str, Tensor]:
        """One optimiser step. Returns scalar tensors that stay on the device: a caller that reads them waits
        for it.

        The losses are those of the whole batch when torch.distributed runs, else of this worker's share,
        which add up.
        """
        metrics = self.backward()
        self.update()
        return metrics

    def backward(self) -> dict[str, Tensor]:
        """Gradients of this step's loss, scaled so that their average over the workers is the whole batch's
        gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        batch = self._draw(self.step_index)
        loss, metrics = self._loss(batch)
        (loss * self.world_size).backward()  # type: ignore[no-untyped-call]
        return self._over_workers(metrics)

    def update(self) -> None:
        """Steps AdamW."""
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled_rate(
                self.config.learning_rate, self.config.schedule, self.step_index, self.config.steps
            )
        self.optimizer.step()
        self.step_index += 1

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Measures the head on the validation images; {} when there are none. Waits for the device.

        mse and accuracy (of reward > 0.5) against the labels; probability of the true prompt (Eq. 1) on good
        images; and of an ensemble its mean uncertainty.
        """
        index = self.validation_indices
        if len(index) == 0:
            return {}
        reward_EB = self._rewards(index, self.text_index_N[index])
        reward_B, label_B = combined(reward_EB, self.config.uncertainty_penalty), self.label_N[index]
        values = {
            "validation_mse": float(((reward_B - label_B) ** 2).mean()),
            "validation_accuracy": float(((reward_B > GOOD) == (label_B > GOOD)).float().mean()),
        }
        good = index[label_B > GOOD]
        if len(good):
            texts_GN = torch.cat([self.text_index_N[good, None], self.contrast_index_NM[good]], dim=1)
            reward_GN = torch.stack([self._score(good, texts_G) for texts_G in texts_GN.T], dim=1)
            probability_G = prompt_probabilities(reward_GN, self.config.temperature)[:, 0]
            values["validation_prompt_probability"] = float(probability_G.mean())
        if len(reward_EB) > 1:
            values["validation_uncertainty"] = float(uncertainty(reward_EB).mean())
        return values

    def calibration(self) -> Platt | None:
        """The scaling fitted on the validation images; None unless they hold good and bad ones."""
        scores = self._validation_scores()
        return None if scores is None else FITS[self.config.calibration](*scores)

    def calibration_report(self) -> dict[str, Any] | None:
        """What the scaling does on the validation images (see accord.reward.calibration); None without
        one."""
        scores = self._validation_scores()
        return None if scores is None else calibration_report(*scores, self.config.calibration)

    def trained_head(self) -> Head:
        """A frozen copy of the head, on the CPU."""
        return copy.deepcopy(self.head).cpu().eval().requires_grad_(False)

    def save(self, directory: str | Path) -> Manifest:
        """Weights, optimiser state and step: all or nothing. Call it on one worker; all hold the same.

        Raises StorageError for a full disk; then the directory is as it was before.
        """
        tensors: dict[str, Tensor] = {
            f"head.{name}": parameter for name, parameter in self.head.named_parameters()
        }
        for name, parameter in self.head.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        config = _settings(self.config) | {"step": self.step_index}
        with artifact_writer(
            directory, CHECKPOINT_KIND, inputs=self.identity, config=config, seed=self.seed
        ) as temporary:
            save_tensors(temporary / "state.safetensors", tensors, {"step": str(self.step_index)})
        return verify(directory, CHECKPOINT_KIND)

    def load(self, directory: str | Path) -> None:
        """Goes on from a checkpoint, exactly as if never interrupted, with any number of workers.

        Raises ArtifactError for a damaged checkpoint, ConfigError when config, seed or data differ from those
        that it was made with.
        """
        manifest = verify(directory, CHECKPOINT_KIND)
        stored = dict(manifest.config) | manifest.inputs | {"seed": manifest.seed}
        step = int(stored.pop("step"))
        refuse_another_run(stored, _settings(self.config) | self.identity | {"seed": self.seed}, directory)
        tensors = load_tensors(Path(directory) / "state.safetensors")
        keys = ("step", "exp_avg", "exp_avg_sq") if step > 0 else ()
        state: dict[int, dict[str, Tensor]] = {}
        try:
            with torch.no_grad():
                for number, (name, parameter) in enumerate(self.head.named_parameters()):
                    parameter.copy_(tensors[f"head.{name}"])
                    if keys:
                        state[number] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        except (KeyError, RuntimeError) as error:
            raise ArtifactError(
                f"{directory}: the checkpoint does not fit this reward head: {error}"
            ) from error
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step_index = step

    def _draw(self, step: int) -> _Batch:
        """This worker's part of the batch of `step`; all on the CPU."""
        config = self.config
        drawn = self.train_indices[_choose(len(self.train_indices), config.batch_size, step, self.seed)]
        mask_EBLH = None
        if config.dropout > 0:
            shape = (config.ensemble, len(drawn), config.layers, config.hidden_size)
            keep = torch.rand(shape, generator=generator_for(self.seed, "dropout", step)) >= config.dropout
            mask_EBLH = (keep.float() / (1 - config.dropout))[:, self.rank :: self.world_size]
        good = self.label_N[drawn] > GOOD
        weights = [weight_N[drawn] for weight_N in self.weight_EN]
        mine = drawn[self.rank :: self.world_size]
        good_B = torch.nonzero(self.label_N[mine] > GOOD).flatten()
        owners, texts = [torch.arange(len(mine))], [self.text_index_N[mine]]
        if config.auxiliary_weight > 0:
            wrong_GM = self.contrast_index_NM[mine[good_B]]
            owners.append(good_B.repeat_interleave(wrong_GM.shape[1]))
            texts.append(wrong_GM.flatten())
        return _Batch(
            image_index_B=mine,
            good_B=good_B,
            owner_P=torch.cat(owners),
            text_index_P=torch.cat(texts),
            mask_EBLH=mask_EBLH,
            weight_sum_E=[float(weight_B.sum()) for weight_B in weights],
            good_weight_sum_E=[float(weight_B[good].sum()) for weight_B in weights],
        )

    def _loss(self, batch: _Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward pass over all pairs, then the losses of its parts, for each head."""
        reward_EP = members(self._forward(batch), self.head)
        num_images, num_good = len(batch.image_index_B), len(batch.good_B)
        good_B, label_B = self._put(batch.good_B), self._put(self.label_N[batch.image_index_B])
        losses, metrics = [], []
        for head, reward_P in enumerate(reward_EP.unbind(0)):
            reward_B = reward_P[:num_images]
            # Without the auxiliary loss there are no wrong prompts: one column, of which the cross-entropy
            # is 0.
            wrong_GM = reward_P[num_images:].reshape(num_good, -1) if num_good else reward_P.new_zeros(0, 1)
            weight_B = self._put(self.weight_EN[head, batch.image_index_B])
            loss, terms = reward_loss(
                reward_B,
                label_B,
                weight_B,
                torch.cat([reward_B[good_B, None], wrong_GM], dim=1),
                weight_B[good_B],
                temperature=self.config.temperature,
                auxiliary_weight=self.config.auxiliary_weight,
                weight_sum=batch.weight_sum_E[head],
                good_weight_sum=batch.good_weight_sum_E[head],
            )
            losses.append(loss)
            metrics.append(terms)
        if len(losses) == 1:
            return losses[0], metrics[0]
        means = {name: torch.stack([terms[name] for terms in metrics]).mean() for name in metrics[0]}
        return torch.stack(losses).sum(), means

    def _forward(self, batch: _Batch) -> Tensor:
        """Rewards of the batch's pairs, (P,) or (E, P)."""
        owner_P = self._put(batch.owner_P)
        masks = None
        if batch.mask_EBLH is not None:
            of_pairs_EPLH = self._put(batch.mask_EBLH)[:, owner_P]
            masks = (of_pairs_EPLH if self.config.ensemble > 1 else of_pairs_EPLH[0]).unbind(-2)
        rows = None
        image_index, text_index = batch.image_index_B[batch.owner_P], batch.text_index_P
        if self.config.fast:
            text_index, text_row_P = torch.unique(text_index, return_inverse=True)
            image_index, rows = batch.image_index_B, (owner_P, self._put(text_row_P))
        image, text = self.image_ND[self._put(image_index)], self.text_KD[self._put(text_index)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            rewards: Tensor = self.forward_head(image, text, masks, rows)
        return rewards

    @torch.inference_mode()
    def _rewards(self, image_index_B: Tensor, text_index_B: Tensor) -> Tensor:
        """reward_EB of every head, on the CPU."""
        parts = []
        for start in range(0, max(len(image_index_B), 1), _CHUNK):
            images, texts = image_index_B[start:][:_CHUNK], text_index_B[start:][:_CHUNK]
            rewards = self.head(self.image_ND[self._put(images)], self.text_KD[self._put(texts)])
            parts.append(members(rewards, self.head).cpu())
        return torch.cat(parts, dim=1)

    def _score(self, image_index_B: Tensor, text_index_B: Tensor) -> Tensor:
        return combined(self._rewards(image_index_B, text_index_B), self.config.uncertainty_penalty)

    def _validation_scores(self) -> tuple[Any, Any] | None:
        """The validation images' scores and labels as arrays; None unless there are good and bad ones."""
        index = self.validation_indices
        label_B = self.label_N[index] > GOOD
        if len(index) == 0 or bool(label_B.all()) or not bool(label_B.any()):
            return None
        return self._score(index, self.text_index_N[index]).numpy(), label_B.numpy()

    def _over_workers(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.world_size == 1 or not torch.distributed.is_initialized():
            return metrics
        stacked = torch.stack(list(metrics.values()))
        torch.distributed.all_reduce(stacked)
        return dict(zip(metrics, stacked.unbind(), strict=True))

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def split(label_N: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train and to validate on: `fraction` of the good and of the bad images, drawn by the
    seed."""
    train, validation = [], []
    for name, inside_N in (("good", label_N > GOOD), ("bad", label_N <= GOOD)):
        indices = torch.nonzero(inside_N).flatten()
        shuffled = indices[
            torch.randperm(len(indices), generator=generator_for(seed, f"validation {name}", 0))
        ]
        count = min(round(fraction * len(indices)), max(len(indices) - 1, 0))
        validation.append(shuffled[:count])
        train.append(shuffled[count:])
    return torch.cat(train).sort().values, torch.cat(validation).sort().values


def _choose(population: int, count: int, step: int, seed: int) -> Tensor:
    """Places step * count .. (step + 1) * count of an endless row of shuffled epochs."""
    first, last = step * count, (step + 1) * count
    epochs = range(first // population, (last - 1) // population + 1)
    places = [_epoch(population, epoch, seed) for epoch in epochs]
    offset = first - epochs[0] * population
    return torch.cat(places)[offset : offset + count] if len(places) > 1 else places[0][offset:][:count]


@lru_cache(maxsize=4)
def _epoch(population: int, epoch: int, seed: int) -> Tensor:
    """Kept from step to step: of 100,000 images, shuffling takes longer than all the rest of a draw."""
    return torch.randperm(population, generator=generator_for(seed, "epoch", epoch))


def _settings(config: RewardConfig) -> dict[str, Any]:
    return {key: value for key, value in config.described().items() if key not in FREE_KEYS}


def _check(data: RewardData, config: RewardConfig, world_size: int) -> None:
    """Says early and plainly what would fail late and darkly."""
    require_both_labels(data.label_N.tolist(), "the snapshot")
    num_images = len(data.label_N)
    rows = (data.image_ND, data.text_index_N, data.weight_N, data.category_N, data.contrast_index_NM)
    if any(len(row) != num_images for row in rows):
        raise ConfigError(
            f"{num_images} labels, but features, prompts, weights or categories of another number"
        )
    if config.auxiliary_weight > 0 and data.contrast_index_NM.shape[1] != config.num_prompts - 1:
        raise ConfigError(
            f"num_prompts is {config.num_prompts}, but the data has {data.contrast_index_NM.shape[1]} wrong "
            "prompts an image; expected num_prompts - 1"
        )
    if float(data.weight_N.min()) < 0 or not bool(torch.isfinite(data.weight_N).all()):
        raise ConfigError("weights of judged images must be finite and at least 0")
    if config.batch_size < world_size:
        raise ConfigError(f"a batch of {config.batch_size} images is too small for {world_size} workers")
