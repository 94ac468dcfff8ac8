"""How long the waits between attempts are."""

import random

import pytest

from accord.client import Overloaded, RetryPolicy, ServerError, Unavailable
from accord.client.retry import Attempts
from accord.errors import ConfigError


@pytest.fixture
def now() -> list[float]:
    return [100.0]


def attempts(now: list[float], *, timeout_s: float = 1000.0, **policy: float) -> Attempts:
    longest = lambda low, high: high  # noqa: E731 (the jitter at its longest)
    return Attempts(RetryPolicy(**policy), timeout_s, clock=lambda: now[0], uniform=longest)  # type: ignore[arg-type]


def test_waits_grow_to_their_ceiling(now: list[float]) -> None:
    made = attempts(now, initial_backoff_s=0.5, max_backoff_s=3.0, max_attempts=6)
    waits = [made.delay_after(Unavailable("x"), reached=True) for _ in range(5)]
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0]
    with pytest.raises(Unavailable):
        made.delay_after(Unavailable("x"), reached=True)


def test_the_jitter_is_full() -> None:
    random.seed(0)
    policy = RetryPolicy(initial_backoff_s=1.0, max_backoff_s=1.0, max_attempts=2)
    waits = [Attempts(policy, 99.0).delay_after(Unavailable("x"), reached=True) for _ in range(500)]
    assert min(waits) < 0.05
    assert max(waits) > 0.95
    assert abs(sum(waits) / 500 - 0.5) < 0.05


def test_a_server_that_says_when_is_not_asked_earlier(now: list[float]) -> None:
    made = attempts(now, initial_backoff_s=0.5)
    for kind, ceiling_s in ((Overloaded, 0.5), (Unavailable, 1.0)):
        error = kind("not now")
        error.retry_after_s = 7.0
        assert made.delay_after(error, reached=True) == 7.0 + ceiling_s
    assert made.delay_after(Overloaded("full"), reached=True) == 2.0


def test_no_wait_goes_beyond_the_deadline(now: list[float]) -> None:
    made = attempts(now, timeout_s=10.0)
    assert made.remaining_s() == 10.0
    now[0] += 9.9
    with pytest.raises(Unavailable):
        made.delay_after(Unavailable("x"), reached=True)
    now[0] += 5
    assert made.remaining_s() > 0


def test_what_is_final_is_raised(now: list[float]) -> None:
    with pytest.raises(ServerError):
        attempts(now).delay_after(ServerError("x"), reached=True)


def test_an_address_where_nothing_ever_answered_is_given_up_soon(now: list[float]) -> None:
    error = Unavailable("x")
    error.never_connected = True
    made = attempts(now)
    made.delay_after(error, reached=False)
    made.delay_after(error, reached=False)
    with pytest.raises(Unavailable):
        made.delay_after(error, reached=False)
    patient = attempts(now)
    for _ in range(7):
        patient.delay_after(error, reached=True)


@pytest.mark.parametrize(
    "policy",
    [{"max_attempts": 0}, {"initial_backoff_s": 9.0}, {"initial_backoff_s": -1.0}, {"multiplier": 0.5}],
)
def test_policies_that_make_no_sense_are_refused(policy: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        RetryPolicy(**policy)  # type: ignore[arg-type]
