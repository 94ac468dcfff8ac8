"""Who may do how much at once: rates and shares, the same for all replicas of the gateway.

`FairLimiter` is the arithmetic, with the time given to it; `Limiter` is one small deployment that holds it;
and `Admissions` is what a gateway replica asks. A lease names what a request takes up; a gateway renews its
leases, and those of one that died run out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from services.config import Limits, RateLimit

logger = logging.getLogger("ray.serve")

Resource = Literal["candidates", "pairs"]
LEASE_S = 10.0
RENEW_S = 2.0
ACTIVE_S = 2.0
"""A token counts as competing for so long after it last asked, or was told to ask again."""
REFUSED_S = 0.05
"""For so long a gateway repeats a refusal without asking: a flood then costs the limiter nothing."""
ASK_S = 1.0
"""After so long without an answer from the limiter, a gateway decides alone."""


@dataclass(frozen=True)
class Refusal:
    """Why not, and when it may be worth asking again."""

    reason: Literal["RATE_LIMITED", "CONCURRENCY_LIMITED", "CAPACITY_EXHAUSTED"]
    retry_after_s: float


@dataclass
class _Lease:
    gateway: str
    token: str
    resource: Resource
    cost: int
    begun: float
    expires: float


@dataclass
class _Bucket:
    """A token bucket: `level` requests may come at once."""

    level: float
    at: float


@dataclass
class _Resource:
    total: int = 0
    by_token: dict[str, int] = field(default_factory=dict)
    hold_s: float = 1.0
    """Moving average of how long a lease is held."""


class FairLimiter:
    """Admits a request when its token's rate, its token's own limit and its fair share of the whole allow it.

    The share of a token is capacity x weight / weights of all tokens that are competing now. So a token that
    is alone may use everything, and gives way as soon as another one asks. A request that is larger than the
    share is admitted when its token has nothing else running.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._leases: dict[str, _Lease] = {}
        self._buckets: dict[str, _Bucket] = {}
        self._resources: dict[str, _Resource] = {"candidates": _Resource(), "pairs": _Resource()}
        self._competing: dict[tuple[str, str], float] = {}  # until when, without another request

    def configure(self, limits: Limits) -> None:
        self._limits = limits

    def in_use(self, resource: Resource) -> int:
        return self._resources[resource].total

    def admit(
        self, gateway: str, lease: str, token: str, resource: Resource, cost: int, now: float
    ) -> Refusal | None:
        """Takes `cost` of the resource for the token under the name `lease`, or says why not."""
        self._expire(now)
        limit = self._limit(token)
        wait_s = self._rate_wait(token, limit, now)
        if wait_s > 0:
            return Refusal("RATE_LIMITED", wait_s)
        state = self._resources[resource]
        self._competing[token, resource] = now + ACTIVE_S
        used = state.by_token.get(token, 0)
        own, capacity = self._bounds(limit, resource)
        if used and used + cost > own:
            return Refusal("CONCURRENCY_LIMITED", self._room_after(state, cost, own))
        share = capacity * limit.share / self._weights(resource, now)
        if state.total and (state.total + cost > capacity or (used and used + cost > share)):
            wait_s = self._room_after(state, cost, capacity)
            self._competing[token, resource] += wait_s  # it keeps its place while it waits as told
            return Refusal("CAPACITY_EXHAUSTED", wait_s)
        self._buckets[token].level -= 1
        self._take(lease, _Lease(gateway, token, resource, cost, now, now + LEASE_S))
        return None

    def release(self, lease: str, now: float) -> None:
        """Gives back what `admit` took; a second time does nothing."""
        held = self._leases.pop(lease, None)
        if held is None:
            return
        state = self._resources[held.resource]
        state.total -= held.cost
        state.by_token[held.token] -= held.cost
        if not state.by_token[held.token]:
            del state.by_token[held.token]
        state.hold_s += 0.1 * (now - held.begun - state.hold_s)

    def renew(self, gateway: str, leases: Mapping[str, tuple[str, Resource, int]], now: float) -> None:
        """Keeps a gateway's leases, which are all that it has; one that a restarted limiter lost is taken
        again."""
        for lease in [name for name, held in self._leases.items() if held.gateway == gateway]:
            if lease not in leases and now - self._leases[lease].begun > RENEW_S:
                self.release(lease, now)
        for lease, (token, resource, cost) in leases.items():
            if lease in self._leases:
                self._leases[lease].expires = now + LEASE_S
            else:
                self._take(lease, _Lease(gateway, token, resource, cost, now, now + LEASE_S))
        self._expire(now)

    def _take(self, name: str, lease: _Lease) -> None:
        if name in self._leases:  # a renewal came before the request to admit
            return
        self._leases[name] = lease
        state = self._resources[lease.resource]
        state.total += lease.cost
        state.by_token[lease.token] = state.by_token.get(lease.token, 0) + lease.cost

    def _expire(self, now: float) -> None:
        for name in [name for name, lease in self._leases.items() if lease.expires <= now]:
            self.release(name, now)

    def _limit(self, token: str) -> RateLimit:
        return self._limits.tokens.get(token, self._limits.default)

    def _bounds(self, limit: RateLimit, resource: Resource) -> tuple[int, int]:
        if resource == "candidates":
            return limit.concurrent_candidates, self._limits.capacity_candidates
        return limit.concurrent_pairs, self._limits.capacity_pairs

    def _rate_wait(self, token: str, limit: RateLimit, now: float) -> float:
        bucket = self._buckets.setdefault(token, _Bucket(limit.burst, now))
        bucket.level = min(limit.burst, bucket.level + (now - bucket.at) * limit.requests_per_second)
        bucket.at = now
        return max(0.0, (1 - bucket.level) / limit.requests_per_second)

    def _weights(self, resource: Resource, now: float) -> float:
        """Sum of the shares of all tokens that hold or lately asked for the resource."""
        self._competing = {key: until for key, until in self._competing.items() if now < until}
        holders = set(self._resources[resource].by_token)
        competing = holders | {token for token, asked in self._competing if asked == resource}
        return sum(self._limit(token).share for token in competing)

    @staticmethod
    def _room_after(state: _Resource, cost: int, capacity: int) -> float:
        """Seconds until about `cost` will have been given back, were leases held as long as they were
        lately."""
        return min(10.0, max(0.1, state.hold_s * min(1.0, cost / max(1, capacity))))


class Limiter:
    """The deployment of which there is one replica."""

    def __init__(self) -> None:
        self._fair = FairLimiter(Limits())

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        self._fair.configure(Limits.model_validate(user_config))

    async def admit(
        self, gateway: str, lease: str, token: str, resource: Resource, cost: int
    ) -> tuple[str, float] | None:
        refusal = self._fair.admit(gateway, lease, token, resource, cost, time.monotonic())
        return None if refusal is None else (refusal.reason, refusal.retry_after_s)

    async def release(self, lease: str) -> None:
        self._fair.release(lease, time.monotonic())

    async def renew(
        self, gateway: str, leases: dict[str, tuple[str, Resource, int]], limits: dict[str, Any]
    ) -> None:
        """The gateway's limits come along, so that a live change of them needs no second place."""
        self._fair.configure(Limits.model_validate(limits))
        self._fair.renew(gateway, leases, time.monotonic())

    async def in_use(self) -> dict[str, int]:
        self._fair.renew("", {}, time.monotonic())
        return {"candidates": self._fair.in_use("candidates"), "pairs": self._fair.in_use("pairs")}


class Admissions:
    """A gateway replica's side: asks the limiter, and decides alone, by the same rules, while that does not
    answer."""

    def __init__(self, limiter: Any, limits: Limits) -> None:
        self._limiter, self._limits = limiter, limits
        self._alone = FairLimiter(limits)
        self._gateway = uuid.uuid4().hex
        self._leases: dict[str, tuple[str, Resource, int]] = {}
        self._refused: dict[tuple[str, Resource], tuple[float, int, Refusal]] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._releasing: set[asyncio.Task[None]] = set()

    def configure(self, limits: Limits) -> None:
        """New limits; the limiter hears of them within RENEW_S. Needs a running event loop."""
        self._limits = limits
        self._alone.configure(limits)
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())

    @contextlib.asynccontextmanager
    async def admitted(self, token: str, resource: Resource, cost: int) -> AsyncIterator[Refusal | None]:
        """Holds `cost` of the resource for the token during the block, or yields why it may not."""
        until, refused_cost, refused = self._refused.get((token, resource), (0.0, 0, None))
        if refused is not None and time.monotonic() < until and cost >= refused_cost:
            yield refused
            return
        lease = uuid.uuid4().hex
        unknown = True  # whether it was admitted
        try:
            refusal = await self._ask(lease, token, resource, cost)
            unknown = False
            if refusal is None:
                self._leases[lease] = (token, resource, cost)  # not before: a renewal would take it
            else:
                until = time.monotonic() + min(REFUSED_S, refusal.retry_after_s)
                self._refused[token, resource] = (until, cost, refusal)
            yield refusal
        finally:
            if self._leases.pop(lease, None) is not None or unknown:
                self._alone.release(lease, time.monotonic())
                task = asyncio.create_task(self._release(lease))
                self._releasing.add(task)
                task.add_done_callback(self._releasing.discard)

    async def _ask(self, lease: str, token: str, resource: Resource, cost: int) -> Refusal | None:
        try:
            answer = await asyncio.wait_for(
                _value(self._limiter.admit.remote(self._gateway, lease, token, resource, cost)), ASK_S
            )
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.warning("the limiter does not answer (%s); deciding alone", type(error).__name__)
            return self._alone.admit(self._gateway, lease, token, resource, cost, time.monotonic())
        return None if answer is None else Refusal(*answer)

    async def _release(self, lease: str) -> None:
        with contextlib.suppress(Exception):  # it runs out by itself
            await asyncio.wait_for(_value(self._limiter.release.remote(lease)), 5 * ASK_S)

    async def _renew(self) -> None:
        while True:
            limits = self._limits.model_dump(mode="json")
            # It knows all that runs here, for when it has to decide.
            self._alone.renew(self._gateway, self._leases, time.monotonic())
            with contextlib.suppress(Exception):
                await asyncio.wait_for(
                    _value(self._limiter.renew.remote(self._gateway, dict(self._leases), limits)), ASK_S
                )
            await asyncio.sleep(RENEW_S)


async def _value(response: Any) -> Any:
    return await response
