"""Who judges what: leases, answers, undo and expiry, each a transaction on an open connection.

Order of locks, so that nobody waits in a circle (PostgreSQL; SQLite has one writer at a time): the rater's
row of the campaign, then tasks by rising id, then places.
"""

import dataclasses
import datetime
import hashlib
import json
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, exists, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from accord.feedback.campaign_records import (
    AnsweredError,
    ExcludedError,
    LeaseError,
    NotFoundError,
    Task,
    check_answer,
)
from accord.feedback.campaign_tables import (
    TASKS_PER_CAMPAIGN,
    answers,
    campaign_raters,
    exclusions,
    places,
    tasks,
)
from accord.feedback.counting import standing
from accord.feedback.tables import judgements

GOLD_EVERY = 10
"""One of so many tasks that a rater takes is a gold one, as long as there are any that he has not seen."""

_SWEEP = 50  # leases given back at once
_RETRIES = 20  # tasks waited for when all that are left are being taken by others

_active = places.c.state.in_(("leased", "answered"))


@dataclasses.dataclass(frozen=True)
class Desk:
    """One rater at one campaign, at one moment."""

    connection: Connection
    campaign: Row[Any]
    rater: str
    now_ms: int
    cursor: int
    """The last task that the rater got in order."""
    leases: int
    """How many new tasks he has got."""
    last_answer_ms: int
    counted: int
    """Places of his that are answered, gold apart."""

    @property
    def expires_ms(self) -> int:
        return self.now_ms + round(float(self.campaign.lease_s) * 1000)


def sit_down(connection: Connection, campaign: Row[Any], rater: str, now_ms: int) -> Desk:
    """Locks the rater's row of the campaign, so that two devices of one rater take turns.

    Whether he is excluded is asked after that, by a statement of its own: one that waits for a lock still
    reads what was there before it waited (PostgreSQL).
    """
    seats = campaign_raters
    columns = (seats.c.cursor, seats.c.leases, seats.c.last_answer_ms, seats.c.counted)
    mine = and_(seats.c.campaign == campaign.number, seats.c.rater == rater)
    seat = connection.execute(select(*columns).where(mine).with_for_update()).first()
    if seat is None:
        numbers = {"cursor": 0, "leases": 0, "last_answer_ms": 0, "answered": 0, "counted": 0}
        new = upsert(connection)(seats).values(campaign=campaign.number, rater=rater, **numbers)
        locked = new.on_conflict_do_update(
            index_elements=["campaign", "rater"], set_={"leases": seats.c.leases}
        )
        seat = connection.execute(locked.returning(*columns)).one()
    return Desk(connection, campaign, rater, now_ms, *seat)


_excluded = exists().where(exclusions.c.rater == campaign_raters.c.rater).label("excluded")


def _check_welcome(desk: Desk, excluded: object) -> None:
    if excluded:
        raise ExcludedError(f"the rater {desk.rater!r} was excluded; judgements of his are no longer taken")


def upsert(connection: Connection) -> Any:
    """The `insert` of the database's dialect, which knows ON CONFLICT."""
    return sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert


def _seat(desk: Desk) -> ColumnElement[bool]:
    return and_(campaign_raters.c.campaign == desk.campaign.number, campaign_raters.c.rater == desk.rater)


def moment(now_ms: int) -> datetime.datetime:
    """Milliseconds since 1970 as a time."""
    return datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC)


def task_name(campaign_id: str, task: int) -> str:
    return f"{campaign_id}.{task % TASKS_PER_CAMPAIGN}"


def parse_task(task_id: str) -> tuple[str, int]:
    """The campaign's id and the task's number in it.

    Raises:
        NotFoundError: no task can have this id.
    """
    name, _, number = str(task_id).rpartition(".")
    if not name or not (number.isascii() and number.isdigit() and len(number) <= 10):
        raise NotFoundError(f"there is no task {task_id!r}")
    if int(number) >= TASKS_PER_CAMPAIGN:
        raise NotFoundError(f"there is no task {task_id!r}")
    return name, int(number)


def lease(desk: Desk, besides: str | None) -> Task | None:
    """The oldest task that the rater holds, other than `besides`; else a new one; None when none is left.

    Raises:
        ExcludedError: the rater was excluded.
    """
    held = _held(desk)
    for row in held:
        if task_name(desk.campaign.campaign_id, row.id) == besides:
            continue
        renewed = desk.connection.execute(
            update(places)
            .where(places.c.id == row.place, places.c.state == "leased")
            .values(expires_ms=desk.expires_ms)
        )
        if renewed.rowcount:
            return _shown(desk, row.id, row)
    found = _gold(desk)
    if found is not None:
        return _take(desk, found, desk.cursor)
    if (
        desk.counted + sum(row.gold is None for row in held)
        >= desk.campaign.num_tasks - desk.campaign.num_gold
    ):
        return None  # he has had every task: known without looking at any
    found = _returned(desk)
    if found is not None:
        return _take(desk, found, desk.cursor)
    # In order, each rater goes past what others are just taking; from the beginning again he finds it.
    for after in dict.fromkeys((desk.cursor, 0)):
        found = _in_order(desk, after)
        if found is not None:
            return _take(desk, found, found.id)
    found = _last_look(desk)
    return None if found is None else _take(desk, found, desk.cursor)


def _held(desk: Desk) -> list[Row[Any]]:
    """The tasks that the rater holds, oldest first, each with the id of his `place`."""
    first, last = task_range(desk.campaign)
    mine = and_(
        places.c.rater == campaign_raters.c.rater,
        places.c.state == "leased",
        places.c.task.between(first, last),
    )
    held = places.join(tasks, places.c.task == tasks.c.id)
    query = (
        select(_excluded, places.c.id.label("place"), tasks)
        .select_from(campaign_raters.outerjoin(held, mine))
        .where(_seat(desk))
        .order_by(places.c.id)
    )
    rows = desk.connection.execute(query).all()
    _check_welcome(desk, rows[0].excluded)
    return [row for row in rows if row.place is not None]


def task_range(campaign: Row[Any]) -> tuple[int, int]:
    return campaign.number * TASKS_PER_CAMPAIGN, (campaign.number + 1) * TASKS_PER_CAMPAIGN - 1


def _shown(desk: Desk, task: int, row: Row[Any]) -> Task:
    return Task(
        task_id=task_name(desk.campaign.campaign_id, task),
        campaign_id=desk.campaign.campaign_id,
        kind=desk.campaign.kind,
        prompt=row.prompt,
        images=tuple(json.loads(row.images)),
        right_images=tuple(json.loads(row.right_images)),
        question=row.question,
        expires_at=moment(desk.expires_ms),
    )


def _not_mine(desk: Desk) -> ColumnElement[bool]:
    mine = exists().where(places.c.task == tasks.c.id, places.c.rater == desk.rater, _active)
    return and_(tasks.c.campaign == desk.campaign.number, ~mine)


def _gold(desk: Desk) -> Row[Any] | None:
    """A gold task, when it is time for one: at a place in each `GOLD_EVERY` that the rater cannot guess."""
    if not desk.campaign.num_gold:
        return None
    block, place = divmod(desk.leases, GOLD_EVERY)
    drawn = hashlib.sha256(f"gold {desk.campaign.seed} {desk.rater} {block}".encode()).digest()
    if place != drawn[0] % GOLD_EVERY:
        return None
    found = select(tasks).where(tasks.c.gold.is_not(None), _not_mine(desk)).order_by(tasks.c.id).limit(1)
    return desk.connection.execute(found).first()


def _returned(desk: Desk) -> Row[Any] | None:
    """A task that was given back before."""
    query = (
        select(tasks)
        .where(tasks.c.returned, tasks.c.taken < tasks.c.wanted, _not_mine(desk))
        .order_by(tasks.c.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=tasks)
    )
    return desk.connection.execute(query).first()


def _in_order(desk: Desk, after: int) -> Row[Any] | None:
    """The next open task after that one: found at once, however many there are."""
    first, last = task_range(desk.campaign)
    ahead = tasks.c.id.between(max(after + 1, first), last)
    query = (
        select(tasks)
        .where(tasks.c.taken < tasks.c.wanted, ahead, _not_mine(desk))
        .order_by(tasks.c.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=tasks)
    )
    return desk.connection.execute(query).first()


def _last_look(desk: Desk) -> Row[Any] | None:
    """Any open task at all, waiting for those that others are just taking or giving back."""
    is_open = and_(tasks.c.taken < tasks.c.wanted, _not_mine(desk))
    query = select(tasks.c.id).where(is_open).order_by(tasks.c.id).limit(_RETRIES)
    for task in desk.connection.execute(query).scalars().all():
        found = desk.connection.execute(
            select(tasks).where(tasks.c.id == task).with_for_update(of=tasks)
        ).one()
        if found.taken < found.wanted:
            return found
    return None


def _take(desk: Desk, task: Row[Any], cursor: int) -> Task:
    _occupy(desk, task)
    values = {"leases": desk.leases + 1, "cursor": cursor}
    desk.connection.execute(update(campaign_raters).where(_seat(desk)).values(values))
    return _shown(desk, task.id, task)


def _occupy(desk: Desk, task: Row[Any]) -> None:
    """Leases the rater a place of a task whose lock we hold and that has one free."""
    values = {
        "state": "leased", "slot": free_slot(desk.connection, task), "leased_ms": desk.now_ms,
        "expires_ms": desk.expires_ms,
    }  # fmt: skip
    new = upsert(desk.connection)(places).values(task=task.id, rater=desk.rater, **values)
    desk.connection.execute(new.on_conflict_do_update(index_elements=["task", "rater"], set_=values))
    count_places(desk.connection, task.id, taken=1)


def free_slot(connection: Connection, task: Row[Any]) -> int | None:
    """A slot that is free in a task whose lock we hold; gold tasks have none."""
    if task.gold is not None:
        return None
    if not task.taken:
        return 0
    query = select(places.c.slot).where(places.c.task == task.id, places.c.slot.is_not(None))
    return min(set(range(task.wanted)) - set(connection.execute(query).scalars()))


def count_places(
    connection: Connection, task: int, *, taken: int = 0, answered: int = 0, expiries: int = 0
) -> None:
    values: dict[str, Any] = {
        "taken": tasks.c.taken + taken,
        "answered": tasks.c.answered + answered,
        "expiries": tasks.c.expiries + expiries,
    }
    if taken < 0:
        values["returned"] = True
    connection.execute(update(tasks).where(tasks.c.id == task).values(values))


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
        _occupy(desk, locked)
    _record(desk, locked, place.leased_ms, given, text, key)
    return True


_event = (answers.c.id.label("event"), answers.c.campaign, answers.c.task, answers.c.kind, answers.c.answer)


def _place_and_answer(desk: Desk, task: int, key: str) -> Row[Any]:
    """The rater's place of a task, and what was stored before under this key; nulls for what is not there."""
    mine = and_(places.c.task == task, places.c.rater == campaign_raters.c.rater)
    query = (
        select(_excluded, places.c.state, places.c.leased_ms, *_event, answers.c.rater.label("by"))
        .select_from(
            campaign_raters.outerjoin(places, mine).outerjoin(answers, answers.c.idempotency_key == key)
        )
        .where(_seat(desk))
    )
    found = desk.connection.execute(query).one()
    _check_welcome(desk, found.excluded)
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
    desk.connection.execute(update(campaign_raters).where(_seat(desk)).values(values))


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


def ran_out(campaign: Row[Any], now_ms: int) -> tuple[ColumnElement[bool], ...]:
    """The conditions on places whose lease ran out."""
    ours = places.c.task.between(*task_range(campaign))
    return places.c.state == "leased", places.c.expires_ms <= now_ms, ours


def sweep(connection: Connection, campaign: Row[Any], now_ms: int) -> int:
    """Gives back leases that ran out; how many."""
    late = ran_out(campaign, now_ms)
    query = select(places.c.task).where(*late).limit(_SWEEP)
    freed = 0
    for task in sorted(set(connection.execute(query).scalars())):
        lock = select(tasks.c.id).where(tasks.c.id == task).with_for_update(skip_locked=True)
        if connection.execute(lock).first() is None:
            continue
        done = connection.execute(
            update(places).where(*late, places.c.task == task).values(state="expired", slot=None)
        )
        if done.rowcount:
            count_places(connection, task, taken=-done.rowcount, expiries=done.rowcount)
            freed += done.rowcount
    return freed
