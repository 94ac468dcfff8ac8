"""The loop: look, decide, act. Harm ends first and is recorded then; a promotion is recorded first."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from accord.errors import AccordError
from accord.registry.registry import CANARY, CHAMPION, Registry
from accord.registry.rollout import Action, Decision, Observed, RolloutPolicy, decide
from services.rollout.metrics import RolloutMetrics
from services.rollout.serving import Serving

logger = logging.getLogger("accord.rollout")

BY = "services.rollout"
COMPARE_EVERY_S = 60.0


class Sources(Protocol):
    """What the decision is made from."""

    def digests(self) -> dict[str, str]:
        """alias -> digest of the loaded diffusion models. Raises AccordError."""

    def observe(self, champion: str, canary: str) -> tuple[Observed, Observed]:
        """Of two digests. Raises AccordError."""


class Rollout:
    """Watches one application. A restart begins to count the canary's age again."""

    def __init__(
        self,
        policy: RolloutPolicy,
        sources: Sources,
        serving: Serving,
        registry: Registry | None = None,
        model: str = "",
        clock: Callable[[], float] = time.monotonic,
        metrics: RolloutMetrics | None = None,
    ) -> None:
        """`model` is the name in the registry."""
        self._metrics = metrics or RolloutMetrics()
        self._compared = -COMPARE_EVERY_S
        self._policy, self._sources, self._serving = policy, sources, serving
        self._registry, self._model, self._clock = registry, model, clock
        self._watched, self._since = "", 0.0
        self._said = ""

    def run(self, every_s: float, stop: threading.Event) -> None:
        """Until `stop` is set. What does not answer is asked again."""
        while not stop.is_set():
            try:
                self.step()
                self._compare()
            except AccordError as error:
                self._metrics.looks.labels("failed").inc()
                self._say(logging.WARNING, f"nothing was decided: {error}")
            else:
                self._metrics.looks.labels("looked").inc()
                self._metrics.last_look.set_to_current_time()
            stop.wait(every_s)

    def step(self) -> Decision | None:
        """Looks once, and acts; None without a loaded canary.

        Raises:
            AccordError: something does not answer; what serves is as it was, or as was decided.
        """
        configs = self._serving.read()
        canary = configs.canary
        digests = self._sources.digests()
        if canary is None or not {canary.model, configs.champion} <= set(digests):
            self._watched = ""
            self._say(
                logging.INFO, "there is no canary" if canary is None else "the canary is not loaded yet"
            )
            return None
        digest = digests[canary.model]
        if self._watched != digest:
            self._watched, self._since = digest, self._clock()
        seen = self._sources.observe(digests[configs.champion], digest)
        decision = decide(self._policy, *seen, self._clock() - self._since)
        if decision.action is Action.TAKE_OUT:
            self._serving.write(configs.without_canary())
            self._metrics.moves.labels(Action.TAKE_OUT.value).inc()
            self._say(logging.WARNING, f"took out the canary {canary.model} {digest[:12]}: {decision.why}")
            self._record_rollback(digest, decision.why)
        elif decision.action is Action.PROMOTE:
            self._record_promotion(digest, decision.why)
            self._serving.write(configs.promoted())
            self._metrics.moves.labels(Action.PROMOTE.value).inc()
            self._say(logging.WARNING, f"{canary.model} {digest[:12]} is champion: {decision.why}")
        else:
            self._say(logging.INFO, f"watching {canary.model} {digest[:12]}: {decision.why}")
        return decision

    def _compare(self) -> None:
        """Now and then: does the registry's champion serve? A restart by an old config brings an old one."""
        if self._registry is None or self._clock() - self._compared < COMPARE_EVERY_S:
            return
        self._compared = self._clock()
        alias = self._serving.read().champion
        digest = self._sources.digests().get(alias)
        champion = [one for one in self._registry.versions(self._model) if CHAMPION in one.aliases]
        disagrees = bool(champion) and champion[0].digest != digest
        self._metrics.disagrees.set(disagrees)
        if disagrees:
            logger.warning(
                "%s serves, and %s is champion of the registry: promote it with --serve, or roll back",
                alias,
                champion[0],
            )

    def _record_promotion(self, digest: str, why: str) -> None:
        """Raises RegistryError when the gate does not pass: then it does not serve either."""
        if self._registry is not None:
            self._registry.promote(digest, by=BY, why=why, alias=CHAMPION)

    def _record_rollback(self, digest: str, why: str) -> None:
        if self._registry is None:
            return
        holder = [one for one in self._registry.versions(self._model) if CANARY in one.aliases]
        if any(one.digest == digest for one in holder):
            self._registry.rollback(self._model, by=BY, why=why, alias=CANARY)

    def _say(self, level: int, text: str) -> None:
        """Once, however often it is so."""
        if text != self._said:
            self._said = text
            logger.log(level, "%s", text)
