"""Comparisons as they were answered: read for snapshots, and stored when they come from elsewhere."""

import dataclasses
import datetime
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, func, insert, select

from accord.artifacts import canonical_json, sha256_bytes
from accord.errors import FeedbackError
from accord.feedback.campaign_making import store_campaign
from accord.feedback.campaign_records import QUESTIONS, ComparisonItem, check_campaign_id, check_item
from accord.feedback.campaign_tables import (
    TASKS_PER_CAMPAIGN,
    answers,
    campaign_raters,
    campaigns,
    exclusions,
    places,
    tasks,
)
from accord.feedback.counting import standing
from accord.feedback.tables import check_text

ANSWERS = ("first", "second", "tie")

_SIDE = {"first": "left", "second": "right", "tie": "tie"}
_ROWS_PER_INSERT = 5000
_LEASE_S = 600.0  # imported tasks are never leased; the column wants a value


@dataclasses.dataclass(frozen=True, order=True)
class Compared:
    """What a rater said of two sets of images (digests) of a prompt: which is better, if not a "tie"."""

    prompt: str
    category: str
    question: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    rater: str
    answer: str


def check_compared(item: Compared) -> None:
    """Raises FeedbackError when it cannot be stored."""
    check_item(ComparisonItem(item.prompt, item.first, item.second, item.category), 0)
    check_text("comparison", "rater", item.rater)
    for name, value, known in (("question", item.question, QUESTIONS), ("answer", item.answer, ANSWERS)):
        if value not in known:
            raise FeedbackError(f"comparison: {name} is {value!r}; expected {', '.join(known)}")


def read_compared(
    connection: Connection, named: Collection[str], only: Collection[tuple[str, str]] | None
) -> list[Compared]:
    """The answers that count, in order, with sides put right again.

    Args:
        named: ids of campaigns that are read whole.
        only: the (image, prompt) that all images of a comparison must be among in any other campaign; without
            it, every comparison is read.

    Raises:
        FeedbackError: a campaign that is named is not there.
    """
    _check_named(connection, named)
    columns = (tasks.c.prompt, tasks.c.category, tasks.c.question, tasks.c.images, tasks.c.right_images)
    not_excluded = answers.c.rater.not_in(select(exclusions.c.rater))
    query = (
        select(*columns, tasks.c.swapped, answers.c.rater, answers.c.answer, campaigns.c.campaign_id)
        .join(answers, answers.c.task == tasks.c.id)
        .join(campaigns, campaigns.c.number == tasks.c.campaign)
        .where(campaigns.c.kind == "comparison", standing(), not_excluded)
    )
    found: list[Compared] = []
    for row in connection.execution_options(yield_per=10_000).execute(query):
        left, right, answer = (json.loads(text) for text in (row.images, row.right_images, row.answer))
        first, second = (right, left) if row.swapped else (left, right)
        if answer != "tie":
            answer = "second" if (answer == "left") == row.swapped else "first"
        ours = only is None or all((image, row.prompt) in only for image in (*first, *second))
        if ours or row.campaign_id in named:
            said = (tuple(first), tuple(second), row.rater, answer)
            found.append(Compared(row.prompt, row.category, row.question, *said))
    return sorted(found)


def _check_named(connection: Connection, named: Collection[str]) -> None:
    known = set(
        connection.execute(select(campaigns.c.campaign_id).where(campaigns.c.kind == "comparison")).scalars()
    )
    lost = sorted(set(named) - known)
    if lost:
        there = ", ".join(sorted(known)) or "none"
        raise FeedbackError(
            f"there is no campaign of comparisons {lost[0]!r} in the store; those that are there: {there}"
        )


def store_compared(connection: Connection, campaign_id: str, title: str, items: Sequence[Compared]) -> int:
    """Stores answers given elsewhere as a campaign of their own, complete; how many are new.

    A campaign of the same id and the same answers is left as it is.

    Raises:
        FeedbackError: a field that cannot be stored, a rater who gave two answers to one comparison, or a
            campaign of that id with other content.
    """
    check_campaign_id(campaign_id)
    check_text(f"campaign {campaign_id!r}", "title", title)
    if not items:
        raise FeedbackError(f"campaign {campaign_id!r}: there are no comparisons to store")
    grouped = _by_item(items)
    settings = {
        "campaign_id": campaign_id, "kind": "comparison", "title": title, "lease_s": _LEASE_S, "seed": 0,
        "judgements_per_item": max(len(said) for said in grouped.values()),
    }  # fmt: skip
    digest = digest_of(items)
    # The title is no part of what it is: a file that was renamed holds the same answers.
    store_campaign(connection, settings, {"imported": digest, "title": ""}, lambda _: _tasks(grouped))
    number = connection.execute(
        select(campaigns.c.number).where(campaigns.c.campaign_id == campaign_id)
    ).scalar_one()
    count = select(func.count()).select_from(answers).where(answers.c.campaign == number)
    if connection.execute(count).scalar_one():
        return 0
    first_task = number * TASKS_PER_CAMPAIGN
    _insert(connection, answers, _answers(grouped, number, first_task, digest))
    _insert(connection, places, _places(grouped, first_task))
    _insert(connection, campaign_raters, _seats(grouped, number))
    return len(items)


def digest_of(items: Iterable[Compared]) -> str:
    """The SHA-256 of these answers, in whatever order."""
    return sha256_bytes(canonical_json([list(dataclasses.astuple(item)) for item in sorted(items)]).encode())


_Key = tuple[str, str, str, tuple[str, ...], tuple[str, ...]]


def _by_item(items: Iterable[Compared]) -> dict[_Key, dict[str, str]]:
    """Answers by rater of each comparison."""
    grouped: dict[_Key, dict[str, str]] = {}
    for item in sorted(items):
        check_compared(item)
        said = grouped.setdefault((item.prompt, item.category, item.question, item.first, item.second), {})
        if item.rater in said:
            raise FeedbackError(
                f"the rater {item.rater!r} answered the comparison of {item.first[0]!r} and "
                f"{item.second[0]!r} twice"
            )
        said[item.rater] = item.answer
    return grouped


def _tasks(grouped: Mapping[_Key, Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    for place, ((prompt, category, question, first, second), said) in enumerate(grouped.items()):
        yield {
            "prompt": prompt, "category": category, "question": question, "item": place,
            "images": json.dumps(list(first)), "right_images": json.dumps(list(second)),
            "wanted": len(said), "taken": len(said), "answered": len(said),
        }  # fmt: skip


def _answers(
    grouped: Mapping[_Key, Mapping[str, str]], number: int, first_task: int, digest: str
) -> Iterator[dict[str, Any]]:
    now = datetime.datetime.now(datetime.UTC)
    for place, said in enumerate(grouped.values()):
        for slot, (rater, answer) in enumerate(said.items()):
            yield {
                "idempotency_key": f"import {number} {digest[:32]} {place} {slot}", "campaign": number,
                "task": first_task + place, "rater": rater, "kind": "answer",
                "answer": json.dumps(_SIDE[answer]), "created_at": now,
            }  # fmt: skip


def _places(grouped: Mapping[_Key, Mapping[str, str]], first_task: int) -> Iterator[dict[str, Any]]:
    now_ms = int(datetime.datetime.now(datetime.UTC).timestamp() * 1000)
    for place, said in enumerate(grouped.values()):
        for slot, rater in enumerate(said):
            yield {
                "task": first_task + place, "rater": rater, "state": "answered", "slot": slot,
                "leased_ms": now_ms, "expires_ms": now_ms,
            }  # fmt: skip


def _seats(grouped: Mapping[_Key, Mapping[str, str]], number: int) -> Iterator[dict[str, Any]]:
    """The counts that campaigns keep of their raters."""
    now_ms = int(datetime.datetime.now(datetime.UTC).timestamp() * 1000)
    given = Counter(rater for said in grouped.values() for rater in said)
    for rater, count in sorted(given.items()):
        yield {
            "campaign": number, "rater": rater, "cursor": 0, "leases": 0, "last_answer_ms": now_ms,
            "answered": count, "counted": count,
        }  # fmt: skip


def _insert(connection: Connection, table: Any, rows: Iterator[dict[str, Any]]) -> None:
    part: list[dict[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == _ROWS_PER_INSERT:
            connection.execute(insert(table), part)
            part = []
    if part:
        connection.execute(insert(table), part)
