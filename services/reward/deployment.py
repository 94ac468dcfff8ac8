"""r(image, prompt) as a deployment: requests are batched, and one thread uses the model."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import serve

from accord.artifacts import content_digest
from accord.config import resolve_path
from accord.cpu import use_cpu
from accord.errors import PromptError
from accord.prompts import Grammar, load_grammar
from accord.reward import features
from accord.reward.features import ClipEncoder, TextCache
from accord.reward.head import RewardHead
from accord.reward.model import KIND, RewardModel
from accord.reward.textnorm import contrast_prompts
from services.config import RewardSettings
from services.metrics import RewardMetrics
from services.models import Catalogue, Missing, Shelf, as_table

Pixels = NDArray[np.uint8]
logger = logging.getLogger(__name__)
SWEEP_S = 1.0


@dataclass(frozen=True)
class ScoreRequest:
    """Images (HWC, any sizes) with the prompt of each, to be scored by the model of this digest."""

    digest: str
    images: Sequence[Pixels]
    prompts: Sequence[str]
    probability: bool = False


@dataclass(frozen=True)
class Scores:
    """One number a pair; a probability is None when the prompt has no perturbations."""

    rewards: list[float]
    similarities: list[float]
    probabilities: list[float | None]


class Judge:
    """A reward model, and what it knows of the prompts that it was asked about last."""

    def __init__(self, model: RewardModel, text_cache_size: int = 16384) -> None:
        self.model, self.texts = model, TextCache(model.encoder, text_cache_size)


class Reward:
    """A replica. `settings` is a dumped RewardSettings."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = RewardSettings.model_validate(settings)
        use_cpu(self._settings.threads)
        self._worker = ThreadPoolExecutor(1, "reward")
        self._loader = ThreadPoolExecutor(1, "reward loader")
        self._perturbations = Perturbations(load_grammar(self._settings.grammar), self._settings.num_prompts)
        self._shelf: Shelf[Judge] = Shelf(
            lambda directory: Judge(load_reward(directory, self._settings.device)),
            lambda judge: judge.model.digest,
            self._loader,
            self._settings.retire_after_s,
        )
        batch: Any = self._score_batch
        batch.set_max_batch_size(self._settings.max_batch_size)
        batch.set_batch_wait_timeout_s(self._settings.batch_wait_s)
        self._sweeping: asyncio.Task[None] | None = None
        self._metrics = RewardMetrics()
        self._failures = 0

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        await self._shelf.apply(as_table(user_config))
        if self._sweeping is None:
            self._sweeping = asyncio.create_task(self._sweep())

    async def catalogue(self) -> Catalogue:
        return self._shelf.catalogue()

    async def score(self, request: ScoreRequest) -> Scores | Missing:
        with self._shelf.use(request.digest) as judge:
            if judge is None:
                return Missing(request.digest)
            result: Scores | None = await self._score_batch((judge, request))
            if result is None:
                raise RuntimeError("the pairs could not be scored; the replica's log says why")
            return result

    async def process_id(self) -> int:
        """Of this replica, for operators and for tests that kill it."""
        return os.getpid()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def _score_batch(self, items: list[tuple[Judge, ScoreRequest]]) -> list[Scores | None]:
        begun, count = time.monotonic(), sum(len(request.images) for _, request in items)
        scores = await asyncio.get_running_loop().run_in_executor(
            self._worker, score_each, items, self._perturbations
        )
        self._metrics.images.inc(count)
        self._metrics.batch.observe(count)
        self._metrics.seconds.observe(time.monotonic() - begun)
        return scores

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            await self._shelf.sweep()
            if self._shelf.failures > self._failures:
                self._metrics.load_failures.inc(self._shelf.failures - self._failures)
                self._failures = self._shelf.failures


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


def load_reward(directory: str, device: str = "cpu") -> RewardModel:
    """A reward model's directory; or that of a CLIP, with an adapter that has learned nothing: a reward that
    grows with the similarity of image and prompt."""
    path: Path = resolve_path(directory)
    if not (path / features.CONFIG_NAME).is_file():
        return RewardModel.load(path, device=device)
    encoder = ClipEncoder(directory, device)
    head = RewardHead(encoder.dim, combine="adapter")
    return RewardModel(head, encoder, digest=content_digest(KIND, {"clip": encoder.digest}))


def score_each(
    items: Sequence[tuple[Judge, ScoreRequest]], perturbations: Perturbations
) -> list[Scores | None]:
    """Scores of all requests. Should a batch fail, each goes alone: None for the one that is to blame."""
    try:
        return [*score_all(items, perturbations)]
    except Exception:
        logger.exception("scoring %d requests together failed", len(items))
        if len(items) == 1:
            return [None]
    return [scores for item in items for scores in score_each([item], perturbations)]


def score_all(items: Sequence[tuple[Judge, ScoreRequest]], perturbations: Perturbations) -> list[Scores]:
    """Scores of all requests; those of one model go through it together."""
    scores: dict[int, Scores] = {}
    for digest in dict.fromkeys(request.digest for _, request in items):
        rows = [row for row, (_, request) in enumerate(items) if request.digest == digest]
        judge = items[rows[0]][0]
        images = [image for row in rows for image in items[row][1].images]
        prompts = [prompt for row in rows for prompt in items[row][1].prompts]
        asked = [items[row][1].probability for row in rows for _ in items[row][1].prompts]
        whole = _score(judge, images, prompts, asked, perturbations)
        start = 0
        for row in rows:
            end = start + len(items[row][1].images)
            scores[row] = Scores(
                whole.rewards[start:end], whole.similarities[start:end], whole.probabilities[start:end]
            )
            start = end
    return [scores[row] for row in range(len(items))]


def _score(
    judge: Judge,
    images: Sequence[Pixels],
    prompts: Sequence[str],
    asked: Sequence[bool],
    perturbations: Perturbations,
) -> Scores:
    model = judge.model
    image_BD = model.encoder.image_features(images)
    wanted = {prompt for prompt, want in zip(prompts, asked, strict=True) if want}
    others = {prompt: perturbations.of(prompt) for prompt in wanted}
    texts = features.unique([*prompts, *(text for several in others.values() for text in several)])
    rows = {text: row for row, text in enumerate(texts)}
    text_KD = judge.texts.text_features(texts)
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
