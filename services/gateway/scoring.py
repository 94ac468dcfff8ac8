"""One request for scores: its pairs in parts, all by one reward model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from accord.v1 import reward_pb2
from services.config import Limits
from services.gateway.backend import Backend, ModelGone
from services.gateway.errors import Reason, RequestError
from services.gateway.replay import within
from services.reward.messages import ScoreRequest, Scores

PART = 64
TRIES = 3


async def score(
    backend: Backend,
    request: reward_pb2.ScoreImagesRequest,
    images: Sequence[NDArray[np.uint8]],
    request_id: str,
    limits: Limits,
) -> reward_pb2.ScoreImagesResponse:
    """Scores `images` (HWC), one a pair of the request. Raises RequestError."""
    prompts = [pair.prompt for pair in request.pairs]
    for _ in range(TRIES):
        model = await backend.resolve_reward(request.reward_model)
        parts = [
            ScoreRequest(model.digest, images[i : i + PART], prompts[i : i + PART], probability=True)
            for i in range(0, len(prompts), PART)
        ]
        tasks = [asyncio.create_task(backend.score(part)) for part in parts]
        try:
            scored = await within(limits.request_timeout_s, asyncio.gather(*tasks), "send fewer pairs")
        except ModelGone:
            await backend.refresh()
            continue
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        scores = [message for part in scored for message in messages(part)]
        return reward_pb2.ScoreImagesResponse(
            request_id=request_id, scores=scores, reward_model_digest=model.digest
        )
    raise RequestError(
        Reason.BACKEND_UNAVAILABLE, "the models are being changed; try again soon", retry_after_s=2.0
    )


def messages(scores: Scores) -> list[reward_pb2.Score]:
    return [
        reward_pb2.Score(reward=reward, clip_similarity=similarity, prompt_probability=probability)
        for reward, similarity, probability in zip(
            scores.rewards, scores.similarities, scores.probabilities, strict=True
        )
    ]
