"""The reward model as an artifact: a head on a CLIP that it names by digest, and its calibration.

Shapes: B images, E heads, H W pixels, C = 3 channels RGB, N prompts an image, D features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from accord.artifacts import (
    MANIFEST_NAME,
    Manifest,
    artifact_writer,
    content_digest,
    load_tensors,
    save_tensors,
    verify,
)
from accord.config import Config, resolve_path
from accord.errors import ArtifactError
from accord.reward.calibration import Platt
from accord.reward.ensemble import Head, HeadEnsemble, combined, make_head, members, uncertainty
from accord.reward.features import CONFIG_NAME as CLIP_CONFIG_NAME
from accord.reward.features import ClipEncoder, Pixels, unique
from accord.reward.head import RewardHead
from accord.reward.losses import prompt_probabilities
from accord.reward.settings import Combine

KIND = "reward_model"
CONFIG_NAME = "config.json"
HEAD_NAME = "head.safetensors"
_CHUNK = 8192
"""Pairs that go through the head at once: bounds the memory of scoring a large set."""


class RewardModelConfig(Config):
    """config.json of a reward model. It names its CLIP by digest; where that lies is in the manifest, so that
    the reward model's own digest does not depend on it. What only an ensemble has is written for one only, so
    that the digest of a single head does not depend on the version either."""

    dim: int
    hidden_size: int
    layers: int
    combine: Combine
    temperature: float
    clip_digest: str
    platt_slope: float | None = None
    platt_intercept: float | None = None
    ensemble: int = Field(default=1, ge=1, le=64)
    uncertainty_penalty: float = 0.0


class RewardModel:
    """r(image, prompt) in [0, 1], how well people would find that the image fits the prompt.

    `calibration`, when there is one, turns a reward into the probability of "good"; it keeps the order of
    rewards. The reward of an ensemble of heads is their mean less `uncertainty_penalty` of their standard
    deviations.
    """

    def __init__(
        self,
        head: Head,
        encoder: ClipEncoder,
        *,
        temperature: float = 2.0,
        calibration: Platt | None = None,
        uncertainty_penalty: float = 0.0,
        digest: str = "",
        learned: bool = True,
    ) -> None:
        """`learned` is False where nobody has taught the head: the reward only grows with the similarity."""
        if head.dim != encoder.dim:
            raise ArtifactError(
                f"the reward head takes features of {head.dim} numbers, but {encoder.uri} gives {encoder.dim}"
            )
        self.head = head.to(encoder.device).eval().requires_grad_(False)
        self.encoder, self.temperature, self.calibration = encoder, temperature, calibration
        self.size = head.size if isinstance(head, HeadEnsemble) else 1
        self.uncertainty_penalty, self.digest, self.learned = uncertainty_penalty, digest, learned

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        clip: str | Path | ClipEncoder | None = None,
        device: str | torch.device = "cpu",
    ) -> RewardModel:
        """Loads what `save` wrote.

        Args:
            clip: where its CLIP lies now, or a loaded one; without it, where it lay when the model was saved.

        Raises:
            ArtifactError: a missing, changed or damaged reward model, or a CLIP that it was not learned with.
        """
        directory = Path(directory)
        manifest = verify(directory, KIND)
        try:
            config = RewardModelConfig.model_validate_json((directory / CONFIG_NAME).read_bytes())
        except (OSError, pydantic.ValidationError) as error:
            raise ArtifactError(f"{directory / CONFIG_NAME} is damaged: {error}") from None
        if clip is None:
            clip = str(manifest.config["clip"])
        encoder = clip if isinstance(clip, ClipEncoder) else ClipEncoder(clip, device)
        if encoder.digest != config.clip_digest:
            raise ArtifactError(
                f"{directory} was learned on the CLIP {config.clip_digest}, but {encoder.uri} is "
                f"{encoder.digest}: its scores would mean nothing; give the CLIP that it was learned on, or "
                "learn the reward anew"
            )
        head = make_head(config.dim, config.hidden_size, config.layers, config.combine, config.ensemble)
        try:
            head.load_state_dict(load_tensors(directory / HEAD_NAME))
        except RuntimeError as error:
            raise ArtifactError(f"{directory / HEAD_NAME} does not fit {CONFIG_NAME}: {error}") from None
        platt = None
        if config.platt_slope is not None and config.platt_intercept is not None:
            platt = Platt(config.platt_slope, config.platt_intercept)
        return cls(
            head,
            encoder,
            temperature=config.temperature,
            calibration=platt,
            uncertainty_penalty=config.uncertainty_penalty,
            digest=manifest.digest,
        )

    def save(
        self, directory: str | Path, *, inputs: Mapping[str, str], config: Mapping[str, Any], seed: int
    ) -> Manifest:
        """Writes the head, config.json and a manifest; `inputs` and `config` say what it was learned from,
        and how.

        The CLIP is not copied: its digest is added to the inputs, and where it lies to the config, as "clip".

        Raises StorageError for a full disk; then nothing is changed.
        """
        platt = self.calibration
        content = RewardModelConfig(
            dim=self.head.dim,
            hidden_size=self.head.hidden,
            layers=self.head.layers,
            combine=self.head.combine,
            temperature=self.temperature,
            clip_digest=self.encoder.digest,
            platt_slope=None if platt is None else platt.slope,
            platt_intercept=None if platt is None else platt.intercept,
            ensemble=self.size,
            uncertainty_penalty=self.uncertainty_penalty,
        )
        only_ensembles = None if self.size > 1 else {"ensemble", "uncertainty_penalty"}
        with artifact_writer(
            directory,
            KIND,
            inputs={**inputs, "clip": self.encoder.digest},
            config={**config, "clip": self.encoder.uri},
            seed=seed,
        ) as temporary:
            save_tensors(temporary / HEAD_NAME, self.head.state_dict())
            text = json.dumps(
                content.model_dump(mode="json", exclude=only_ensembles), indent=2, sort_keys=True
            )
            (temporary / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        manifest = verify(directory, KIND)
        self.digest = manifest.digest
        return manifest

    def score(self, images: Tensor | Pixels | Sequence[Pixels], prompts: Sequence[str]) -> Tensor:
        """reward_B of each uint8 RGB image (BHWC, or a sequence of HWC) for its own prompt, on the encoder's
        device."""
        distinct = unique(prompts)
        rows = {prompt: row for row, prompt in enumerate(distinct)}
        text_KD = self.encoder.text_features(distinct)
        return self.score_features(
            self.encoder.image_features(images), text_KD[[rows[prompt] for prompt in prompts]]
        )

    @torch.inference_mode()
    def score_features(self, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        """reward_B from features of this model's CLIP."""
        return combined(self.head_rewards(image_BD, text_BD), self.uncertainty_penalty)

    @torch.inference_mode()
    def score_and_doubt(self, image_BD: Tensor, text_BD: Tensor) -> tuple[Tensor, Tensor]:
        """reward_B, and the standard deviation of the heads' rewards: NaN for a single head."""
        reward_EB = self.head_rewards(image_BD, text_BD)
        return combined(reward_EB, self.uncertainty_penalty), uncertainty(reward_EB)

    @torch.inference_mode()
    def head_rewards(self, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        """reward_EB of every head; E is 1 without an ensemble."""
        if len(image_BD) != len(text_BD):
            raise ValueError(f"{len(image_BD)} images, but {len(text_BD)} prompts: each image needs its own")
        device = self.encoder.device
        parts = [
            self.head(image_BD[start : start + _CHUNK].to(device), text_BD[start : start + _CHUNK].to(device))
            for start in range(0, len(image_BD), _CHUNK)
        ]
        if not parts:
            return torch.zeros(1, 0, device=device)
        return torch.cat([members(part, self.head) for part in parts], dim=1)

    def classify(self, image_BD: Tensor, text_BND: Tensor) -> Tensor:
        """Eq. 1: probability_BN that each image shows the n-th of its N prompts."""
        num_prompts = text_BND.shape[1]
        image_PD = image_BD.repeat_interleave(num_prompts, dim=0)
        reward_BN = self.score_features(image_PD, text_BND.flatten(0, 1)).reshape(-1, num_prompts)
        return prompt_probabilities(reward_BN, self.temperature)

    def calibrated(self, reward_B: Tensor) -> Tensor:
        """The probability of "good" for each reward; the reward itself when the model has no calibration."""
        if self.calibration is None:
            return reward_B
        return torch.from_numpy(self.calibration(reward_B.cpu().numpy())).to(reward_B)


def open_reward(directory: str | Path, device: str | torch.device = "cpu") -> RewardModel:
    """The reward model in a directory; or that of a CLIP alone, with an adapter that has learned nothing: a
    reward that grows with the similarity of image and prompt.

    Raises:
        ArtifactError: the directory holds neither, or is damaged.
    """
    path = resolve_path(str(directory))
    if (path / CLIP_CONFIG_NAME).is_file():
        encoder = ClipEncoder(directory, device)
        head = RewardHead(encoder.dim, combine="adapter")
        digest = content_digest(KIND, {"clip": encoder.digest})
        return RewardModel(head, encoder, digest=digest, learned=False)
    if not (path / MANIFEST_NAME).is_file():
        raise ArtifactError(
            f"{directory} holds neither a reward model ({MANIFEST_NAME}) nor a CLIP ({CLIP_CONFIG_NAME}); "
            "expected the directory of one of them"
        )
    return RewardModel.load(path, device=device)
