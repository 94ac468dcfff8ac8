"""Who judges what: leases and expiry, each a transaction on an open connection. Answers: `answering`.

Order of locks, so that nobody waits in a circle (PostgreSQL; SQLite has one writer at a time): the rater's
row of the campaign, then tasks by rising id, then places.
"""

import dataclasses
import datetime
import hashlib
import json
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, exists, select, update
from sqlalchemy.dialects import postgresql, sqlite

from accord.feedback.campaign_records import (
    ExcludedError,
    NotFoundError,
    Task,
)
from accord.feedback.campaign_tables import (
    TASKS_PER_CAMPAIGN,
    campaign_raters,
    exclusions,
    places,
    tasks,
)

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


is_excluded = exists().where(exclusions.c.rater == campaign_raters.c.rater).label("excluded")


def check_welcome(desk: Desk, excluded: object) -> None:
    """Raises ExcludedError when the statement that asked `is_excluded` found that he is."""
    if excluded:
        raise ExcludedError(f"the rater {desk.rater!r} was excluded; judgements of his are no longer taken")


def upsert(connection: Connection) -> Any:
    """The `insert` of the database's dialect, which knows ON CONFLICT."""
    return sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert


def seat_of(desk: Desk) -> ColumnElement[bool]:
    """The condition on the rater's row of the campaign."""
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
    any_returned, held = _look_around(desk)
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
    found = _returned(desk) if any_returned else None
    if found is not None:
        return _take(desk, found, desk.cursor)
    # In order, each rater goes past what others are just taking; from the beginning again he finds it.
    for after in dict.fromkeys((desk.cursor, 0)):
        found = _in_order(desk, after)
        if found is not None:
            return _take(desk, found, found.id)
    found = _last_look(desk)
    return None if found is None else _take(desk, found, desk.cursor)


def _look_around(desk: Desk) -> tuple[bool, list[Row[Any]]]:
    """Whether any task was given back; and what the rater holds, oldest first, each with its `place`."""
    first, last = task_range(desk.campaign)
    mine = and_(
        places.c.rater == campaign_raters.c.rater,
        places.c.state == "leased",
        places.c.task.between(first, last),
    )
    held = places.join(tasks, places.c.task == tasks.c.id)
    back = tasks.alias("back")
    is_back = and_(back.c.campaign == desk.campaign.number, back.c.returned, back.c.taken < back.c.wanted)
    query = (
        select(is_excluded, exists().where(is_back).label("any"), places.c.id.label("place"), tasks)
        .select_from(campaign_raters.outerjoin(held, mine))
        .where(seat_of(desk))
        .order_by(places.c.id)
    )
    rows = desk.connection.execute(query).all()
    check_welcome(desk, rows[0].excluded)
    return rows[0].any, [row for row in rows if row.place is not None]


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
    # OFFSET 0 keeps PostgreSQL from making a join of it, for which it may read all places of the store to
    # find one task. So it looks at one task after the other, by the index of tasks and raters.
    mine = and_(places.c.task == tasks.c.id, places.c.rater == desk.rater, _active)
    seen = select(places.c.id).where(mine).offset(0).exists()
    return and_(tasks.c.campaign == desk.campaign.number, ~seen)


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
    occupy(desk, task)
    values = {"leases": desk.leases + 1, "cursor": cursor}
    desk.connection.execute(update(campaign_raters).where(seat_of(desk)).values(values))
    return _shown(desk, task.id, task)


def occupy(desk: Desk, task: Row[Any]) -> None:
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


def ran_out(campaign: Row[Any], now_ms: int) -> tuple[ColumnElement[bool], ...]:
    """The conditions on places whose lease ran out."""
    ours = places.c.task.between(*task_range(campaign))
    # "More than 0" says no more than the index of leases that run out: the others do without that one.
    return places.c.state == "leased", places.c.expires_ms > 0, places.c.expires_ms <= now_ms, ours


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
