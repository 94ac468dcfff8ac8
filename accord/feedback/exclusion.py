"""Raters who are excluded, and taken back: what becomes of their places. Each step is one transaction.

An exclusion and its end are events. Excluded, a rater's places are given back. Taken back, he gets those that
are still free, and his judgements count again; answers whose places others took meanwhile are taken back (an
undo of the service's own), so that no item has more judgements than wanted.
"""

from typing import Any

from sqlalchemy import Connection, Row, and_, delete, insert, or_, select, update

from accord.feedback.assignment import count_places, free_slot, moment
from accord.feedback.campaign_tables import (
    answers,
    campaign_raters,
    exclusion_events,
    exclusions,
    places,
    tasks,
)
from accord.feedback.counting import standing


class PlacesLeftError(Exception):
    """Places of a rater are still given back."""


def exclude(connection: Connection, rater: str, reason: str, now_ms: int) -> None:
    """From now on he is excluded; the first reason stays."""
    _lock_seats(connection, rater)
    if _is_excluded(connection, rater):
        return
    row = {"rater": rater, "reason": reason, "created_at": moment(now_ms)}
    connection.execute(insert(exclusions).values(row))
    connection.execute(insert(exclusion_events).values({**row, "kind": "exclude"}))


def withdraw(connection: Connection, rater: str, limit: int = 500) -> int:
    """Gives back places of a rater who was excluded, some at a time; how many. 0 once he was taken back."""
    _lock_seats(connection, rater)
    if not _is_excluded(connection, rater):
        return 0
    mine = and_(places.c.rater == rater, or_(places.c.state == "leased", places.c.state == "answered"))
    query = select(places.c.task).where(mine).order_by(places.c.task).limit(limit)
    found = connection.execute(query).scalars().all()
    for number in found:
        task = _locked(connection, number)
        place = connection.execute(select(places).where(mine, places.c.task == number)).first()
        if place is None:
            continue
        connection.execute(update(places).where(places.c.id == place.id).values(state="withdrawn", slot=None))
        answered = place.state == "answered"
        count_places(connection, number, taken=-1, answered=-answered)
        if answered and task.gold is None:
            _count_seat(connection, task, rater, counted=-1)
    return len(found)


def restore(connection: Connection, rater: str, now_ms: int, limit: int = 500) -> tuple[int, int]:
    """Gives an excluded rater places again, some at a time: how many were looked at, and how many are his."""
    _lock_seats(connection, rater)
    if not _is_excluded(connection, rater):
        return 0, 0
    withdrawn = and_(places.c.rater == rater, places.c.state == "withdrawn")
    query = select(places.c.id, places.c.task).where(withdrawn).order_by(places.c.task).limit(limit)
    found = connection.execute(query).all()
    restored = 0
    for place, number in found:
        task = _locked(connection, number)
        mine = and_(answers.c.task == number, answers.c.rater == rater, standing())
        answer = connection.execute(select(answers.c.id).where(mine)).scalar()
        values: dict[str, Any] = {"state": "expired", "slot": None}
        if answer is not None and (task.gold is not None or task.taken < task.wanted):
            values = {"state": "answered", "slot": free_slot(connection, task)}
            count_places(connection, number, taken=1, answered=1)
            if task.gold is None:
                _count_seat(connection, task, rater, counted=1)
            restored += 1
        elif answer is not None:
            _take_back(connection, task, rater, answer, now_ms)
        connection.execute(update(places).where(places.c.id == place).values(values))
    return len(found), restored


def include(connection: Connection, rater: str, reason: str, now_ms: int) -> bool:
    """Ends an exclusion; False when he was not excluded.

    Raises:
        PlacesLeftError: `restore` has not looked at all of his places: somebody gave some back meanwhile.
    """
    _lock_seats(connection, rater)
    if not _is_excluded(connection, rater):
        return False
    withdrawn = select(places.c.id).where(places.c.rater == rater, places.c.state == "withdrawn").limit(1)
    if connection.execute(withdrawn).first() is not None:
        raise PlacesLeftError
    connection.execute(delete(exclusions).where(exclusions.c.rater == rater))
    row = {"rater": rater, "kind": "include", "reason": reason, "created_at": moment(now_ms)}
    connection.execute(insert(exclusion_events).values(row))
    return True


def _lock_seats(connection: Connection, rater: str) -> None:
    """After this no answer of his is under way; those that follow see what this transaction does."""
    seats = select(campaign_raters.c.rater).where(campaign_raters.c.rater == rater)
    connection.execute(seats.order_by(campaign_raters.c.campaign).with_for_update()).all()


def _is_excluded(connection: Connection, rater: str) -> bool:
    return connection.execute(select(exclusions).where(exclusions.c.rater == rater)).first() is not None


def _locked(connection: Connection, task: int) -> Row[Any]:
    return connection.execute(select(tasks).where(tasks.c.id == task).with_for_update()).one()


def _count_seat(connection: Connection, task: Row[Any], rater: str, **changes: int) -> None:
    seat = and_(campaign_raters.c.campaign == task.campaign, campaign_raters.c.rater == rater)
    values = {name: campaign_raters.c[name] + change for name, change in changes.items()}
    connection.execute(update(campaign_raters).where(seat).values(values))


def _take_back(connection: Connection, task: Row[Any], rater: str, answer: int, now_ms: int) -> None:
    event = {
        "idempotency_key": f"included again {answer}", "campaign": task.campaign, "task": task.id,
        "rater": rater, "kind": "undo", "answer": "", "undoes": answer, "created_at": moment(now_ms),
    }  # fmt: skip
    connection.execute(insert(answers).values(event))
    _count_seat(connection, task, rater, answered=-1)
