"""r(image, prompt) as a deployment: requests are batched, and one thread uses the model."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ray import serve

from accord.cpu import use_cpu
from accord.prompts import load_grammar
from services.config import RewardSettings
from services.metrics import RewardMetrics
from services.models import Catalogue, Missing, Shelf, as_table
from services.reward.messages import ScoreRequest, Scores

if TYPE_CHECKING:  # torch and open_clip take seconds to import, and who deploys needs neither
    from services.reward.scoring import ServedReward

SWEEP_S = 1.0


class Reward:
    """A replica. `settings` is a dumped RewardSettings."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from accord.reward.model import open_reward
        from services.reward.scoring import Perturbations, ServedReward, score_each

        self._settings = RewardSettings.model_validate(settings)
        self._score_each = score_each
        use_cpu(self._settings.threads)
        self._worker = ThreadPoolExecutor(1, "reward")
        self._loader = ThreadPoolExecutor(1, "reward loader")
        self._perturbations = Perturbations(load_grammar(self._settings.grammar), self._settings.num_prompts)
        self._shelf: Shelf[ServedReward] = Shelf(
            lambda directory: ServedReward(open_reward(directory, self._settings.device)),
            lambda served: served.model.digest,
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
        with self._shelf.use(request.digest) as served:
            if served is None:
                return Missing(request.digest)
            result: Scores | None = await self._score_batch((served, request))
            if result is None:
                raise RuntimeError("the pairs could not be scored; the replica's log says why")
            return result

    async def process_id(self) -> int:
        """Of this replica, for operators and for tests that kill it."""
        return os.getpid()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def _score_batch(self, items: list[tuple[ServedReward, ScoreRequest]]) -> list[Scores | None]:
        begun, count = time.monotonic(), sum(len(request.images) for _, request in items)
        scores = await asyncio.get_running_loop().run_in_executor(
            self._worker, self._score_each, items, self._perturbations
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
