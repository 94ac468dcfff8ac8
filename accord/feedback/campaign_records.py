"""What goes into campaigns and comes out of them: plain records, and the errors of their own."""

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence

from accord.errors import FeedbackError
from accord.feedback.quality import Agreement
from accord.feedback.tables import VERDICTS, check_text

PREFERENCES = ("left", "right", "tie")
QUESTIONS = ("alignment", "fidelity")
MAX_JUDGEMENTS = 25
MAX_IMAGES = 4  # a side of a comparison

_CAMPAIGN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_KEY_BYTES = 128  # judgements of an answer add their number to its key


class NotFoundError(FeedbackError):
    """There is no such campaign, task or image."""


class LeaseError(FeedbackError):
    """The answer cannot be counted: this rater does not hold the task, and its places are taken by now."""


class AnsweredError(FeedbackError):
    """This rater answered this task before, under another idempotency key."""


class ExcludedError(FeedbackError):
    """This rater was excluded."""


@dataclasses.dataclass(frozen=True)
class Gold:
    """A candidate whose verdict ("good" or "bad") is known: it measures raters."""

    image: str
    prompt: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class ComparisonItem:
    """Two sets of images (digests) of one prompt, such as of two models; raters see them blind."""

    prompt: str
    first: Sequence[str]
    second: Sequence[str]
    category: str = "comparison"


@dataclasses.dataclass(frozen=True)
class Campaign:
    """A campaign, and how far it is: `num_answers` of `num_answers_wanted` are there (gold apart)."""

    campaign_id: str
    kind: str
    title: str
    judgements_per_item: int
    lease_s: float
    created_at: datetime.datetime
    num_tasks: int
    num_answers: int
    num_answers_wanted: int

    @property
    def complete(self) -> bool:
        return self.num_answers >= self.num_answers_wanted


@dataclasses.dataclass(frozen=True)
class Task:
    """What a rater is shown. `images` are digests; in a comparison those of the left side."""

    task_id: str
    campaign_id: str
    kind: str
    prompt: str
    images: tuple[str, ...]
    right_images: tuple[str, ...]
    question: str
    """Of a comparison "alignment" or "fidelity"; else ""."""
    expires_at: datetime.datetime


@dataclasses.dataclass(frozen=True)
class StoredJudgement:
    """A judgement that counts, as lists and exports show it."""

    judgement_id: int
    campaign_id: str
    """ "" when it came without a campaign."""
    image: str
    prompt: str
    category: str
    split: str
    rater: str
    verdict: str
    created_at: datetime.datetime


@dataclasses.dataclass(frozen=True)
class StuckTask:
    """A task whose leases ran out again and again, and that is still open."""

    task_id: str
    prompt: str
    expiries: int


@dataclasses.dataclass(frozen=True)
class Progress:
    """How a campaign stands.

    `shares` are those of `accord.feedback.aggregate.shares_by_category`, by category and by prompt (of an
    alignment campaign); `preferences` are numbers of "first", "second" and "tie" by question (of a
    comparison).
    """

    campaign: Campaign
    tasks: int
    tasks_done: int
    gold_tasks: int
    answers: int
    wanted: int
    leased: int
    expired: int
    raters: int
    stuck: tuple[StuckTask, ...]
    shares: Mapping[str, Mapping[str, float]]
    shares_by_prompt: Mapping[str, Mapping[str, float]]
    preferences: Mapping[str, Mapping[str, int]]
    agreement: Mapping[str, Agreement]
    """By category and in "total"; skips apart."""


@dataclasses.dataclass(frozen=True)
class Rater:
    """How a rater does in a campaign. None where there is nothing to tell yet."""

    rater: str
    answers: int
    gold_judged: int
    gold_accuracy: float | None
    median_s: float | None
    agreement: float | None
    """Share of his judgements that agree with another rater's of the same image, skips apart."""
    reliability: float | None
    """Estimated probability that a judgement of his is right (Dawid and Skene's model)."""
    suspected: bool
    """His judgements look wrong more often than right, or like chance: look at them."""
    excluded: bool
    reason: str


def check_campaign_id(campaign_id: object) -> None:
    """Raises FeedbackError unless it is 1 to 64 letters, digits, - and _."""
    if not isinstance(campaign_id, str) or not _CAMPAIGN_ID.fullmatch(campaign_id):
        raise FeedbackError(f"campaign id {campaign_id!r}: expected 1 to 64 letters, digits, - and _")


def check_gold(gold: Gold) -> None:
    """Raises FeedbackError when its verdict is no answer to know."""
    if gold.verdict not in ("good", "bad"):
        raise FeedbackError(
            f"gold image {gold.image!r}: the verdict is {gold.verdict!r}; expected good or bad"
        )


def check_item(item: ComparisonItem, number: int) -> None:
    """Raises FeedbackError when a comparison cannot be shown."""
    name = f"comparison {number}"
    check_text(name, "prompt", item.prompt)
    check_text(name, "category", item.category)
    for side in ("first", "second"):
        digests = getattr(item, side)
        if isinstance(digests, str) or not 1 <= len(digests) <= MAX_IMAGES:
            raise FeedbackError(f"{name}: {side} must hold 1 to {MAX_IMAGES} images")
        for digest in digests:
            check_text(name, "image", digest)


def check_key(key: object) -> None:
    """Raises FeedbackError for an idempotency key that cannot be stored."""
    check_text("answer", "idempotency_key", key)
    if len(str(key).encode()) > _MAX_KEY_BYTES:
        raise FeedbackError(f"answer: idempotency_key has more than {_MAX_KEY_BYTES} bytes")


def check_answer(kind: str, images: int, answer: object) -> list[str] | str:
    """The answer in the form that is stored: a verdict an image, or a preference.

    Raises:
        FeedbackError: it is no answer to a task of that kind with that many images.
    """
    if kind == "comparison":
        if isinstance(answer, str) and answer in PREFERENCES:
            return answer
        raise FeedbackError(f"the answer is {answer!r}; expected one of {', '.join(PREFERENCES)}")
    if isinstance(answer, str) or not isinstance(answer, Sequence) or len(answer) != images:
        raise FeedbackError(f"the answer is {answer!r}; expected {images} verdicts, one an image")
    verdicts = list(answer)
    for verdict in verdicts:
        if verdict not in VERDICTS:
            raise FeedbackError(f"unknown verdict {verdict!r}; expected {', '.join(VERDICTS)}")
    return verdicts
