"""Frontiers over guidance scales: what may choose a scale, and when a frontier has moved."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from accord.errors import AccordError
from accord.evaluation.fidelity import Reference
from accord.evaluation.guidance import (
    FrontierGain,
    FrontierPoint,
    best_within,
    choose_guidance,
    frontier_gain,
    frontier_table,
    undominated,
)
from accord.evaluation.statistics import Bootstrap, Interval

NOTHING = Interval(float("nan"), float("nan"), float("nan"), 0)


def point(
    model: str, guidance: float, success: float, frechet: float = 1.0, group: str = "choice"
) -> FrontierPoint:
    return FrontierPoint(
        group, model, guidance, Interval(success, success, success, 10), NOTHING, NOTHING, frechet, 0.0, 10
    )


def rows(success: dict[tuple[str, float], float], prompts: int = 60, group: str = "choice") -> pd.DataFrame:
    """Two images a prompt for each model and scale, so many of them successes, spread over the prompts."""
    parts = []
    for (model, scale), share in success.items():
        hit = np.zeros(2 * prompts)
        hit[np.random.default_rng(0).permutation(2 * prompts)[: round(share * 2 * prompts)]] = 1.0
        parts.append(
            pd.DataFrame(
                {
                    "group": group,
                    "model": model,
                    "guidance": scale,
                    "prompt": [f"prompt {i // 2}" for i in range(2 * prompts)],
                    "success": hit.astype(bool),
                    "readable": True,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def test_best_scale_is_chosen_by_success_and_the_smaller_in_a_tie() -> None:
    frontier = [point("base", s, v) for s, v in [(7.5, 0.4), (3.0, 0.5), (5.0, 0.5), (1.0, 0.2)]]
    frontier += [point("aligned", 1.5, 0.9), point("aligned", 3.0, float("nan"))]
    assert choose_guidance(frontier) == {"aligned": 1.5, "base": 3.0}


def test_choice_never_looks_at_test_rows() -> None:
    choice = [point("base", 1.0, 0.2), point("base", 3.0, 0.3)]
    test = [point("base", 1.0, 0.9, group="test"), point("base", 7.5, 1.0, group="test")]
    assert choose_guidance(choice + test) == choose_guidance(test + choice) == {"base": 3.0}
    with pytest.raises(AccordError, match="'choice'"):
        choose_guidance(test)


def test_choice_from_measurements_does_not_depend_on_their_test_rows() -> None:
    choice = rows({("base", 1.0): 0.2, ("base", 3.0): 0.5})
    reference = Reference(np.random.default_rng(0).standard_normal((50, 4)))
    expected = None
    for test_success in (0.0, 1.0):
        table = pd.concat([choice, rows({("base", 1.0): test_success}, group="test")], ignore_index=True)
        features = np.random.default_rng(1).standard_normal((len(table), 4))
        frontier = frontier_table(table, features, reference, bootstrap=Bootstrap(0, 100))
        expected = expected or frontier
        assert frontier == expected
        assert choose_guidance(frontier) == {"base": 3.0}


def test_table_measures_each_cell_on_its_own_rows() -> None:
    table = rows({("base", 1.0): 0.25, ("aligned", 2.0): 0.5}, prompts=20)
    table.loc[table["model"] == "aligned", "readable"] = False
    generator = np.random.default_rng(0)
    features = generator.standard_normal((len(table), 4))
    features[(table["model"] == "aligned").to_numpy()] += 3.0
    real = generator.standard_normal((200, 4))
    aligned, base = frontier_table(table, features, Reference(real), bootstrap=Bootstrap(0, 100))
    assert (aligned.model, aligned.guidance, aligned.n) == ("aligned", 2.0, 40)
    assert (base.success.value, aligned.success.value) == (0.25, 0.5)
    assert (base.readable.value, aligned.readable.value) == (1.0, 0.0)
    assert aligned.frechet > 30 > base.frechet
    assert aligned.kid > base.kid
    assert base.diversity.n == 20
    assert frontier_table(table, features, Reference(real), group="test") == []


def gain_of(table: pd.DataFrame, frontier: list[FrontierPoint], model: str = "aligned") -> FrontierGain:
    """The gain where all features are alike, so that the distances do not vary between resamples."""
    same = np.zeros((len(table), 2), dtype=np.float32)
    return frontier_gain(table, same, Reference(np.zeros((9, 2), dtype=np.float32)), frontier, model)


def test_curve_is_linear_inside_flat_outside_and_never_falls() -> None:
    # The curve (10, 0.2), (20, 0.4), then (30, 0.1), where more guidance makes it worse; given out of order.
    distances, success = [[30.0, 10.0, 20.0]], [[0.1, 0.2, 0.4]]
    targets = [[5.0, 10.0, 12.5, 20.0, 25.0, 99.0]]
    np.testing.assert_allclose(best_within(targets, distances, success), [[0.2, 0.2, 0.25, 0.4, 0.4, 0.4]])
    two = best_within([[15.0], [15.0]], [[10.0, 20.0], [15.0, 20.0]], [[0.0, 1.0], [0.3, 1.0]])
    np.testing.assert_allclose(two, [[0.5], [0.3]])
    assert best_within(np.zeros((3, 0)), np.zeros((3, 0)), np.zeros((3, 0))).shape == (3, 0)


def test_undominated_points() -> None:
    kept = undominated(
        [point("a", 1, 0.2, 10), point("a", 2, 0.1, 20), point("a", 3, 0.4, 30), point("a", 4, 0.4, 40)]
    )
    assert [p.guidance for p in kept] == [1, 3]


def test_distilled_guidance_is_a_gain_at_equal_guidance_and_none_at_equal_frechet() -> None:
    # The tuned model at 1 is the base at 2: the same images even, so there is no noise between them.
    success = {("base", 1.0): 0.2, ("base", 2.0): 0.5, ("aligned", 1.0): 0.5, ("aligned", 2.0): 0.5}
    frontier = [point("base", 1.0, 0.2, 10), point("base", 2.0, 0.5, 20)]
    frontier += [point("aligned", 1.0, 0.5, 20), point("aligned", 2.0, 0.5, 30)]
    gain = gain_of(rows(success), frontier)
    assert gain.at_equal_guidance.value == pytest.approx((0.3 + 0.0) / 2)
    assert gain.at_equal_guidance.low > 0
    assert gain.at_equal_frechet.value == pytest.approx(0.0)
    assert gain.at_equal_frechet.low <= 0 <= gain.at_equal_frechet.high
    assert gain.moved is False


def test_a_frontier_that_moved() -> None:
    success = {("base", 1.0): 0.2, ("base", 2.0): 0.4, ("aligned", 1.0): 0.7}
    frontier = [point("base", 1.0, 0.2, 10), point("base", 2.0, 0.4, 20), point("aligned", 1.0, 0.7, 15)]
    gain = gain_of(rows(success), frontier)
    assert gain.at_equal_frechet.value == pytest.approx(0.7 - 0.3)
    assert gain.at_equal_guidance.value == pytest.approx(0.5)
    assert gain.moved is True


def test_baseline_beyond_its_ends_and_where_more_guidance_hurts() -> None:
    success = {("base", 1.0): 0.4, ("base", 2.0): 0.2, ("aligned", 1.0): 0.4, ("aligned", 2.0): 0.6}
    frontier = [point("base", 1.0, 0.4, 10), point("base", 2.0, 0.2, 20)]
    frontier += [point("aligned", 1.0, 0.4, 5), point("aligned", 2.0, 0.6, 50)]
    # At 5 the baseline's nearest point has 0.4; at 50 it can still have the 0.4 of distance 10.
    assert gain_of(rows(success), frontier).at_equal_frechet.value == pytest.approx((0 + 0.2) / 2)


def test_frontiers_without_points_or_of_two_groups() -> None:
    base = point("base", 1.0, 0.2)
    table = rows({("base", 1.0): 0.2})
    nothing = gain_of(table, [base])
    assert (nothing.at_equal_frechet.n, nothing.at_equal_guidance.n, nothing.moved) == (0, 0, None)
    assert gain_of(table, []).moved is None
    unmeasured = dataclasses.replace(point("aligned", 1.0, 0.2), frechet=float("nan"))
    both = rows({("base", 1.0): 0.2, ("aligned", 1.0): 0.2})
    gain = gain_of(both, [base, unmeasured])
    assert (gain.at_equal_guidance.value, gain.at_equal_frechet.n) == (0.0, 0)
    with pytest.raises(AccordError, match="different groups"):
        gain_of(table, [base, point("aligned", 1.0, 0.2, group="test")])


def test_the_distances_uncertainty_widens_the_interval() -> None:
    # The same successes, at distances that differ by chance: nothing moved.
    success = {
        (model, scale): share for model in ("base", "aligned") for scale, share in [(1.0, 0.2), (3.0, 0.5)]
    }
    table = rows(success)
    generator = np.random.default_rng(0)
    reference = Reference(generator.standard_normal((400, 3)))
    features = generator.standard_normal((len(table), 3)) + table["guidance"].to_numpy()[:, None] / 2
    frontier = frontier_table(table, features, reference, bootstrap=Bootstrap(0, 100))
    gain = frontier_gain(table, features, reference, frontier, "aligned")
    assert gain.at_equal_guidance.value == 0.0
    assert abs(gain.at_equal_frechet.value) < 0.05
    assert gain.moved is False
    assert gain.at_equal_frechet.low < 0 < gain.at_equal_frechet.high


def test_no_claim_of_a_moved_frontier_where_there_is_none() -> None:
    generator = np.random.default_rng(0)
    claims = []
    for _ in range(24):
        table = rows(
            {(model, scale): 0.3 for model in ("base", "aligned") for scale in (1.0, 3.0)}, prompts=40
        )
        table["success"] = generator.random(len(table)) < table["guidance"].map({1.0: 0.3, 3.0: 0.5})
        features = generator.standard_normal((len(table), 4)) + table["guidance"].to_numpy()[:, None] / 2
        reference = Reference(generator.standard_normal((300, 4)))
        frontier = frontier_table(table, features, reference, bootstrap=Bootstrap(0, 100))
        claims.append(
            frontier_gain(table, features, reference, frontier, "aligned", bootstrap=Bootstrap(0, 200)).moved
        )
    assert sum(claims) <= 3  # 2.5% each: four or more of 24 have a chance of one in 300
