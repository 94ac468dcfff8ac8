"""Campaigns: what people are to judge, who judges what, and how far they are.

Under any number of raters and processes at once, every task gets exactly the wanted number of answers, each
by another rater. A task that is taken and not answered comes back when its lease runs out.
"""

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Row, func, select

from accord.feedback import answering, assignment, campaign_making, campaign_reading, exclusion, served_rows
from accord.feedback.campaign_records import (
    Campaign,
    ComparisonItem,
    Gold,
    NotFoundError,
    Progress,
    Rater,
    StoredJudgement,
    Task,
    check_key,
)
from accord.feedback.campaign_tables import campaigns, exclusions, places
from accord.feedback.database import Database
from accord.feedback.tables import Judgement, check_text

_SWEEP_EVERY_MS = 1000.0


class Campaigns:
    """The campaigns of a feedback store (the same database as `FeedbackStore`).

    All methods may be called from many threads and processes at once. What a method wrote is durable when it
    returns, and nothing was written when it raises.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        """Open the database at a URL, as `FeedbackStore` does. `clock` gives seconds since 1970.

        Raises:
            FeedbackError: the URL cannot be read, or the database does not answer. A password is never shown.
        """
        self._database = Database(url)
        self._clock = clock
        self._known: dict[str, Row[Any]] = {}  # campaigns do not change
        self._swept_ms: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"Campaigns({str(self._database)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def create_alignment(
        self,
        campaign_id: str,
        title: str,
        *,
        judgements_per_item: int,
        sources: Sequence[str] = (),
        only: Sequence[tuple[str, str]] = (),
        images_per_task: int = 3,
        lease_s: float = 600,
        gold: Sequence[Gold] = (),
        seed: int = 0,
    ) -> Campaign:
        """A campaign over candidates of the store: up to `images_per_task` images of one prompt at a time.

        Made again with the same arguments it is the same campaign; images that came later are not in it.

        Args:
            judgements_per_item: k: so many raters judge every image.
            sources: digests of the artifacts whose candidates are judged; by default all.
            only: candidates by (image, prompt), when just these are to be judged.
            lease_s: how long a rater may take for a task, in seconds.
            gold: candidates whose answer is known; every rater gets them now and then, besides the k.
            seed: of the order of tasks.

        Raises:
            FeedbackError: the id stands for another campaign, there is nothing to judge, or a bad argument.
        """
        campaign_making.check_settings(
            campaign_id, title, judgements_per_item, images_per_task, lease_s, seed
        )
        content = campaign_making.alignment_content(sources, only, images_per_task, gold)
        settings = _settings(campaign_id, "alignment", title, judgements_per_item, lease_s, seed)
        self._database.write(
            lambda connection: campaign_making.store_campaign(
                connection,
                settings,
                content,
                lambda now: campaign_making.alignment_tasks(
                    now, campaign_id, sources, only, images_per_task, gold, seed
                ),
            )
        )
        return self.get(campaign_id)

    def create_comparison(
        self,
        campaign_id: str,
        title: str,
        items: Sequence[ComparisonItem],
        *,
        judgements_per_item: int,
        lease_s: float = 600,
        seed: int = 0,
    ) -> Campaign:
        """A campaign of comparisons, blind and with sides shuffled: which fits better, which looks better.

        Raises:
            FeedbackError: the id stands for another campaign, or a bad argument.
        """
        campaign_making.check_settings(campaign_id, title, judgements_per_item, 1, lease_s, seed)
        content = campaign_making.comparison_content(items)
        settings = _settings(campaign_id, "comparison", title, judgements_per_item, lease_s, seed)
        self._database.write(
            lambda connection: campaign_making.store_campaign(
                connection, settings, content, lambda _: campaign_making.comparison_tasks(items, seed)
            )
        )
        return self.get(campaign_id)

    def campaigns(self) -> list[Campaign]:
        """All campaigns, oldest first."""
        with self._database.reading() as connection:
            return campaign_reading.campaigns_of(connection)

    def get(self, campaign_id: str) -> Campaign:
        """One campaign.

        Raises:
            NotFoundError: there is none of this id.
        """
        with self._database.reading() as connection:
            return campaign_reading.campaigns_of(connection, _find(connection, campaign_id).number)[0]

    def progress(self, campaign_id: str, *, by_prompt: bool = True) -> Progress:
        """How the campaign stands. Counts all of its answers: not for every click.

        Without `by_prompt` its `shares_by_prompt` are empty.

        Raises:
            NotFoundError: there is no such campaign.
        """
        with self._database.reading() as connection:
            campaign = _find(connection, campaign_id)
            return campaign_reading.progress(connection, campaign, self._now_ms(), by_prompt=by_prompt)

    def answered_by(self, campaign_id: str, rater: str) -> int:
        """How many answers of this rater's count in the campaign, gold among them.

        Raises:
            NotFoundError: there is no such campaign.
        """
        with self._database.reading() as connection:
            return campaign_reading.answered_by(connection, _find(connection, campaign_id), rater)

    def lease(self, campaign_id: str, rater: str, *, besides: str | None = None) -> Task | None:
        """The task that the rater is to answer now; None when nothing is left for him at the moment.

        The oldest task that he holds is given again, with a new lease, on every device. With `besides`, the
        id of the task that he is looking at, it is the one to show after that (for fetching ahead).

        Raises:
            NotFoundError: there is no such campaign.
            ExcludedError: the rater was excluded.
        """
        check_text("lease", "rater", rater)
        campaign = self._campaign(campaign_id)

        def work(connection: Connection) -> Task | None:
            desk = assignment.sit_down(connection, campaign, rater, self._now_ms())
            return assignment.lease(desk, besides)

        # Looking for leases that ran out is cheap, but need not be done for every click.
        seldom_ms = min(_SWEEP_EVERY_MS, campaign.lease_s * 500)
        if self._now_ms() - self._swept_ms.get(campaign_id, 0) >= seldom_ms:
            self.expire(campaign_id)
        found = self._database.write(work)
        if found is None and self.expire(campaign_id):
            found = self._database.write(work)
        return found

    def submit(self, task_id: str, rater: str, answer: Sequence[str] | str, *, idempotency_key: str) -> bool:
        """Counts an answer, durably; False when this very answer was counted before under this key.

        After the lease ran out it still counts, as long as nobody else took the place.

        Args:
            answer: "good", "bad" or "skip" for each image of the task; or "left", "right" or "tie".

        Raises:
            NotFoundError: there is no such task.
            LeaseError: the rater does not hold the task, and its places are taken.
            AnsweredError: he answered it before, or the key was used for something else.
            ExcludedError: the rater was excluded.
            FeedbackError: it is no answer to this task.
        """
        check_text("answer", "rater", rater)
        check_key(idempotency_key)

        def work(connection: Connection) -> bool:
            desk = assignment.sit_down(connection, campaign, rater, self._now_ms())
            return answering.submit(desk, number, answer, idempotency_key)

        name, number = assignment.parse_task(task_id)
        try:
            campaign = self._campaign(name)
        except NotFoundError:
            raise NotFoundError(f"there is no task {task_id!r}") from None
        return self._database.write(work)

    def undo(self, campaign_id: str, rater: str, *, idempotency_key: str) -> str | None:
        """Takes back the rater's last answer: an event; its judgements no longer count.

        Its task is leased to him again (`lease` gives it). Returns its id, or None when there was no answer.

        Raises:
            NotFoundError, AnsweredError, ExcludedError: as `submit`.
        """
        check_text("undo", "rater", rater)
        check_key(idempotency_key)
        campaign = self._campaign(campaign_id)

        def work(connection: Connection) -> str | None:
            desk = assignment.sit_down(connection, campaign, rater, self._now_ms())
            return answering.undo(desk, idempotency_key)

        return self._database.write(work)

    def expire(self, campaign_id: str) -> int:
        """Gives back leases that ran out, and returns how many; `lease` does so by itself.

        Raises:
            NotFoundError: there is no such campaign.
        """
        now_ms = self._now_ms()
        campaign = self._campaign(campaign_id)
        self._swept_ms[campaign_id] = now_ms
        with self._database.reading() as connection:
            ran_out = select(places.c.id).where(*assignment.ran_out(campaign, now_ms))
            if connection.execute(ran_out.limit(1)).first() is None:
                return 0
        return self._database.write(lambda now: assignment.sweep(now, campaign, now_ms))

    def exclude(self, rater: str, reason: str) -> int:
        """From now on nothing that the rater said counts; his places are free for others.

        Snapshots that were taken before stay as they are: see `accord.feedback.lineage` for what used them.
        Returns how many places were freed. Again: nothing changes.
        """
        check_text("exclusion", "rater", rater)
        check_text("exclusion", "reason", reason)
        now_ms = self._now_ms()
        self._database.write(lambda now: exclusion.exclude(now, rater, reason, now_ms))
        freed = 0
        while part := self._database.write(lambda now: exclusion.withdraw(now, rater)):
            freed += part
        return freed

    def include(self, rater: str, reason: str) -> int | None:
        """Ends an exclusion: what the rater said counts again, but where others took his place meanwhile.

        Those answers are taken back (an event), so that no item has more judgements than wanted. Returns how
        many places are his again; None when he was not excluded.
        """
        check_text("exclusion", "rater", rater)
        check_text("exclusion", "reason", reason)
        if rater not in self.excluded():
            return None
        restored, now_ms = 0, self._now_ms()
        while True:
            looked_at, part = self._database.write(lambda now: exclusion.restore(now, rater, now_ms))
            restored += part
            if looked_at:
                continue
            try:
                ended = self._database.write(lambda now: exclusion.include(now, rater, reason, now_ms))
            except exclusion.PlacesLeftError:
                continue
            return restored if ended else None

    def excluded(self) -> dict[str, str]:
        """The excluded raters, and why."""
        with self._database.reading() as connection:
            rows = connection.execute(select(exclusions.c.rater, exclusions.c.reason)).all()
        return dict(sorted((row.rater, row.reason) for row in rows))

    def raters(self, campaign_id: str) -> list[Rater]:
        """How each rater of the campaign does, by name. Reads all of its answers: not for every click.

        Raises:
            NotFoundError: there is no such campaign.
        """
        with self._database.reading() as connection:
            return campaign_reading.raters(connection, _find(connection, campaign_id))

    def judgements(
        self, campaign_id: str | None = None, *, after: int = 0, limit: int = 1000
    ) -> list[StoredJudgement]:
        """Judgements that count, by id, from the one after `after`; of one campaign, or of all.

        Raises:
            NotFoundError: there is no such campaign.
        """
        with self._database.reading() as connection:
            number = None if campaign_id is None else _find(connection, campaign_id).number
            return campaign_reading.judgements_page(connection, number, after, limit)

    def all_judgements(self, campaign_id: str | None = None) -> Iterator[StoredJudgement]:
        """All judgements that count, by id, read in pages."""
        after = 0
        while page := self.judgements(campaign_id, after=after):
            yield from page
            after = page[-1].judgement_id

    def preferences(self, campaign_id: str) -> list[campaign_reading.PreferenceCount]:
        """What raters preferred of each comparison, sides put right again.

        Raises:
            NotFoundError: there is no such campaign.
        """
        with self._database.reading() as connection:
            return campaign_reading.preferences(connection, _find(connection, campaign_id))

    def record_served(self, image_id: str, image: str, prompt: str, model: str = "") -> bool:
        """Notes a served image (its candidate must be in the store); False when it was noted before.

        Raises:
            FeedbackError: a field that cannot be stored, or the id stands for another image.
        """
        for field, value in (("image_id", image_id), ("image", image), ("prompt", prompt)):
            check_text("served image", field, value)
        check_text("served image", "model", model, required=False)
        row = {"image_id": image_id, "image": image, "prompt": prompt, "model": model}
        now_ms = self._now_ms()
        return self._database.write(lambda now: served_rows.note(now, row, now_ms))

    def served(self, image_id: str, rater: str, verdict: str, *, idempotency_key: str) -> Judgement:
        """The judgement of a served image, for `FeedbackStore.submit`.

        Raises:
            NotFoundError: no image of this id was recorded.
            ExcludedError: the rater was excluded.
        """
        with self._database.reading() as connection:
            return served_rows.judgement(connection, image_id, rater, verdict, idempotency_key)

    def served_verdicts(self, since: datetime.datetime | None = None) -> dict[str, dict[str, int]]:
        """The verdicts on served images that count, by model and verdict."""
        with self._database.reading() as connection:
            return campaign_reading.served_verdicts(connection, since)

    def _campaign(self, campaign_id: str) -> Row[Any]:
        if campaign_id not in self._known:
            with self._database.reading() as connection:
                self._known[campaign_id] = _find(connection, campaign_id)
        return self._known[campaign_id]

    def _now_ms(self) -> int:
        return round(self._clock() * 1000)


def _settings(
    campaign_id: str, kind: str, title: str, judgements_per_item: int, lease_s: float, seed: int
) -> dict[str, Any]:
    return {
        "campaign_id": campaign_id,
        "kind": kind,
        "title": title,
        "judgements_per_item": judgements_per_item,
        "lease_s": float(lease_s),
        "seed": seed,
    }


def _find(connection: Connection, campaign_id: str) -> Row[Any]:
    found = connection.execute(select(campaigns).where(campaigns.c.campaign_id == campaign_id)).first()
    if found is None:
        number = connection.execute(select(func.count()).select_from(campaigns)).scalar_one()
        raise NotFoundError(f"there is no campaign {campaign_id!r} (the store has {number})")
    return found
