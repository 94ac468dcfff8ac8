"""Whether a canary becomes champion, is taken out, or is watched on. Pure: numbers in, decision out.

Both models are seen over the same time. Differences of shares have Newcombe's interval (made of two Wilson
intervals), which holds for few requests and for shares at 0 and 1:

    R. G. Newcombe (1998), Interval estimation for the difference between independent proportions, method 10.
"""

import math
import statistics
from dataclasses import dataclass
from enum import StrEnum

from pydantic import Field

from accord.config import Config


class Action(StrEnum):
    WAIT = "wait"
    PROMOTE = "promote"
    TAKE_OUT = "take_out"


class RolloutPolicy(Config):
    """What speaks for and against a canary."""

    confidence: float = Field(default=0.999, gt=0.5, lt=1.0)
    """Of the intervals that take it out. High, since the numbers are looked at again and again."""
    confidence_to_promote: float = Field(default=0.95, gt=0.5, lt=1.0)
    max_error_increase: float = Field(default=0.01, ge=0.0, lt=1.0)
    """Share of requests by which the canary may fail more often than the champion."""
    min_errors: int = Field(default=3, ge=1)
    """Errors of the canary before they can take it out."""
    max_good_decrease: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Good-rate (good of good and bad) by which the canary may be below the champion."""
    max_latency_ratio: float = Field(default=1.5, gt=0.0)
    """Canary's over champion's 95th percentile."""
    min_requests: int = Field(default=500, ge=1)
    """Of the canary, before it is promoted or taken out for its latency."""
    min_verdicts: int = Field(default=100, ge=0)
    """Good and bad ones on images of either model, before it is promoted; 0 promotes without people."""
    min_age_s: float = Field(default=3600.0, ge=0.0)
    """How long it is watched before it is promoted."""


@dataclass(frozen=True)
class Observed:
    """What is known of one model: ended requests, the 95th percentile of their time in seconds (None: not
    known), verdicts of people on its images."""

    ok: int = 0
    errors: int = 0
    latency_s: float | None = None
    good: int = 0
    bad: int = 0

    @property
    def requests(self) -> int:
        return self.ok + self.errors

    @property
    def verdicts(self) -> int:
        return self.good + self.bad


@dataclass(frozen=True)
class Decision:
    """`why` is one line for people and for the registry's record."""

    action: Action
    why: str


def decide(policy: RolloutPolicy, champion: Observed, canary: Observed, age_s: float) -> Decision:
    """What is to be done with a canary that has been watched for `age_s` seconds."""
    more_errors = (canary.errors, canary.requests, champion.errors, champion.requests)
    better = (canary.good, canary.verdicts, champion.good, champion.verdicts)
    least_errors = difference(*more_errors, policy.confidence)[0]
    most_good = difference(*better, policy.confidence)[1]
    errors = f"errors {canary.errors} of {canary.requests} against {champion.errors} of {champion.requests}"
    verdicts = f"good {canary.good} of {canary.verdicts} against {champion.good} of {champion.verdicts}"
    ratio = _ratio(canary.latency_s, champion.latency_s)
    slow = ratio is not None and ratio > policy.max_latency_ratio
    if canary.errors >= policy.min_errors and least_errors > policy.max_error_increase:
        return Decision(Action.TAKE_OUT, f"{errors}: surely more than {policy.max_error_increase:.1%} worse")
    if most_good < -policy.max_good_decrease:
        return Decision(Action.TAKE_OUT, f"{verdicts}: surely more than {policy.max_good_decrease:.1%} worse")
    if slow and min(canary.requests, champion.requests) >= policy.min_requests:
        return Decision(
            Action.TAKE_OUT, f"takes {ratio:.2f} times as long; {policy.max_latency_ratio:g} may be"
        )
    missing = _missing(policy, champion, canary, age_s)
    if missing:
        return Decision(Action.WAIT, f"{missing}; {errors}; {verdicts}")
    error_high = difference(*more_errors, policy.confidence_to_promote)[1]
    good_low = difference(*better, policy.confidence_to_promote)[0]
    if error_high > policy.max_error_increase:
        return Decision(Action.WAIT, f"{errors}: may be worse by up to {error_high:.1%}")
    if policy.min_verdicts and good_low < -policy.max_good_decrease:
        return Decision(Action.WAIT, f"{verdicts}: may be worse by up to {-good_low:.1%}")
    if ratio is None:
        return Decision(Action.WAIT, "how long requests take is not known")
    return Decision(Action.PROMOTE, f"{errors}; {verdicts}; takes {ratio:.2f} times as long")


def wilson(count: int, total: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval of a share; (0, 1) for a total of 0."""
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} is no share")
    if total == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = count / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low = 0.0 if count == 0 else max(0.0, middle - half)
    return low, 1.0 if count == total else min(1.0, middle + half)


def difference(
    count: int, total: int, other_count: int, other_total: int, confidence: float
) -> tuple[float, float]:
    """The interval of one share minus another; (-1, 1) when one of them is not known at all."""
    low, high = wilson(count, total, confidence)
    other_low, other_high = wilson(other_count, other_total, confidence)
    if not total or not other_total:
        return -1.0, 1.0
    share, other = count / total, other_count / other_total
    return (
        share - other - math.hypot(share - low, other_high - other),
        share - other + math.hypot(high - share, other - other_low),
    )


def _ratio(seconds: float | None, other: float | None) -> float | None:
    return seconds / other if seconds is not None and other else None


def _missing(policy: RolloutPolicy, champion: Observed, canary: Observed, age_s: float) -> str:
    """What is not there yet for a promotion; empty when all is."""
    if age_s < policy.min_age_s:
        return f"watched for {age_s:.0f} s of {policy.min_age_s:.0f}"
    if canary.requests < policy.min_requests:
        return f"{canary.requests} requests of {policy.min_requests}"
    fewest = min(canary.verdicts, champion.verdicts)
    return f"{fewest} verdicts of {policy.min_verdicts}" if fewest < policy.min_verdicts else ""
