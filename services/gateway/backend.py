"""Calls to the deployments behind the gateway: models by name, and retries that no client sees.

Drawing depends on nothing but the request, and scoring on nothing but the pixels, so a call whose replica
died is simply made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray import exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from accord.diffusion.specs import SampleSpec
from services.gateway.errors import Reason, RequestError
from services.generation.messages import Busy, Drawn, Outcome, Refused, Steps
from services.metrics import GatewayMetrics
from services.models import Catalogue, Loaded, Missing
from services.reward.messages import ScoreRequest, Scores

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

REFRESH_S = 1.0
CATALOGUE_TIMEOUT_S = 5.0
FIRST_CATALOGUE_S = 30.0
MISSING_S = 2.0
"""How long a model that a replica lacks is asked for again: another replica may have it, or this one soon."""
DIED = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.TaskCancelledError,
    exceptions.RaySystemError,
    RequestCancelledError,
)


class ModelGone(Exception):  # noqa: N818 - a state of affairs
    """No replica has the model any longer: the request begins again with what its name means now."""


@dataclass(frozen=True)
class Models:
    """The two models of one request: no answer has images or rewards of others."""

    diffusion: Loaded
    reward: Loaded


class Backend:
    """Both deployments, as one gateway replica sees them."""

    def __init__(self, generation: Any, reward: Any, metrics: GatewayMetrics) -> None:
        self._generation, self._reward, self.metrics = generation, reward, metrics
        self._catalogues: dict[str, Catalogue] = {}
        self._known = asyncio.Event()
        self._refreshing: asyncio.Task[None] | None = None
        self.max_attempts = 8

    def start(self) -> None:
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh_forever())

    @property
    def ready(self) -> bool:
        return self._known.is_set()

    async def catalogues(self) -> tuple[Catalogue, Catalogue]:
        """Of diffusion and reward models. Raises RequestError while no replica has told any."""
        if not self.ready:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._known.wait(), FIRST_CATALOGUE_S)
        if not self.ready:
            raise RequestError(Reason.NOT_READY, "no model is loaded yet; try again soon", retry_after_s=2.0)
        return self._catalogues["generation"], self._catalogues["reward"]

    async def resolve(self, model: str, reward_model: str) -> Models:
        """By alias or digest; empty means the default. Raises RequestError for a name that means nothing."""
        generation, reward = await self.catalogues()
        return Models(
            _found(generation, model, "spec.model", "diffusion"),
            _found(reward, reward_model, "spec.reward_model", "reward"),
        )

    async def has_model(self, name: str) -> bool:
        """Whether a diffusion model of this alias or digest is loaded."""
        generation, _ = await self.catalogues()
        return generation.find(name) is not None

    async def resolve_reward(self, name: str) -> Loaded:
        _, reward = await self.catalogues()
        return _found(reward, name, "reward_model", "reward")

    async def resolve_reward_or_default(self, digest: str) -> Loaded:
        """The reward model with this digest if there is one, else the default."""
        _, reward = await self.catalogues()
        return reward.find(digest) or _found(reward, "", "reward_model", "reward")

    async def resolve_digest(self, digest: str) -> Loaded:
        """The diffusion model with this digest."""
        generation, _ = await self.catalogues()
        found = generation.find(digest) if digest else None
        if found is None or found.digest != digest:
            raise _not_found("manifest.model_digest", digest, "diffusion")
        return found

    async def refresh(self) -> None:
        """Asks a replica of each deployment what it has loaded; keeps what is known when none answers in
        time."""
        await asyncio.gather(
            self._refresh("generation", self._generation), self._refresh("reward", self._reward)
        )
        if len(self._catalogues) == 2:
            self._known.set()

    async def draw(
        self, spec: SampleSpec, on_steps: Callable[[int], None] | None = None
    ) -> NDArray[np.uint8]:
        """The candidate's pixels (HWC). Raises ModelGone, RequestError."""
        if on_steps is None:
            outcome = await self._persist(
                "generation", lambda: _cancelling(self._generation.draw.remote(spec))
            )
        else:
            outcome = await self._persist("generation", lambda: self._watched(spec, on_steps))
        if isinstance(outcome, Refused):
            raise RequestError(Reason.FIELD_INVALID, outcome.message)
        assert isinstance(outcome, Drawn)
        return outcome.image

    async def score(self, request: ScoreRequest) -> Scores:
        """Raises ModelGone, RequestError."""
        scores = await self._persist("reward", lambda: _cancelling(self._reward.score.remote(request)))
        assert isinstance(scores, Scores)
        return scores

    async def _watched(self, spec: SampleSpec, on_steps: Callable[[int], None]) -> Outcome:
        stream = self._generation.options(stream=True).draw_watched.remote(spec)
        try:
            async for event in stream:
                if isinstance(event, Steps):
                    on_steps(event.done)
                else:
                    outcome: Outcome = event
                    return outcome
        except asyncio.CancelledError:
            stream.cancel()
            raise
        raise exceptions.WorkerCrashedError  # a stream that ends without an outcome

    async def _persist(self, deployment: str, call: Callable[[], Awaitable[T]]) -> T:
        """The result of `call`, made again when its replica died, is full, or has not (yet) loaded the
        model."""
        attempt, missing_since = 0, None
        while True:
            try:
                result = await call()
            except asyncio.CancelledError:
                raise
            except BackPressureError:
                cause = "queue_full"
            except DeploymentUnavailableError:
                raise _unavailable(deployment) from None
            except DIED as error:
                cause = "replica_died"
                logger.warning("a call to %s is made again: %s", deployment, type(error).__name__)
            else:
                if isinstance(result, Missing):
                    missing_since = missing_since or time.monotonic()
                    if time.monotonic() - missing_since > MISSING_S:
                        raise ModelGone(result.digest)
                    cause = "model_missing"
                elif isinstance(result, Busy):
                    cause = "queue_full"
                else:
                    return result
            self.metrics.retries.inc(tags={"deployment": deployment, "cause": cause})
            attempt += cause == "replica_died"
            if attempt >= self.max_attempts:
                raise _unavailable(deployment)
            await asyncio.sleep(min(1.0, 0.05 * 2**attempt) * random.uniform(0.5, 1.5))

    async def _refresh(self, name: str, handle: Any) -> None:
        try:
            self._catalogues[name] = await asyncio.wait_for(
                _cancelling(handle.catalogue.remote()), CATALOGUE_TIMEOUT_S
            )
        except Exception as error:
            logger.info("%s did not tell its models: %s", name, type(error).__name__)

    async def _refresh_forever(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_S)


async def _cancelling(response: Any) -> Any:
    """The response's value; when this is cancelled, so is the call."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


def _found(catalogue: Catalogue, name: str, field: str, kind: str) -> Loaded:
    model = catalogue.find(name)
    if model is None:
        raise _not_found(field, name, kind)
    return model


def _not_found(field: str, name: str, kind: str) -> RequestError:
    return RequestError(
        Reason.MODEL_NOT_FOUND,
        f"no loaded {kind} model has the alias or digest {name[:80]!r}; ListModels tells what is loaded",
        {"field": field, "kind": kind},
    )


def _unavailable(deployment: str) -> RequestError:
    return RequestError(
        Reason.BACKEND_UNAVAILABLE,
        f"{deployment} cannot be reached now; try again soon",
        {"deployment": deployment},
        retry_after_s=2.0,
    )
