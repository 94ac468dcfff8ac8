"""The store of candidates and judgements, on SQLite or any other database that SQLAlchemy knows.

A judgement whose `submit` returned is durable. All methods may be called from many threads and processes at
once.
"""

import dataclasses
import datetime
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Column, Connection, Select, Table, and_, func, insert, select

from accord.errors import FeedbackError
from accord.feedback.aggregate import VoteCount, shares_by_category
from accord.feedback.campaign_tables import tasks
from accord.feedback.comparisons import Compared, read_compared, store_compared
from accord.feedback.counting import counted
from accord.feedback.database import Database
from accord.feedback.tables import (
    Candidate,
    Judgement,
    candidates,
    check_candidate,
    check_judgement,
    images,
    judgements,
)

_ROWS_PER_QUERY = 500  # SQLite and PostgreSQL bound the number of parameters of a statement
_LISTED = 3  # how many wrong things an error names


@dataclasses.dataclass(frozen=True)
class Judged:
    """A judged candidate, and its votes: (rater, verdict)."""

    category: str
    split: str
    votes: list[tuple[str, str]]


class FeedbackStore:
    """Images to judge, and what was judged of them.

    Every call that writes is one transaction: all of it is stored, or nothing.
    """

    def __init__(self, url: str) -> None:
        """Open the store at a database URL ("sqlite:////path/feedback.db", "postgresql://user:password@host/db").

        Missing tables are made.

        Raises:
            FeedbackError: the URL cannot be read, or the database does not answer. A password is never shown.
        """
        self._database = Database(url)

    def __repr__(self) -> str:
        return f"FeedbackStore({str(self._database)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def add_candidates(self, new: Iterable[Candidate]) -> int:
        """Store candidates, and return how many are new. One with the same image and prompt stays as it is.

        Raises:
            FeedbackError: a field that cannot be stored, or a candidate that contradicts the stored one in
                category, split or size. (Its seed may differ: two seeds can give the same image.)
            StorageError: the disk is full.
        """
        wanted: dict[tuple[str, str], Candidate] = {}
        for candidate in new:
            check_candidate(candidate)
            _check_same_candidate(
                wanted.setdefault((candidate.image, candidate.prompt), candidate), candidate
            )
        return (
            self._database.write(lambda connection: _insert_candidates(connection, wanted)) if wanted else 0
        )

    def submit(self, new: Iterable[Judgement]) -> int:
        """Store judgements durably, and return how many are new. The same idempotency key counts once.

        A second judgement of a candidate by the same rater under another key is another judgement.

        Raises:
            FeedbackError: an unknown image, prompt or verdict, or a key that was used for another judgement.
            StorageError: the disk is full.
        """
        wanted: dict[str, Judgement] = {}
        for judgement in new:
            check_judgement(judgement)
            _check_same_judgement(wanted.setdefault(judgement.idempotency_key, judgement), judgement)
        return (
            self._database.write(lambda connection: _insert_judgements(connection, wanted)) if wanted else 0
        )

    def has_candidate(self, image: str, prompt: str) -> bool:
        """Whether this image of this prompt is stored."""
        query = select(candidates.c.id).where(candidates.c.image == image, candidates.c.prompt == prompt)
        with self._database.reading() as connection:
            return connection.execute(query).first() is not None

    def candidates(self) -> list[Candidate]:
        """All candidates, by image and prompt."""
        with self._database.reading() as connection:
            return _sorted_candidates(connection, _candidates_query())

    def judgements(self, *, everything: bool = False) -> list[Judgement]:
        """The judgements that count, oldest first; those of one `submit` by their key.

        Taken back ones, and those of excluded raters, are there too when `everything` is wanted.
        """
        query = _judgements_query().order_by(judgements.c.id)
        if not everything:
            query = query.where(counted())
        with self._database.reading() as connection:
            return [Judgement(**row) for row in connection.execute(query).mappings()]

    def pending(self, k: int) -> list[Candidate]:
        """The candidates that fewer than `k` raters judged (a skip counts too), by image and prompt."""
        votes = judgements
        counts = (
            select(votes.c.image, votes.c.prompt, func.count(votes.c.rater.distinct()).label("count"))
            .where(counted())
            .group_by(votes.c.image, votes.c.prompt)
            .subquery()
        )
        same = and_(counts.c.image == candidates.c.image, counts.c.prompt == candidates.c.prompt)
        query = _candidates_query().outerjoin(counts, same).where(func.coalesce(counts.c["count"], 0) < k)
        with self._database.reading() as connection:
            return _sorted_candidates(connection, query)

    def vote_counts(self) -> list[VoteCount]:
        """How often each verdict was given to each judged candidate, by image, prompt and verdict.

        Only what counts: not what was taken back, nor what excluded raters said.
        One statement, and so one moment: judgements that arrive meanwhile are in all of it or in none of it.
        """
        votes = judgements
        columns = (votes.c.image, votes.c.prompt, candidates.c.category, candidates.c.split, votes.c.verdict)
        same = and_(votes.c.image == candidates.c.image, votes.c.prompt == candidates.c.prompt)
        query = (
            select(*columns, func.count().label("count"))
            .join(candidates, same)
            .where(counted())
            .group_by(*columns)
        )
        with self._database.reading() as connection:
            found = [VoteCount(**row) for row in connection.execute(query).mappings()]
        # Sorted here: databases differ in how they order text.
        return sorted(found, key=lambda row: (row.image, row.prompt, row.verdict))

    def judged(self) -> dict[tuple[str, str], Judged]:
        """What counts of each judged candidate, ordered by (image, prompt), its votes by rater and verdict.

        One statement, and so one moment, as `vote_counts`.
        """
        votes = judgements
        same = and_(votes.c.image == candidates.c.image, votes.c.prompt == candidates.c.prompt)
        columns = (votes.c.image, votes.c.prompt, candidates.c.category, candidates.c.split)
        query = select(*columns, votes.c.rater, votes.c.verdict).join(candidates, same).where(counted())
        found: dict[tuple[str, str], Judged] = {}
        with self._database.reading() as connection:
            streamed = connection.execution_options(yield_per=10_000).execute(query)
            for image, prompt, category, split, rater, verdict in streamed:
                item = found.setdefault((image, prompt), Judged(category, split, []))
                item.votes.append((sys.intern(rater), sys.intern(verdict)))
        for item in found.values():
            item.votes.sort()
        return dict(sorted(found.items()))

    def compared(
        self, named: Collection[str] = (), only: Collection[tuple[str, str]] | None = None
    ) -> list[Compared]:
        """The answers to comparisons that count, in order.

        Args:
            named: ids of campaigns whose answers are all read.
            only: in the others, comparisons of these (image, prompt) alone. Without it, every comparison.
        """
        with self._database.reading() as connection:
            return read_compared(connection, named, only)

    def add_compared(self, campaign_id: str, title: str, items: Sequence[Compared]) -> int:
        """Store comparisons answered elsewhere as a campaign, complete; how many answers are new.

        Made again of the same answers it is the same campaign.

        Raises:
            FeedbackError: what cannot be stored, or a campaign of that id with other content.
            StorageError: the disk is full.
        """
        return self._database.write(lambda now: store_compared(now, campaign_id, title, items))

    def gold(self) -> dict[tuple[str, str], bool]:
        """The known answers of gold items, by (image, prompt); True is good. Contradictions are left out."""
        query = select(tasks.c.prompt, tasks.c.images, tasks.c.gold).where(tasks.c.gold.is_not(None))
        found: dict[tuple[str, str], set[bool]] = {}
        with self._database.reading() as connection:
            for prompt, digests, known in connection.execute(query):
                for image, verdict in zip(json.loads(digests), json.loads(known), strict=True):
                    found.setdefault((image, prompt), set()).add(verdict == "good")
        return {key: truth.pop() for key, truth in found.items() if len(truth) == 1}

    def distribution(self) -> dict[str, dict[str, float]]:
        """Shares of good, bad and skip by category and in "total" (Lee et al. 2023, table 2)."""
        return shares_by_category(self.vote_counts())


def _insert_candidates(connection: Connection, wanted: Mapping[tuple[str, str], Candidate]) -> int:
    digests = sorted({image for image, _ in wanted})
    stored_images = {
        row["digest"]: row for row in _rows(connection, select(images), images.c.digest, digests)
    }
    stored = _stored_candidates(connection, digests)
    new_images: dict[str, dict[str, Any]] = {}
    new: list[dict[str, Any]] = []
    # In one order for all writers, so that no two of them wait for each other.
    for key, candidate in sorted(wanted.items()):
        image = {"digest": candidate.image, "width": candidate.width, "height": candidate.height}
        if candidate.image not in stored_images:
            new_images.setdefault(candidate.image, image)
        _check_same_size(stored_images.get(candidate.image) or new_images[candidate.image], image)
        if key in stored:
            _check_same_candidate(stored[key], candidate)
            continue
        row = dataclasses.asdict(candidate)
        new.append({name: value for name, value in row.items() if name in candidates.c})
    _insert(connection, images, list(new_images.values()))
    _insert(connection, candidates, new)
    return len(new)


def _insert_judgements(connection: Connection, wanted: Mapping[str, Judgement]) -> int:
    known: set[str] = set()
    for row in _rows(connection, _judgements_query(), judgements.c.idempotency_key, sorted(wanted)):
        stored = Judgement(**row)
        _check_same_judgement(stored, wanted[stored.idempotency_key])
        known.add(stored.idempotency_key)
    new = [judgement for key, judgement in sorted(wanted.items()) if key not in known]
    _check_stored(connection, new)
    now = datetime.datetime.now(datetime.UTC)
    _insert(
        connection, judgements, [{**dataclasses.asdict(judgement), "created_at": now} for judgement in new]
    )
    return len(new)


def _check_stored(connection: Connection, new: Sequence[Judgement]) -> None:
    """Raises FeedbackError for judgements of what is no candidate."""
    stored = _stored_candidates(connection, sorted({judgement.image for judgement in new}))
    stored_images = {image for image, _ in stored}
    unknown = sorted({judgement.image for judgement in new} - stored_images)
    if unknown:
        raise FeedbackError(
            f"{len(unknown)} unknown image(s): {_some(unknown)}; add the candidates before their judgements "
            "(nothing was stored)"
        )
    pairs = sorted({(judgement.image, judgement.prompt) for judgement in new} - stored.keys())
    if pairs:
        raise FeedbackError(
            f"{len(pairs)} judgement(s) of an image for a prompt that it was not made for: {_some(pairs)} "
            "(nothing was stored)"
        )


def _check_same_candidate(stored: Candidate, new: Candidate) -> None:
    _check_same_size(dataclasses.asdict(stored), dataclasses.asdict(new))
    for field in ("category", "split"):
        before, now = getattr(stored, field), getattr(new, field)
        if before != now:
            raise FeedbackError(
                f"candidate {new.image!r} with the prompt {new.prompt!r} has the {field} {now!r}, "
                f"but was given before with {before!r} (nothing was stored)"
            )


def _check_same_size(stored: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, now = (stored["width"], stored["height"]), (new["width"], new["height"])
    if before != now:
        raise FeedbackError(
            f"image {new.get('image') or new.get('digest')!r} is said to have {now[0]} x {now[1]} pixels, "
            f"but before it had {before[0]} x {before[1]} (nothing was stored)"
        )


def _check_same_judgement(stored: Judgement, new: Judgement) -> None:
    if stored != new:
        different = [
            field.name
            for field in dataclasses.fields(Judgement)
            if getattr(stored, field.name) != getattr(new, field.name)
        ]
        raise FeedbackError(
            f"the idempotency key {new.idempotency_key!r} was used before for another judgement (it differs "
            f"in {', '.join(different)}); every judgement needs a key of its own (nothing was stored)"
        )


def _candidates_query() -> Select[Any]:
    names = [field.name for field in dataclasses.fields(Candidate)]
    joined = candidates.join(images, candidates.c.image == images.c.digest)
    columns = [candidates.c[name] if name in candidates.c else images.c[name] for name in names]
    return select(*columns).select_from(joined)


def _judgements_query() -> Select[Any]:
    return select(*(judgements.c[field.name] for field in dataclasses.fields(Judgement)))


def _stored_candidates(connection: Connection, digests: Sequence[str]) -> dict[tuple[str, str], Candidate]:
    rows = _rows(connection, _candidates_query(), candidates.c.image, digests)
    return {(row["image"], row["prompt"]): Candidate(**row) for row in rows}


def _sorted_candidates(connection: Connection, query: Select[Any]) -> list[Candidate]:
    # Sorted here: databases differ in how they order text.
    found = [Candidate(**row) for row in connection.execute(query).mappings()]
    return sorted(found, key=lambda candidate: (candidate.image, candidate.prompt))


def _rows(
    connection: Connection, query: Select[Any], column: Column[Any], values: Sequence[str]
) -> Iterator[Mapping[str, Any]]:
    """The rows of `query` whose `column` is one of `values`."""
    for start in range(0, len(values), _ROWS_PER_QUERY):
        part = query.where(column.in_(values[start : start + _ROWS_PER_QUERY]))
        for row in connection.execute(part).mappings():
            yield {str(name): value for name, value in row.items()}


def _insert(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(insert(table), rows)


def _some(values: Sequence[object]) -> str:
    shown = ", ".join(repr(value) for value in values[:_LISTED])
    return shown + (", ..." if len(values) > _LISTED else "")
