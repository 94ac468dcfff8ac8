"""Makes a campaign's tasks, from candidates or comparisons, and stores them in one transaction."""

import datetime
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, func, insert, select

from accord.artifacts import canonical_json, sha256_bytes
from accord.errors import FeedbackError
from accord.feedback.campaign_records import (
    MAX_JUDGEMENTS,
    QUESTIONS,
    ComparisonItem,
    Gold,
    check_campaign_id,
    check_gold,
    check_item,
)
from accord.feedback.campaign_tables import TASKS_PER_CAMPAIGN, campaigns, tasks
from accord.feedback.tables import candidates, check_text

_ROWS_PER_INSERT = 5000
_MAX_LEASE_S = 7 * 24 * 3600.0

TaskRow = dict[str, Any]


def check_settings(
    campaign_id: str, title: str, judgements_per_item: int, images_per_task: int, lease_s: float, seed: int
) -> None:
    """Raises FeedbackError for what no campaign can have."""
    check_campaign_id(campaign_id)
    name = f"campaign {campaign_id!r}"
    check_text(name, "title", title)
    for field, value, low, high in (
        ("judgements_per_item", judgements_per_item, 1, MAX_JUDGEMENTS),
        ("images_per_task", images_per_task, 1, 9),
        ("seed", seed, 0, 2**63 - 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise FeedbackError(f"{name}: {field} is {value!r}; expected an integer from {low} to {high}")
    if not isinstance(lease_s, int | float) or not 0 < lease_s <= _MAX_LEASE_S:
        raise FeedbackError(
            f"{name}: lease_s is {lease_s!r}; expected seconds, more than 0 and at most {_MAX_LEASE_S:.0f}"
        )


def store_campaign(
    connection: Connection,
    settings: Mapping[str, Any],
    content: Mapping[str, Any],
    make: Callable[[Connection], Iterable[TaskRow]],
) -> None:
    """Stores the campaign of these settings (its columns) with the tasks that `make` finds, all or nothing.

    A campaign of the same id and content (what was asked for) is left as it is.

    Raises:
        FeedbackError: there is one of this id with another content, or there are no tasks.
    """
    digest = sha256_bytes(canonical_json({**settings, **content}).encode())
    name = settings["campaign_id"]
    found = connection.execute(select(campaigns).where(campaigns.c.campaign_id == name)).first()
    if found is not None:
        if found.content != digest:
            raise FeedbackError(
                f"there is a campaign {name!r} already, made with other settings or of other images; choose "
                "another id (nothing was changed)"
            )
        return
    highest = connection.execute(select(func.max(campaigns.c.number))).scalar()
    number = (highest or 0) + 1
    rows = [
        {
            "question": "", "item": 0, "right_images": "[]", "swapped": False, "gold": None, "taken": 0,
            "answered": 0, "returned": False, "expiries": 0, "wanted": settings["judgements_per_item"],
            **task, "campaign": number, "id": number * TASKS_PER_CAMPAIGN + index,
        }
        for index, task in enumerate(make(connection))
    ]  # fmt: skip
    row = {
        **settings, "number": number, "content": digest, "created_at": datetime.datetime.now(datetime.UTC),
        "num_tasks": len(rows), "num_gold": sum(task["gold"] is not None for task in rows),
        "num_wanted": sum(task["wanted"] for task in rows),
    }  # fmt: skip
    connection.execute(insert(campaigns).values(row))
    for start in range(0, len(rows), _ROWS_PER_INSERT):
        connection.execute(insert(tasks), rows[start : start + _ROWS_PER_INSERT])


def alignment_tasks(
    connection: Connection,
    campaign_id: str,
    sources: Sequence[str],
    only: Sequence[tuple[str, str]],
    images_per_task: int,
    gold: Sequence[Gold],
    seed: int,
) -> list[TaskRow]:
    """Candidates of those sources (all when there are none), grouped by prompt, in an order drawn by `seed`.

    Raises:
        FeedbackError: no candidate, or one that was named is no candidate of the store.
    """
    known: dict[tuple[str, str], str] = {(item.image, item.prompt): item.verdict for item in gold}
    columns = (candidates.c.image, candidates.c.prompt, candidates.c.category, candidates.c.source)
    ordinary: dict[tuple[str, str], list[str]] = {}
    golden: dict[tuple[str, str], list[str]] = {}
    wanted, found = set(only), set()
    query = select(*columns)
    if sources and not known and not wanted:
        query = query.where(candidates.c.source.in_(sources))  # not the whole of a large store
    for image, prompt, category, source in connection.execute(query):
        if (image, prompt) in known or (image, prompt) in wanted:
            found.add((image, prompt))
        if (image, prompt) in known:
            golden.setdefault((prompt, category), []).append(image)
        elif (not wanted or (image, prompt) in wanted) and (not sources or source in sources):
            ordinary.setdefault((prompt, category), []).append(image)
    lost = sorted((set(known) | wanted) - found)
    if lost:
        raise FeedbackError(
            f"campaign {campaign_id!r}: {len(lost)} named image(s) are no candidates of the store, such as "
            f"{lost[0]!r}; add them first"
        )
    if not ordinary:
        where = f" of the sources {', '.join(sources)}" if sources else ""
        raise FeedbackError(f"campaign {campaign_id!r}: the store holds no candidates{where} to judge")
    draw = random.Random(f"campaign {seed}")
    rows = list(_groups(ordinary, images_per_task, draw))
    for row in _groups(golden, images_per_task, draw):
        verdicts = [known[image, row["prompt"]] for image in json.loads(row["images"])]
        rows.append({**row, "gold": json.dumps(verdicts), "wanted": 0})
    draw.shuffle(rows)
    return rows


def _groups(
    images: Mapping[tuple[str, str], Sequence[str]], size: int, draw: random.Random
) -> Iterator[TaskRow]:
    for (prompt, category), digests in sorted(images.items()):
        mixed = sorted(digests)
        draw.shuffle(mixed)
        for start in range(0, len(mixed), size):
            part = mixed[start : start + size]
            yield {"prompt": prompt, "category": category, "images": json.dumps(part)}


def comparison_tasks(items: Sequence[ComparisonItem], seed: int) -> list[TaskRow]:
    """Both questions of every comparison, the sides shuffled for each, in an order drawn by `seed`."""
    draw = random.Random(f"campaign {seed}")
    rows: list[TaskRow] = []
    for number, item in enumerate(items):
        for question in QUESTIONS:
            swapped = draw.random() < 0.5
            left, right = (item.second, item.first) if swapped else (item.first, item.second)
            rows.append(
                {
                    "prompt": item.prompt, "category": item.category, "question": question, "item": number,
                    "images": json.dumps(list(left)), "right_images": json.dumps(list(right)),
                    "swapped": swapped,
                }
            )  # fmt: skip
    draw.shuffle(rows)
    return rows


def alignment_content(
    sources: Sequence[str], only: Sequence[tuple[str, str]], images_per_task: int, gold: Sequence[Gold]
) -> dict[str, Any]:
    """What was asked for, apart from the settings."""
    for item in gold:
        check_gold(item)
    golden = sorted([item.image, item.prompt, item.verdict] for item in gold)
    if len({(image, prompt) for image, prompt, _ in golden}) < len(golden):
        raise FeedbackError("a gold image is given twice for one prompt")
    return {
        "sources": sorted(set(sources)),
        "only": sorted(set(only)),
        "images_per_task": images_per_task,
        "gold": golden,
    }


def comparison_content(items: Sequence[ComparisonItem]) -> dict[str, Any]:
    """What was asked for, apart from the settings."""
    if not items:
        raise FeedbackError("a comparison campaign needs at least one comparison")
    for number, item in enumerate(items):
        check_item(item, number)
    return {"items": [[i.prompt, i.category, list(i.first), list(i.second)] for i in items]}
