"""The pictures of a report, as PNG bytes with what the reward and the evaluator said of them."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class PairCard:
    """One prompt and one seed, so the same initial noise, through the base and through the aligned model.

    A reward is in [0, 1], or None when it was not computed; a success is the evaluator's, or None likewise.
    """

    prompt: str
    split: str
    seed: int
    base_png: bytes
    aligned_png: bytes
    base_reward: float | None
    aligned_reward: float | None
    base_success: bool | None
    aligned_success: bool | None


class RankedImage(NamedTuple):
    """One candidate of a best-of-n strip; a plain tuple of the three will do as well."""

    png: bytes
    reward: float | None
    success: bool | None


@dataclass(frozen=True)
class BestOfCard:
    """The candidates of one prompt by one model, highest reward first."""

    prompt: str
    model: str
    ranked: list[RankedImage] | list[tuple[bytes, float, bool]]


@dataclass(frozen=True)
class Served:
    """What the run's models answered over gRPC, with a note, and the command that serves them again."""

    cards: list[BestOfCard]
    note: str
    command: str


@dataclass(frozen=True)
class Gallery:
    """All pictures of a report. `note` says in a sentence how they were chosen; it is printed beside them."""

    pairs: list[PairCard]
    best_of: list[BestOfCard]
    note: str = ""
    served: Served | None = None
