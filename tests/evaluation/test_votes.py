"""The paper's voting rule, by hand."""

import numpy as np
import pytest

from accord.evaluation.votes import outcomes, tally


def _votes(aligned: int, base: int, raters: int = 9) -> list[int]:
    return [1] * aligned + [-1] * base + [0] * (raters - aligned - base)


def test_seven_of_nine_win_and_six_do_not() -> None:
    votes = [_votes(9, 0), _votes(7, 2), _votes(6, 3), _votes(7, 0), _votes(2, 7), _votes(3, 6), _votes(0, 0)]
    assert outcomes(votes, quorum=7).tolist() == [1, 1, 0, 1, -1, 0, 0]


def test_tally_counts_and_net() -> None:
    result = tally([_votes(9, 0)] * 5 + [_votes(1, 8)] * 2 + [_votes(5, 4)] * 3, quorum=7)
    assert (result.wins, result.losses, result.ties) == (5, 2, 3)
    assert result.net.value == pytest.approx(0.3)
    assert result.net.n == 10
    assert -0.4 < result.net.low < 0.3 < result.net.high < 0.9
    assert result.as_dict() == {**result.net.as_dict(), "wins": 5, "losses": 2, "ties": 3}


def test_net_interval_has_the_width_of_its_variance() -> None:
    net = tally([_votes(9, 0)] * 120 + [_votes(0, 9)] * 40 + [_votes(4, 4)] * 40).net
    outcome = np.repeat([1.0, -1.0, 0.0], [120, 40, 40])
    assert net.high - net.low == pytest.approx(2 * 1.96 * outcome.std() / np.sqrt(200), rel=0.1)


def test_absent_votes_are_for_neither_and_no_questions_give_nothing() -> None:
    assert outcomes([[1.0] * 6 + [np.nan] * 3], quorum=7).tolist() == [0]
    empty = tally(np.zeros((0, 9)))
    assert (empty.wins, empty.losses, empty.ties, empty.net.n) == (0, 0, 0, 0)
    assert np.isnan(empty.net.value)


def test_all_ties_are_not_certainty() -> None:
    net = tally([_votes(4, 4)] * 10).net
    assert net.value == 0.0
    assert net.low == pytest.approx(-(1 - 0.025**0.1))
    assert net.high == pytest.approx(1 - 0.025**0.1)
