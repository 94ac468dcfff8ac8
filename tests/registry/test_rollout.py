"""The decision on a canary, from numbers alone."""

import random

import pytest

from accord.registry.rollout import Action, Observed, RolloutPolicy, decide, difference, wilson

POLICY = RolloutPolicy()
CHAMPION = Observed(ok=9990, errors=10, latency_s=1.0, good=700, bad=300)
FINE = Observed(ok=1999, errors=1, latency_s=1.1, good=720, bad=280)
DAY_S = 86400.0


def action(canary: Observed, *, champion: Observed = CHAMPION, age_s: float = DAY_S, **policy: float) -> str:
    return decide(POLICY.model_copy(update=policy), champion, canary, age_s).action.value


def test_wilson_as_published() -> None:
    # Newcombe (1998), table I of the companion paper on single proportions, method 3.
    assert wilson(81, 263, 0.95) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148, 0.95) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20, 0.95) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1, 29, 0.95) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson(0, 0, 0.95) == (0.0, 1.0)


def test_newcombe_as_published() -> None:
    # Newcombe (1998), table II, method 10: examples (a), (c) and (h).
    assert difference(56, 70, 48, 80, 0.95) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert difference(6, 7, 2, 7, 0.95) == pytest.approx((0.0582, 0.8062), abs=1e-4)
    assert difference(10, 10, 0, 10, 0.95) == pytest.approx((0.6075, 1.0), abs=1e-4)


def test_a_difference_turns_its_sign_with_its_sides() -> None:
    low, high = difference(7, 50, 11, 40, 0.99)
    assert difference(11, 40, 7, 50, 0.99) == pytest.approx((-high, -low))
    with pytest.raises(ValueError, match="5 of 4 is no share"):
        wilson(5, 4, 0.9)


def test_one_that_is_as_good_is_promoted() -> None:
    decision = decide(POLICY, CHAMPION, FINE, DAY_S)
    assert decision.action is Action.PROMOTE
    assert decision.why == (
        "errors 1 of 2000 against 10 of 10000; good 720 of 1000 against 700 of 1000; takes 1.10 times as long"
    )


@pytest.mark.parametrize(
    ("canary", "age_s"),
    [
        (Observed(), DAY_S),
        (FINE, 10.0),
        (Observed(ok=499, latency_s=1.0, good=720, bad=280), DAY_S),
        (Observed(ok=2000, latency_s=1.0, good=60, bad=30), DAY_S),
        (Observed(ok=2000, latency_s=1.0, good=66, bad=34), DAY_S),  # enough verdicts, too wide an interval
        (Observed(ok=600, errors=4, latency_s=1.0, good=720, bad=280), DAY_S),  # may be 1 % worse
        (Observed(ok=2000, latency_s=None, good=720, bad=280), DAY_S),
        (Observed(ok=1, errors=2, latency_s=1.0), DAY_S),
        (Observed(ok=100, latency_s=9.0, good=10, bad=5), DAY_S),  # slow, but few requests
    ],
)
def test_it_waits_while_not_enough_is_known(canary: Observed, age_s: float) -> None:
    assert action(canary, age_s=age_s) == "wait"


@pytest.mark.parametrize(
    ("canary", "why"),
    [
        (Observed(errors=3), "errors 3 of 3"),
        (Observed(ok=50, errors=10), "errors 10 of 60"),
        (Observed(ok=2000, good=500, bad=500), "good 500 of 1000"),
        (Observed(ok=0, good=5, bad=60), "good 5 of 65"),
        (Observed(ok=2000, latency_s=1.6, good=720, bad=280), "takes 1.60 times as long"),
    ],
)
def test_a_bad_one_is_taken_out_at_any_age(canary: Observed, why: str) -> None:
    for age_s in (0.0, DAY_S):
        decision = decide(POLICY, CHAMPION, canary, age_s)
        assert decision.action is Action.TAKE_OUT
        assert why in decision.why


def test_errors_that_the_champion_has_too_take_nobody_out() -> None:
    both = Observed(ok=500, errors=500, latency_s=1.0)
    assert action(Observed(ok=50, errors=50, latency_s=1.0), champion=both) == "wait"
    # Nothing known of the champion: no comparison, no decision.
    assert action(Observed(errors=100), champion=Observed()) == "wait"


def test_people_are_not_waited_for_when_none_are_asked_for() -> None:
    silent = Observed(ok=2000, errors=1, latency_s=1.0)
    assert action(silent) == "wait"
    assert action(silent, min_verdicts=0) == "promote"


def test_looking_often_seldom_takes_out_an_equal_one() -> None:
    rng = random.Random(0)
    taken_out = 0
    for _ in range(100):
        canary = [0, 0]
        for _ in range(100):  # looks, 20 requests each, both failing at 2 %
            canary[1] += sum(rng.random() < 0.02 for _ in range(20))
            canary[0] += 20
            seen = Observed(ok=canary[0] - canary[1], errors=canary[1])
            if action(seen, champion=Observed(ok=9800, errors=200)) == "take_out":
                taken_out += 1
                break
    assert taken_out <= 3


def test_one_that_fails_every_tenth_time_is_found_soon() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        ok = errors = 0
        while action(Observed(ok=ok, errors=errors)) != "take_out":
            failed = rng.random() < 0.1
            ok, errors = ok + (not failed), errors + failed
            assert ok + errors < 400
