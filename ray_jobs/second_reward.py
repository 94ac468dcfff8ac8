"""A reward that fine-tuning was not given, measured on what it made: does it rise too?"""

from __future__ import annotations

import pandas as pd

from accord.config import resolve_path
from accord.evaluation.config import SECOND_REWARDS
from accord.images import ImageFolder
from accord.recipe import Recipe
from ray_jobs import inputs
from ray_jobs.progress import bar

BATCH_SIZE = 64


def digests(recipe: Recipe) -> dict[str, str]:
    """Of the model that `evaluate.second_reward` names; none where every evaluation measures it anyway.

    Raises:
        ArtifactError: there is no such directory.
    """
    name = recipe.evaluate.second_reward
    if name in SECOND_REWARDS:
        return {}
    from accord.reward.model import KIND  # open_clip takes seconds to import

    return {"second_reward": inputs.digest_of(resolve_path(name), KIND)}


def score(recipe: Recipe, rows: pd.DataFrame, folder: ImageFolder) -> list[float]:
    """The named model's reward of each row's image for its prompt; of a CLIP alone, their similarity.

    Raises:
        ArtifactError: the directory holds neither, or is damaged.
    """
    import torch

    from accord.reward.model import open_reward

    directory = resolve_path(recipe.evaluate.second_reward)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = open_reward(directory, device)
    found: list[float] = []
    with bar("Scoring by the second reward", len(rows), "images") as progress:
        for part in inputs.batches(list(inputs.records(rows)), BATCH_SIZE):
            images = [folder.load(row.image) for row in part]
            prompts = [row.prompt for row in part]
            if model.learned:
                found += model.score(images, prompts).tolist()
            else:
                similar = model.encoder.image_features(images) * model.encoder.text_features(prompts)
                found += similar.sum(dim=1).tolist()
            progress.update(len(found))
    return found
