"""What raters answered: counted, and taken back. Each is a transaction on an open connection.

The order of locks is that of `accord.feedback.assignment`.
"""

import json
from typing import Any

from sqlalchemy import Row, and_, insert, select, update

from accord.feedback.assignment import (
    Desk,
    check_welcome,
    count_places,
    is_excluded,
    moment,
    occupy,
    seat_of,
    task_name,
)
from accord.feedback.campaign_records import AnsweredError, LeaseError, NotFoundError, check_answer
from accord.feedback.campaign_tables import TASKS_PER_CAMPAIGN, answers, campaign_raters, places, tasks
from accord.feedback.counting import standing
from accord.feedback.tables import judgements


def submit(desk: Desk, number: int, answer: object, key: str) -> bool:
    """Counts an answer; False when this very answer was counted before.

    Raises:
        NotFoundError: the campaign has no task of this number.
        AnsweredError, ExcludedError, LeaseError: it cannot be counted; the message says why.
        FeedbackError: it is no answer to this task, or the key was used for another.
    """
    task = desk.campaign.number * TASKS_PER_CAMPAIGN + number
    name = task_name(desk.campaign.campaign_id, task)
    locked = desk.connection.execute(select(tasks).where(tasks.c.id == task).with_for_update()).first()
    if locked is None:
        raise NotFoundError(f"there is no task {name!r}")
    given = check_answer(desk.campaign.kind, len(json.loads(locked.images)), answer)
    text = json.dumps(given)
    place = _place_and_answer(desk, task, key)
    if _counted_before(desk, place, key, task, "answer", text):
        return False
    if place.state is None:
        raise LeaseError(f"the task {name!r} was never leased to {desk.rater!r}; lease it first")
    if place.state == "answered":
        raise AnsweredError(
            f"{desk.rater!r} answered the task {name!r} before, with another idempotency key; undo that "
            "answer first to change it"
        )
    if place.state != "leased":
        if locked.gold is None and locked.taken >= locked.wanted:
            raise LeaseError(
                f"the lease of the task {name!r} ran out, and others have judged it since; this answer was "
                "not counted, lease another task"
            )
        occupy(desk, locked)
    _record(desk, locked, place.leased_ms, given, text, key)
    return True


_event = (answers.c.id.label("event"), answers.c.campaign, answers.c.task, answers.c.kind, answers.c.answer)


def _place_and_answer(desk: Desk, task: int, key: str) -> Row[Any]:
    """The rater's place of a task, and what was stored before under this key; nulls for what is not there."""
    mine = and_(places.c.task == task, places.c.rater == campaign_raters.c.rater)
    query = (
        select(is_excluded, places.c.state, places.c.leased_ms, *_event, answers.c.rater.label("by"))
        .select_from(
            campaign_raters.outerjoin(places, mine).outerjoin(answers, answers.c.idempotency_key == key)
        )
        .where(seat_of(desk))
    )
    found = desk.connection.execute(query).one()
    check_welcome(desk, found.excluded)
    return found


def _counted_before(desk: Desk, found: Row[Any], key: str, task: int | None, kind: str, text: str) -> bool:
    if found.event is None:
        return False
    if (found.by, found.kind, found.campaign) == (desk.rater, kind, desk.campaign.number) and (
        kind == "undo" or (found.task, found.answer) == (task, text)
    ):
        return True
    raise AnsweredError(
        f"the idempotency key {key!r} was used before for something else; every answer and every undo needs "
        "a key of its own (nothing was stored)"
    )


def _record(desk: Desk, task: Row[Any], leased_ms: int, given: list[str] | str, text: str, key: str) -> None:
    connection = desk.connection
    # A task that was fetched ahead was not looked at before the one before it was answered.
    seconds = max(0, desk.now_ms - max(leased_ms, desk.last_answer_ms)) / 1000
    mine = and_(places.c.task == task.id, places.c.rater == desk.rater)
    connection.execute(update(places).where(mine).values(state="answered"))
    count_places(connection, task.id, answered=1)
    _count_answers(desk, +1, task.gold, last_answer_ms=desk.now_ms)
    now = moment(desk.now_ms)
    event = {
        "idempotency_key": key, "campaign": desk.campaign.number, "task": task.id, "rater": desk.rater,
        "kind": "answer", "answer": text, "seconds": seconds, "created_at": now,
    }  # fmt: skip
    done = connection.execute(insert(answers).values(event))
    if isinstance(given, str):
        return
    assert done.inserted_primary_key is not None
    shared = {
        "prompt": task.prompt, "rater": desk.rater, "created_at": now,
        "answer_id": done.inserted_primary_key[0],
    }  # fmt: skip
    pairs = enumerate(zip(json.loads(task.images), given, strict=True))
    names = f"{desk.campaign.campaign_id}/{key}"
    rows = [
        {**shared, "idempotency_key": f"{names}/{number}", "image": image, "verdict": verdict}
        for number, (image, verdict) in pairs
    ]
    connection.execute(insert(judgements), rows)


def _count_answers(desk: Desk, number: int, gold: str | None, **values: Any) -> None:
    values["answered"] = campaign_raters.c.answered + number
    if gold is None:
        values["counted"] = campaign_raters.c.counted + number
    desk.connection.execute(update(campaign_raters).where(seat_of(desk)).values(values))


def undo(desk: Desk, key: str) -> str | None:
    """Takes back the rater's last answer and leases its task to him again; its id, None without an answer.

    Raises:
        AnsweredError, ExcludedError: as `submit`.
    """
    connection = desk.connection
    before = _place_and_answer(desk, 0, key)
    if _counted_before(desk, before, key, None, "undo", ""):
        return None if before.task is None else task_name(desk.campaign.campaign_id, before.task)
    mine = and_(answers.c.campaign == desk.campaign.number, answers.c.rater == desk.rater, standing())
    last = connection.execute(select(answers).where(mine).order_by(answers.c.id.desc()).limit(1)).first()
    event = {
        "idempotency_key": key, "campaign": desk.campaign.number, "rater": desk.rater, "kind": "undo",
        "answer": "", "created_at": moment(desk.now_ms),
        "task": None if last is None else last.task, "undoes": None if last is None else last.id,
    }  # fmt: skip
    connection.execute(insert(answers).values(event))
    if last is None:
        return None
    lock = select(tasks.c.gold).where(tasks.c.id == last.task).with_for_update()
    _count_answers(desk, -1, connection.execute(lock).scalar_one())
    place = and_(places.c.task == last.task, places.c.rater == desk.rater)
    again = {"state": "leased", "leased_ms": desk.now_ms, "expires_ms": desk.expires_ms}
    connection.execute(update(places).where(place).values(again))
    count_places(connection, last.task, answered=-1)
    return task_name(desk.campaign.campaign_id, last.task)
