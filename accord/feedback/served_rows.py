"""Served images in the database: noted, and found when they are judged. Each works on an open connection."""

from sqlalchemy import Connection, insert, select

from accord.errors import FeedbackError
from accord.feedback.assignment import moment
from accord.feedback.campaign_records import ExcludedError, NotFoundError
from accord.feedback.campaign_tables import exclusions, served_images
from accord.feedback.tables import Judgement


def note(connection: Connection, row: dict[str, str], now_ms: int) -> bool:
    """Notes a served image by its image_id, image, prompt and model; False when it was noted before.

    Raises:
        FeedbackError: the id stands for another image.
    """
    query = select(served_images).where(served_images.c.image_id == row["image_id"])
    found = connection.execute(query).first()
    if found is None:
        connection.execute(insert(served_images).values(**row, created_at=moment(now_ms)))
    elif any(getattr(found, name) != value for name, value in row.items()):
        raise FeedbackError(f"the served image {row['image_id']!r} was noted before as another image")
    return found is None


def judgement(connection: Connection, image_id: str, rater: str, verdict: str, key: str) -> Judgement:
    """The judgement of a served image, not yet stored; `key` is its idempotency key.

    Raises:
        NotFoundError: no image of this id was recorded.
        ExcludedError: the rater was excluded.
    """
    found = connection.execute(select(served_images).where(served_images.c.image_id == image_id)).first()
    if connection.execute(select(exclusions).where(exclusions.c.rater == rater)).first() is not None:
        raise ExcludedError(f"the rater {rater!r} was excluded; judgements of his are no longer taken")
    if found is None:
        raise NotFoundError(f"no served image {image_id!r} was recorded")
    return Judgement(f"served {key}", found.image, found.prompt, rater, verdict)
