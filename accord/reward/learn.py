"""Learning of the reward head on cached features (Lee et al. 2023, section 3.2), one `step` at a time.

It knows nothing of Ray. What it needs of a distributed run are `rank`, `world_size` and `wrap` (say DDP), and
two rules make any number of workers compute the same thing, and a resumed run the same as an uninterrupted
one:
 - the batch of a step, and what dropout drops, depend on (seed, step) alone, and are drawn for the WHOLE
   batch, of which each worker takes every world_size-th image: so there is no data cursor to save;
 - losses are divided by the weight of the whole batch: so the workers' losses add up (see losses.py).

Shapes: N judged images, B of them in a worker's part of a batch, G of these good, M wrong prompts an image, K
prompts, D features, H hidden units, P pairs of an image and a prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from accord.artifacts import Manifest, artifact_writer, load_tensors, save_tensors, verify
from accord.errors import ArtifactError, ConfigError
from accord.reward.calibration import Platt, fit_platt
from accord.reward.data import RewardData, build_reward_data, require_both_labels
from accord.reward.head import RewardHead
from accord.reward.losses import GOOD, prompt_probabilities, reward_loss
from accord.reward.settings import RewardConfig
from accord.training import generator_for, refuse_another_run, scheduled_rate

__all__ = ["RewardConfig", "RewardData", "RewardLearner", "build_reward_data"]

CHECKPOINT_KIND = "reward_checkpoint"
# What may differ between two legs of a run: when it reports and saves.
FREE_KEYS = frozenset({"log_every", "checkpoint_every"})


@dataclass(frozen=True)
class _Batch:
    """One worker's part of a step's batch, as pairs: first each image with its own prompt, then each good
    image with its wrong prompts. `owner_P` is the row in the batch of a pair's image."""

    image_index_B: Tensor
    good_B: Tensor  # rows of the batch, [G]
    owner_P: Tensor
    text_index_P: Tensor
    mask_BLH: Tensor | None
    weight_sum: float  # of the whole batch
    good_weight_sum: float


class RewardLearner:
    """Trains a RewardHead. `wrap` makes it distributed (DistributedDataParallel, which averages gradients
    over the workers) and must share its parameters with the head that it is given.

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
        self.label_N, self.weight_N = data.label_N.cpu().float(), data.weight_N.cpu().float()
        self.train_indices, self.validation_indices = split(self.label_N, config.validation_fraction, seed)
        require_both_labels(self.label_N[self.train_indices].tolist(), "the part of the snapshot to train on")
        dim = self.image_ND.shape[1]
        self.head = RewardHead(
            dim, config.hidden_size, config.layers, config.combine, generator_for(seed, "head", 0)
        )
        self.head.to(self.device)
        self.forward_head = wrap(self.head) if wrap else self.head
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
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
        images.
        """
        index = self.validation_indices
        if len(index) == 0:
            return {}
        reward_B = self._rewards(index, self.text_index_N[index])
        label_B = self.label_N[index]
        values = {
            "validation_mse": float(((reward_B - label_B) ** 2).mean()),
            "validation_accuracy": float(((reward_B > GOOD) == (label_B > GOOD)).float().mean()),
        }
        good = index[label_B > GOOD]
        if len(good):
            texts_GN = torch.cat([self.text_index_N[good, None], self.contrast_index_NM[good]], dim=1)
            reward_GN = torch.stack([self._rewards(good, texts_G) for texts_G in texts_GN.T], dim=1)
            probability_G = prompt_probabilities(reward_GN, self.config.temperature)[:, 0]
            values["validation_prompt_probability"] = float(probability_G.mean())
        return values

    def calibration(self) -> Platt | None:
        """Platt scaling fitted on the validation images; None unless they hold good and bad ones."""
        index = self.validation_indices
        label_B = self.label_N[index] > GOOD
        if len(index) == 0 or bool(label_B.all()) or not bool(label_B.any()):
            return None
        return fit_platt(self._rewards(index, self.text_index_N[index]).numpy(), label_B.numpy())

    def trained_head(self) -> RewardHead:
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
        mask_BLH = None
        if config.dropout > 0:
            shape = (len(drawn), config.layers, config.hidden_size)
            keep = torch.rand(shape, generator=generator_for(self.seed, "dropout", step)) >= config.dropout
            mask_BLH = (keep.float() / (1 - config.dropout))[self.rank :: self.world_size]
        weight, good = self.weight_N[drawn], self.label_N[drawn] > GOOD
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
            mask_BLH=mask_BLH,
            weight_sum=float(weight.sum()),
            good_weight_sum=float(weight[good].sum()),
        )

    def _loss(self, batch: _Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward pass over all pairs, then the losses of its parts."""
        image_PD = self.image_ND[self._put(batch.image_index_B[batch.owner_P])]
        text_PD = self.text_KD[self._put(batch.text_index_P)]
        masks = None
        if batch.mask_BLH is not None:
            masks = self._put(batch.mask_BLH)[self._put(batch.owner_P)].unbind(1)
        reward_P = self.forward_head(image_PD, text_PD, masks)
        num_images = len(batch.image_index_B)
        reward_B, good_B = reward_P[:num_images], self._put(batch.good_B)
        # Without the auxiliary loss there are no wrong prompts: one column, of which the cross-entropy is 0.
        wrong_GM = reward_P[num_images:].reshape(len(good_B), -1) if len(good_B) else reward_P.new_zeros(0, 1)
        weight_B = self._put(self.weight_N[batch.image_index_B])
        return reward_loss(
            reward_B,
            self._put(self.label_N[batch.image_index_B]),
            weight_B,
            torch.cat([reward_B[good_B, None], wrong_GM], dim=1),
            weight_B[good_B],
            temperature=self.config.temperature,
            auxiliary_weight=self.config.auxiliary_weight,
            weight_sum=batch.weight_sum,
            good_weight_sum=batch.good_weight_sum,
        )

    @torch.inference_mode()
    def _rewards(self, image_index_B: Tensor, text_index_B: Tensor) -> Tensor:
        reward_B: Tensor = self.head(
            self.image_ND[self._put(image_index_B)], self.text_KD[self._put(text_index_B)]
        )
        return reward_B.cpu()

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
    places = [torch.randperm(population, generator=generator_for(seed, "epoch", epoch)) for epoch in epochs]
    offset = first - epochs[0] * population
    return torch.cat(places)[offset : offset + count]


def _settings(config: RewardConfig) -> dict[str, Any]:
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE_KEYS}


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
