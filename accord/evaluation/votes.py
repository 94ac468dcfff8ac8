"""Raters who compare sets of images, as in Lee et al. 2023: sets of four, nine raters, seven votes to win.

Shapes: Q questions (one set of each model), R raters.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accord.evaluation.statistics import DIFFERENCE, Bootstrap, Interval, bootstrap_interval


@dataclass(frozen=True)
class Tally:
    """Questions won and lost by the aligned model; `net` is (wins - losses) / questions."""

    wins: int
    losses: int
    ties: int
    net: Interval

    def as_dict(self) -> dict[str, Any]:
        """The plain form in summary.json."""
        return {**self.net.as_dict(), "wins": self.wins, "losses": self.losses, "ties": self.ties}


def outcomes(votes_QR: ArrayLike, quorum: int = 7) -> NDArray[np.int8]:
    """outcome_Q: +1 or -1 where at least `quorum` raters voted so, else 0.

    A vote that is 0 or NaN is for neither.
    """
    votes = np.asarray(votes_QR, dtype=float)
    if votes.size == 0:
        return np.zeros(0, dtype=np.int8)
    wins_Q, losses_Q = (votes > 0).sum(axis=1) >= quorum, (votes < 0).sum(axis=1) >= quorum
    outcome_Q: NDArray[np.int8] = wins_Q.astype(np.int8) - losses_Q.astype(np.int8)
    return outcome_Q


def tally(
    votes_QR: ArrayLike,
    quorum: int = 7,
    *,
    clusters: ArrayLike | None = None,
    bootstrap: Bootstrap | None = None,
) -> Tally:
    """Wins, losses and ties over questions, with the interval of the net win by resampling questions.

    Args:
        votes_QR: +1 for the aligned model's set, -1 for the base's, 0 for neither.
        quorum: how many votes of one side decide a question; more than half of the raters.
        clusters: the prompt of each question, if a prompt has several.
    """
    outcome_Q = outcomes(votes_QR, quorum)
    net = bootstrap_interval(outcome_Q, clusters, bootstrap=bootstrap, support=DIFFERENCE)
    return Tally(
        wins=int((outcome_Q > 0).sum()),
        losses=int((outcome_Q < 0).sum()),
        ties=int((outcome_Q == 0).sum()),
        net=net,
    )
