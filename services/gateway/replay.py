"""An image once more, from its manifest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from accord.v1 import generation_pb2 as pb
from services.gateway.backend import Backend, ModelGone, Models
from services.gateway.errors import Reason, RequestError
from services.gateway.generate import Candidate, sample_spec, with_size
from services.gateway.validation import Sampling
from services.reward.messages import ScoreRequest

T = TypeVar("T")

TRIES = 3


async def replay(
    backend: Backend, asked: pb.ImageManifest, sampling: Sampling
) -> tuple[Candidate, pb.ImageManifest]:
    """The image of a manifest, drawn and scored, and its manifest, which names the reward model that scored
    it now.

    Raises RequestError, MODEL_NOT_FOUND when no loaded model has its digest.
    """
    for _ in range(TRIES):
        model = await backend.resolve_digest(asked.model_digest)
        reward = await backend.resolve_reward_or_default(asked.reward_model_digest)
        sized = with_size(sampling, Models(model, reward), "manifest")
        try:
            pixels = await backend.draw(sample_spec(model.digest, sized, asked.seed, asked.candidate))
            scores = await backend.score(ScoreRequest(reward.digest, [pixels], [sized.prompt]))
        except ModelGone:
            await backend.refresh()
            continue
        manifest = pb.ImageManifest()
        manifest.CopyFrom(asked)
        manifest.reward_model_digest = reward.digest
        return Candidate(asked.candidate, pixels, scores.rewards[0], scores.similarities[0]), manifest
    raise RequestError(
        Reason.BACKEND_UNAVAILABLE, "the models are being changed; try again soon", retry_after_s=2.0
    )


async def within(timeout_s: float, work: Awaitable[T], advice: str) -> T:
    """The result of `work`. Raises RequestError when it takes longer than the server's limit."""
    try:
        return await asyncio.wait_for(work, timeout_s)
    except TimeoutError:
        message = f"not done after {timeout_s:.0f} s, the server's limit: {advice}"
        raise RequestError(Reason.REQUEST_TIMEOUT, message) from None
