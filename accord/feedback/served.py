"""Served images: recorded when they are served, judged when a client says whether they were right."""

import datetime

from accord.errors import FeedbackError
from accord.feedback.campaign_records import AnsweredError
from accord.feedback.campaigns import Campaigns
from accord.feedback.database import DatabaseError
from accord.feedback.store import FeedbackStore
from accord.feedback.tables import Candidate
from accord.image_store import ImageStore
from accord.images import decode_image

SERVED = "served"
"""Category and split of images that no run collected."""


class ServedImages:
    """What a gateway tells the store, so that a client can send back whether an image was right."""

    def __init__(self, store: FeedbackStore, campaigns: Campaigns, images: ImageStore) -> None:
        """All three are the feedback service's; `store` and `campaigns` are of the same database."""
        self._store = store
        self._campaigns = campaigns
        self._images = images

    def record(
        self, image_id: str, png: bytes, prompt: str, *, model_digest: str = "", seed: int = 0
    ) -> bool:
        """Keep a served image, durably; False when it was recorded before.

        Args:
            image_id: the id that the client got with the image.
            png: its bytes, as they were served.
            model_digest: the digest of the model that made it.
            seed: the one that it was sampled with.

        Raises:
            ImageError: no PNG, or damaged.
            FeedbackError: a field that cannot be stored, or the id stands for another image.
            StorageError: the disk is full.
        """
        height, width, _ = decode_image(png).shape
        digest = self._images.put(png)
        # Generation is repeatable: a run may have collected the very image, and its category stays.
        if not self._store.has_candidate(digest, prompt):
            candidate = Candidate(digest, prompt, SERVED, SERVED, seed, width, height, model_digest)
            self._store.add_candidates([candidate])
        return self._campaigns.record_served(image_id, digest, prompt, model_digest)

    def verdicts(self, since: datetime.datetime | None = None) -> dict[str, dict[str, int]]:
        """How often each verdict was given to the served images of each model, by the model's digest.

        Only what counts, and only what was given by `rate` since then.
        """
        return self._campaigns.served_verdicts(since)

    def rate(self, image_id: str, rater: str, verdict: str) -> bool:
        """Counts a rater's verdict ("good", "bad" or "skip") durably; False when it was counted before.

        Raises:
            NotFoundError: no such image was recorded.
            ExcludedError: the rater was excluded.
            AnsweredError: the rater gave another verdict on it before.
        """
        # One key a rater and image: whatever clients send, a rater has one voice an image.
        judgement = self._campaigns.served(image_id, rater, verdict, idempotency_key=f"{image_id} {rater}")
        try:
            return bool(self._store.submit([judgement]))
        except DatabaseError:
            raise
        except FeedbackError:
            raise AnsweredError(f"{rater!r} gave another verdict on the image {image_id!r} before") from None
