"""What preference objectives learn from: a run's judged images with their labels, or pairs of images of which
people preferred one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from accord.errors import FeedbackError
from accord.feedback.preferences import Pair, compared_pairs, judged_pairs
from accord.feedback.snapshot import load_snapshot, load_snapshot_comparisons
from accord.recipe import Recipe
from ray_jobs import inputs

if TYPE_CHECKING:  # takes seconds to import
    import torch

_KEY = ["image", "prompt"]


@dataclass(frozen=True)
class Preferences:
    """`images`: columns image, prompt and reward (0 where the run has not scored it). `tensors` are further
    fields of FinetuneData, and `note` says in the model's manifest what they were made from.
    """

    images: pd.DataFrame
    tensors: dict[str, torch.Tensor]
    note: dict[str, Any]


def load(recipe: Recipe, run_dir: Path, scores: pd.DataFrame) -> Preferences:
    """By the recipe's objective, from the run's snapshot. `scores`: columns image, prompt, reward.

    diffusion_dpo takes comparisons where there are any that are decided, else pairs of a good and a bad image
    of one prompt.

    Raises FeedbackError when people said too little, or images are not of one size.
    """
    snapshot = load_snapshot(run_dir / "snapshot")
    if recipe.finetune.objective == "diffusion_kto":
        return _labelled(snapshot, scores)
    pairs, source = compared_pairs(load_snapshot_comparisons(run_dir / "snapshot")), "comparisons"
    if not pairs:
        pairs, source = judged_pairs(snapshot, recipe.seed), "labels"
    return _paired(run_dir, pairs, source, scores)


def _labelled(snapshot: pd.DataFrame, scores: pd.DataFrame) -> Preferences:
    import torch

    decided = snapshot[snapshot["label"].notna() & (snapshot["weight"] > 0)]
    rows = _scored(decided[[*_KEY, "label", "weight"]], scores)
    label_N = torch.tensor(((2 * rows["label"] - 1) * rows["weight"]).to_numpy(), dtype=torch.float32)
    note = {"from": "labels", "good": int((label_N > 0).sum()), "bad": int((label_N < 0).sum())}
    return Preferences(rows[[*_KEY, "reward"]], {"label_N": label_N}, note)


def _paired(run_dir: Path, pairs: list[Pair], source: str, scores: pd.DataFrame) -> Preferences:
    import torch

    named = dict.fromkeys(key for prompt, a, b in pairs for key in ((a, prompt), (b, prompt)))
    rows = _scored(pd.DataFrame(list(named), columns=_KEY), scores)
    place = {key: row for row, key in enumerate(zip(rows["image"], rows["prompt"], strict=True))}
    _check_sizes(run_dir, rows, scores)
    pair_Q2 = torch.tensor([[place[a, prompt], place[b, prompt]] for prompt, a, b in pairs], dtype=torch.long)
    tensors = {"pair_Q2": pair_Q2.view(-1, 2)}
    return Preferences(rows[[*_KEY, "reward"]], tensors, {"from": source, "pairs": len(pairs)})


def _scored(rows: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """With `reward`: 0 for images of elsewhere, for which it is not read either."""
    rewards = scores[[*_KEY, "reward"]].drop_duplicates(_KEY)
    return rows.merge(rewards, on=_KEY, how="left").fillna({"reward": 0.0})


def _check_sizes(run_dir: Path, rows: pd.DataFrame, scores: pd.DataFrame) -> None:
    """Images of elsewhere may be of any size; those of the run are of one."""
    known = set(scores["image"])
    foreign = [digest for digest in dict.fromkeys(rows["image"]) if digest not in known]
    if not foreign:
        return
    folder = inputs.image_folder(run_dir)
    own = next((digest for digest in rows["image"] if digest in known), foreign[0])
    wanted = folder.load(own).shape[:2]
    for digest in foreign:
        size = folder.load(digest).shape[:2]
        if size != wanted:
            raise FeedbackError(
                f"{folder.path(digest)} has {size[1]} x {size[0]} pixels, but others that were compared have "
                f"{wanted[1]} x {wanted[0]}; fine-tuning needs one size: import them again with "
                "`accord feedback import --size`"
            )
