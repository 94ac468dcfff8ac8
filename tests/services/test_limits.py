"""Rates and fair shares, with the time in our hands."""

from __future__ import annotations

import asyncio
import functools
from types import SimpleNamespace
from typing import Any

import pytest

from services.config import Limits, RateLimit
from services.gateway.limits import LEASE_S, Admissions, FairLimiter, Limiter


def limiter(capacity: int = 10, **limits: object) -> FairLimiter:
    return FairLimiter(
        Limits(default=RateLimit(**limits), capacity_candidates=capacity)  # type: ignore[arg-type]
    )


def test_a_token_that_is_alone_may_use_everything_and_no_more() -> None:
    fair = limiter(10)
    assert all(fair.admit("g", f"l{n}", "a", "candidates", 1, 0.0) is None for n in range(10))
    refusal = fair.admit("g", "one more", "a", "candidates", 1, 0.0)
    assert refusal is not None
    assert refusal.reason == "CAPACITY_EXHAUSTED"
    assert refusal.retry_after_s >= 0.1
    fair.release("l3", 1.0)
    assert fair.admit("g", "one more", "a", "candidates", 1, 1.0) is None


def test_two_tokens_end_with_equal_shares() -> None:
    fair = limiter(10, burst=10_000, requests_per_second=10_000)
    held: dict[str, list[str]] = {"a": [], "b": []}
    served = {"a": 0, "b": 0}
    for tick in range(400):
        now = tick * 0.05
        for token, eagerness in (("a", 9), ("b", 3)):  # one asks three times as often
            if tick < 20 and token == "b":
                continue
            for n in range(eagerness):
                lease = f"{token} {tick} {n}"
                if fair.admit("g", lease, token, "candidates", 1, now) is None:
                    held[token].append(lease)
                    served[token] += tick >= 100
        for token, leases in held.items():  # the oldest end
            for lease in leases[: max(1, len(leases) // 4)]:
                fair.release(lease, now)
            held[token] = leases[max(1, len(leases) // 4) :]
    shares = list(served.values())
    jain = sum(shares) ** 2 / (2 * sum(share**2 for share in shares))
    assert jain > 0.95, served


def test_a_token_that_waits_as_it_was_told_keeps_its_place() -> None:
    fair = limiter(10, burst=10_000, requests_per_second=10_000)
    for n in range(40):  # leases are held for a minute
        fair.admit("g", f"{n}", "a", "candidates", 1, 0.0)
        fair.renew("g", {f"{n}": ("a", "candidates", 1)}, 59.0)
        fair.release(f"{n}", 60.0)
    held = [f"a{n}" for n in range(10)]
    assert all(fair.admit("g", lease, "a", "candidates", 1, 60.0) is None for lease in held)
    refusal = fair.admit("g", "b", "b", "candidates", 1, 60.0)
    assert refusal is not None
    assert refusal.retry_after_s > 4.0
    fair.release(held.pop(), 60.0)
    for tenth in range(int(10 * refusal.retry_after_s)):  # the other one asks all the time
        assert fair.admit("g", f"more {tenth}", "a", "candidates", 1, 60.0 + tenth / 10) is not None
    assert fair.admit("g", "b again", "b", "candidates", 1, 60.0 + refusal.retry_after_s) is None


def test_weights_change_the_shares() -> None:
    limits = Limits(
        capacity_candidates=12, tokens={"big": RateLimit(share=3.0), "small": RateLimit(share=1.0)}
    )
    fair = FairLimiter(limits)
    fair.admit("g", "s0", "small", "candidates", 1, 0.0)
    fair.admit("g", "b0", "big", "candidates", 1, 0.0)
    small = sum(fair.admit("g", f"s{n}", "small", "candidates", 1, 0.0) is None for n in range(1, 12))
    big = sum(fair.admit("g", f"b{n}", "big", "candidates", 1, 0.0) is None for n in range(1, 12))
    assert (small + 1, big + 1) == (3, 9)


def test_the_rate_is_a_bucket_that_fills() -> None:
    fair = limiter(100, requests_per_second=2.0, burst=3)
    assert [fair.admit("g", f"l{n}", "a", "candidates", 1, 0.0) for n in range(3)] == [None] * 3
    refusal = fair.admit("g", "l3", "a", "candidates", 1, 0.0)
    assert refusal is not None
    assert refusal.reason == "RATE_LIMITED"
    assert refusal.retry_after_s == pytest.approx(0.5)
    assert fair.admit("g", "l4", "b", "candidates", 1, 0.0) is None  # another token's bucket
    assert fair.admit("g", "l5", "a", "candidates", 1, 0.51) is None


def test_a_tokens_own_limit_comes_before_the_capacity() -> None:
    fair = limiter(100, concurrent_candidates=4)
    assert fair.admit("g", "l0", "a", "candidates", 3, 0.0) is None
    refusal = fair.admit("g", "l1", "a", "candidates", 3, 0.0)
    assert refusal is not None
    assert refusal.reason == "CONCURRENCY_LIMITED"
    assert fair.admit("g", "l2", "a", "pairs", 3, 0.0) is None  # another resource


def test_a_request_above_everything_runs_alone() -> None:
    fair = limiter(10)
    assert fair.admit("g", "large", "a", "candidates", 50, 0.0) is None
    assert fair.admit("g", "small", "b", "candidates", 1, 0.0) is not None
    fair.release("large", 1.0)
    assert fair.admit("g", "small", "b", "candidates", 1, 1.0) is None


def test_leases_of_a_dead_gateway_run_out_and_a_living_ones_do_not() -> None:
    fair = limiter(2)
    assert fair.admit("dead", "l0", "a", "candidates", 1, 0.0) is None
    assert fair.admit("alive", "l1", "a", "candidates", 1, 0.0) is None
    fair.renew("alive", {"l1": ("a", "candidates", 1)}, LEASE_S - 1)
    assert fair.admit("alive", "l2", "a", "candidates", 1, LEASE_S + 1) is None
    assert fair.in_use("candidates") == 2


def test_a_limiter_that_was_restarted_learns_the_leases_again() -> None:
    fair = limiter(2)
    fair.renew("g", {"l0": ("a", "candidates", 2)}, 0.0)
    assert fair.admit("g", "l1", "a", "candidates", 1, 0.1) is not None
    fair.release("l0", 0.2)
    fair.release("l0", 0.3)
    assert fair.in_use("candidates") == 0


def test_a_renewal_that_overtakes_its_request_counts_once() -> None:
    fair = limiter(10)
    fair.renew("g", {"l": ("a", "candidates", 4)}, 0.0)
    assert fair.admit("g", "l", "a", "candidates", 4, 0.0) is None
    assert fair.in_use("candidates") == 4
    fair.release("l", 1.0)
    assert fair.in_use("candidates") == 0


def test_a_lease_that_its_gateway_no_longer_names_is_given_back() -> None:
    fair = limiter(2)
    fair.admit("g", "lost", "a", "candidates", 2, 0.0)
    fair.renew("g", {}, 5.0)
    assert fair.in_use("candidates") == 0


class _Handle:
    """A limiter's handle: answers from the limiter, or not at all."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self.silent = False
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=functools.partial(self._call, name))

    async def _call(self, name: str, *arguments: Any) -> Any:
        self.asked += name == "admit"
        if self.silent:
            raise ConnectionError
        return await getattr(self._limiter, name)(*arguments)


def test_a_gateway_gives_back_what_it_took_and_repeats_a_refusal_without_asking() -> None:
    async def test() -> None:
        limits = Limits(capacity_candidates=2)
        limiter = Limiter()
        limiter.reconfigure(limits.model_dump())
        handle = _Handle(limiter)
        gateway = Admissions(handle, limits)
        async with gateway.admitted("a", "candidates", 2) as refusal:
            assert refusal is None
            for _ in range(5):
                async with gateway.admitted("a", "candidates", 1) as refusal:
                    assert refusal is not None
            assert handle.asked < 6
        await asyncio.sleep(0.1)
        assert (await limiter.in_use())["candidates"] == 0
        async with gateway.admitted("a", "candidates", 1) as refusal:
            assert refusal is None

    asyncio.run(test())


def test_a_gateway_whose_limiter_is_silent_decides_alone() -> None:
    async def test() -> None:
        handle = _Handle(Limiter())
        handle.silent = True
        gateway = Admissions(handle, Limits(capacity_candidates=2))
        async with gateway.admitted("a", "candidates", 2) as refusal:
            assert refusal is None
            async with gateway.admitted("b", "candidates", 1) as refusal:
                assert refusal is not None
                assert refusal.reason == "CAPACITY_EXHAUSTED"
        await asyncio.sleep(0.1)
        async with gateway.admitted("b", "candidates", 1) as refusal:
            assert refusal is None

    asyncio.run(test())


def test_limits_that_change_live_reach_the_limiter() -> None:
    async def test() -> None:
        limiter = Limiter()
        gateway = Admissions(_Handle(limiter), Limits())
        gateway.configure(Limits(capacity_candidates=1))
        await asyncio.sleep(0.1)
        async with gateway.admitted("a", "candidates", 1) as refusal:
            assert refusal is None
        await asyncio.sleep(0.1)
        assert await limiter.admit("g", "l0", "a", "candidates", 1) is None
        assert await limiter.admit("g", "l1", "b", "candidates", 1) is not None

    asyncio.run(test())
