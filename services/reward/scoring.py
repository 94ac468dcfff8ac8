"""What a reward replica computes: scores of requests of several models, each model's together."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch

from accord.errors import PromptError
from accord.prompts import Grammar
from accord.reward.features import TextCache, unique
from accord.reward.model import RewardModel
from accord.reward.textnorm import contrast_prompts
from services.reward.messages import Pixels, ScoreRequest, Scores

logger = logging.getLogger(__name__)


class ServedReward:
    """A reward model, and what it knows of the prompts that it was asked about last."""

    def __init__(self, model: RewardModel, text_cache_size: int = 16384) -> None:
        self.model, self.texts = model, TextCache(model.encoder, text_cache_size)


class Perturbations:
    """Prompts that say something else than a prompt: what equation 1 compares it with."""

    def __init__(self, grammar: Grammar, num_prompts: int) -> None:
        self._grammar, self._count = grammar, num_prompts - 1
        self._known = functools.lru_cache(maxsize=4096)(self._find)

    def of(self, text: str) -> tuple[str, ...]:
        """As many as there are, at most num_prompts - 1; none for a text outside the grammar."""
        return self._known(text)

    def _find(self, text: str) -> tuple[str, ...]:
        try:
            prompt = self._grammar.parse(text)
        except PromptError:
            return ()
        return contrast_prompts(self._grammar, prompt, self._count)


def score_each(
    items: Sequence[tuple[ServedReward, ScoreRequest]], perturbations: Perturbations
) -> list[Scores | None]:
    """Scores of all requests. Should a batch fail, each goes alone: None for the one that is to blame."""
    try:
        return [*score_all(items, perturbations)]
    except Exception:
        logger.exception("scoring %d requests together failed", len(items))
        if len(items) == 1:
            return [None]
    return [scores for item in items for scores in score_each([item], perturbations)]


def score_all(
    items: Sequence[tuple[ServedReward, ScoreRequest]], perturbations: Perturbations
) -> list[Scores]:
    """Scores of all requests; those of one model go through it together."""
    scores: dict[int, Scores] = {}
    for digest in dict.fromkeys(request.digest for _, request in items):
        rows = [row for row, (_, request) in enumerate(items) if request.digest == digest]
        served = items[rows[0]][0]
        images = [image for row in rows for image in items[row][1].images]
        prompts = [prompt for row in rows for prompt in items[row][1].prompts]
        asked = [items[row][1].probability for row in rows for _ in items[row][1].prompts]
        whole = _score(served, images, prompts, asked, perturbations)
        start = 0
        for row in rows:
            end = start + len(items[row][1].images)
            scores[row] = Scores(
                whole.rewards[start:end], whole.similarities[start:end], whole.probabilities[start:end]
            )
            start = end
    return [scores[row] for row in range(len(items))]


def _score(
    served: ServedReward,
    images: Sequence[Pixels],
    prompts: Sequence[str],
    asked: Sequence[bool],
    perturbations: Perturbations,
) -> Scores:
    model = served.model
    image_BD = model.encoder.image_features(images)
    wanted = {prompt for prompt, want in zip(prompts, asked, strict=True) if want}
    others = {prompt: perturbations.of(prompt) for prompt in wanted}
    texts = unique([*prompts, *(text for several in others.values() for text in several)])
    rows = {text: row for row, text in enumerate(texts)}
    text_KD = served.texts.text_features(texts)
    text_BD = text_KD[[rows[prompt] for prompt in prompts]]
    rewards = model.score_features(image_BD, text_BD).cpu().tolist()
    similarities = (image_BD * text_BD).sum(-1).clamp(-1, 1).cpu().tolist()
    probabilities: list[float | None] = [None] * len(prompts)
    of_count: dict[int, list[int]] = {}
    for index, (prompt, want) in enumerate(zip(prompts, asked, strict=True)):
        if want and others[prompt]:
            of_count.setdefault(len(others[prompt]), []).append(index)
    for indices in of_count.values():
        choices = torch.tensor([[rows[text] for text in (prompts[i], *others[prompts[i]])] for i in indices])
        found_B = model.classify(image_BD[indices], text_KD[choices])[:, 0]
        for index, probability in zip(indices, found_B.tolist(), strict=True):
            probabilities[index] = probability
    return Scores(rewards, similarities, probabilities)
