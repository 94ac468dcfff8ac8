"""A feedback snapshot as tensors to learn a reward from.

Shapes: N judged images, K distinct prompts, M contrast prompts an image, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from accord.artifacts import sha256_bytes
from accord.errors import FeedbackError
from accord.prompts import Grammar
from accord.reward.losses import GOOD


@dataclass(frozen=True)
class RewardData:
    """Judged images and prompts as CLIP features (L2-normalised float32), on any device."""

    image_ND: Tensor
    text_KD: Tensor
    text_index_N: Tensor  # rows of text_KD: the prompt that each image was judged for
    label_N: Tensor  # 1 good, 0 bad, or a share of votes
    weight_N: Tensor
    category_N: tuple[str, ...]
    contrast_index_NM: Tensor  # rows of text_KD: the wrong prompts of Eq. 1

    def fingerprint(self) -> str:
        """A digest of everything that is learned from."""
        tensors = (
            self.image_ND,
            self.text_KD,
            self.text_index_N,
            self.label_N,
            self.weight_N,
            self.contrast_index_NM,
        )
        parts = [f"{tuple(t.shape)}{sha256_bytes(t.cpu().contiguous().numpy().tobytes())}" for t in tensors]
        return sha256_bytes(" ".join(parts).encode())


def build_reward_data(
    snapshot: pd.DataFrame,
    grammar: Grammar,
    *,
    image_features: Callable[[Sequence[str]], Tensor],
    text_features: Callable[[Sequence[str]], Tensor],
    num_prompts: int,
    seed: int,
) -> RewardData:
    """The labelled rows of a snapshot (columns image, prompt, category, label, weight), in its order.

    Args:
        image_features: digests -> features, such as FeatureCache.image_features with its loader.
        text_features: prompts -> features, such as ClipEncoder.text_features.
        num_prompts: N of Eq. 1. Each image gets N - 1 wrong prompts of its own, drawn by `seed`, the image
            and its prompt; those of a seen prompt are seen prompts, so that held-out words stay unseen.

    Raises:
        FeedbackError: no labelled image, or labels of one kind only.
        PromptError: a prompt outside the grammar, or one with too few perturbations.
    """
    rows = snapshot[snapshot["label"].notna()]
    labels = [float(label) for label in rows["label"]]
    require_both_labels(labels, "the snapshot", unlabelled=len(snapshot) - len(rows))
    images, prompts = [str(v) for v in rows["image"]], [str(v) for v in rows["prompt"]]
    index: dict[str, int] = {}
    text_index = [index.setdefault(prompt, len(index)) for prompt in prompts]
    contrast_index = []
    for image, prompt in zip(images, prompts, strict=True):
        others = grammar.perturb(grammar.parse(prompt), num_prompts - 1, _seed_of(seed, image, prompt))
        contrast_index.append([index.setdefault(other.text, len(index)) for other in others])
    return RewardData(
        image_ND=image_features(images),
        text_KD=text_features(list(index)),
        text_index_N=torch.tensor(text_index),
        label_N=torch.tensor(labels),
        weight_N=torch.tensor([float(weight) for weight in rows["weight"]]),
        category_N=tuple(str(category) for category in rows["category"]),
        contrast_index_NM=torch.tensor(contrast_index),
    )


def require_both_labels(labels: Sequence[float], where: str, unlabelled: int = 0) -> None:
    """Raises FeedbackError unless there are good and bad images: from one kind alone nothing is learned."""
    good = sum(label > GOOD for label in labels)
    bad = len(labels) - good
    if good and bad:
        return
    aside = f" ({unlabelled} more have no majority, or only skips)" if unlabelled else ""
    if not labels:
        raise FeedbackError(f"{where} holds no labelled image{aside}: judge some images first")
    kind, other = ("good", "bad") if good else ("bad", "good")
    raise FeedbackError(
        f"{where} holds {len(labels)} {kind} images and no {other} one{aside}: a reward cannot be learned "
        "from one kind alone; judge more images, or other ones"
    )


def _seed_of(seed: int, image: str, prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(f"contrast {seed} {image} {prompt}".encode()).digest()[:7], "big")
