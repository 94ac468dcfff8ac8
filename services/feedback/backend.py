"""What the page and the gRPC server share: the store, the images, and one way in for every answer."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from accord.errors import ConfigError
from accord.feedback import Campaign, Campaigns, FeedbackStore, Task
from accord.feedback.invites import UsedInvites
from accord.feedback.served import ServedImages
from accord.image_store import ImageStore, open_images
from accord.tokens import Principal, TokenFile, default_secret_path, default_tokens_path, ensure_first_token
from services.feedback.config import FeedbackServiceConfig
from services.feedback.metrics import CampaignNumbers, Metrics
from services.feedback.signing import ForbiddenError, Invite, LinkError, Session, Signer, load_secret

_log = logging.getLogger(__name__)

_DOOR_HOURS = 0.25  # for so long a browser that was never answered may press the button again
_SUMMARY_S = 2.0  # how old a campaign's progress on the rating page may be


@dataclasses.dataclass(frozen=True)
class RaterProgress:
    """What a rater sees of a campaign: answers of his own that count, and all that count of all wanted."""

    mine: int
    answered: int
    wanted: int


class Backend:
    """The parts of a running service. Methods block, and may be called from many threads."""

    def __init__(self, config: FeedbackServiceConfig) -> None:
        """Open the store, the secret and the tokens.

        Raises:
            FeedbackError: the database does not answer.
            ConfigError, TokenError: the secret or the tokens cannot be read.
        """
        self.config = config
        self.signer = Signer(load_secret(config.state_dir))
        self.tokens = _load_tokens(config)
        self.images = _open_images(config.images)
        self.store = FeedbackStore(config.url)
        self.campaigns = Campaigns(config.url)
        self.used_invites = UsedInvites(config.url)
        self.served = ServedImages(self.store, self.campaigns, self.images)
        self.metrics = Metrics(self._campaign_numbers)
        self._summaries: dict[str, tuple[float, Campaign]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        for part in (self.used_invites, self.campaigns, self.store):
            part.close()

    def authenticate(self, token: str) -> Principal | None:
        """Who has this bearer token."""
        return self.tokens.authenticate(token)

    def stand_at_door(self, invite: Invite, before: Session | None) -> Session:
        """Names the session that a link is going to open, before it is opened.

        Should the service end between committing that and answering, the same browser comes in by the same
        name, and nobody else does. `before` is what the browser was given when it looked earlier.
        """
        if before is not None and _is_for(before, invite):
            return before
        return self.signer.start_session("door", invite.rater, _DOOR_HOURS, invite.campaign_id)

    def open_invite(self, token: str, current: Session | None, door: Session | None = None) -> Session:
        """The session that a link opens. The browser that opened it before gets its session again.

        `door` is what `stand_at_door` gave this browser.

        Raises:
            LinkError: the link is not valid, has expired, or was opened elsewhere.
            ForbiddenError: another rater's session is open in this browser.
        """
        invite = self.signer.read_invite(token)
        if current is not None and current.rater != invite.rater:
            raise ForbiddenError(
                f"In this browser {current.rater} is rating, and this link is for somebody else. Leave the "
                "session first, or open the link in another browser."
            )
        self.campaigns.get(invite.campaign_id)
        session = self.signer.start_session(
            "rater", invite.rater, self.config.session_hours, invite.campaign_id
        )
        if door is not None and _is_for(door, invite):
            session = session.model_copy(update={"session_id": door.session_id})
        # The browser that opened it first may open it again; nobody else may.
        for candidate in (session, current):
            if candidate is not None and self.used_invites.claim(invite.nonce, candidate.session_id):
                return candidate
        raise LinkError("This link was opened before, and opens only once. Please ask for a new one.")

    def lease(self, campaign_id: str, rater: str, *, besides: str | None = None) -> Task | None:
        """See `accord.feedback.campaigns.Campaigns.lease`."""
        with self.metrics.timed("lease"):
            task = self.campaigns.lease(campaign_id, rater, besides=besides)
        if task is not None:
            self.metrics.leases.labels(task.kind).inc()
        return task

    def submit(self, task_id: str, rater: str, answer: Sequence[str] | str, key: str) -> bool:
        """Counts an answer durably; False when it was counted before. See `Campaigns.submit`."""
        with self.metrics.timed("submit"):
            counted = self.campaigns.submit(task_id, rater, answer, idempotency_key=own_key(rater, key))
        if counted:
            kind = "comparison" if isinstance(answer, str) else "alignment"
            self.metrics.count_answer(kind, [answer] if isinstance(answer, str) else answer)
        return counted

    def undo(self, campaign_id: str, rater: str, key: str) -> str | None:
        """Takes back the rater's last answer; the id of its task, or None. See `Campaigns.undo`."""
        with self.metrics.timed("undo"):
            task_id = self.campaigns.undo(campaign_id, rater, idempotency_key=own_key(rater, key))
        if task_id is not None:
            self.metrics.undos.inc()
        return task_id

    def held_task(self, campaign_id: str, rater: str, task_id: str) -> Task | None:
        """A task that this rater holds, such as the one that he just took back."""
        besides = None
        for _ in range(2):
            task = self.campaigns.lease(campaign_id, rater, besides=besides)
            if task is None or task.task_id == task_id:
                return task
            besides = task.task_id
        return None

    def record_served(self, image_id: str, png: bytes, prompt: str, model: str, seed: int) -> bool:
        """Keeps a served image; False when it was recorded before."""
        with self.metrics.timed("record_served"):
            return self.served.record(image_id, png, prompt, model_digest=model, seed=seed)

    def rate_served(self, image_id: str, rater: str, verdict: str) -> bool:
        """Counts a verdict on a served image; False when it was counted before."""
        with self.metrics.timed("rate_served"):
            counted = self.served.rate(image_id, rater, verdict)
        if counted:
            self.metrics.count_answer("served", [verdict])
        return counted

    def progress(self, campaign_id: str, rater: str) -> RaterProgress:
        """How far this rater and the campaign are."""
        known = self._summaries.get(campaign_id)
        if known is None or known[0] < time.monotonic():
            known = (time.monotonic() + _SUMMARY_S, self.campaigns.get(campaign_id))
            self._summaries[campaign_id] = known
        campaign = known[1]
        mine = self.campaigns.answered_by(campaign_id, rater)
        return RaterProgress(mine, campaign.num_answers, campaign.num_answers_wanted)

    def _campaign_numbers(self) -> CampaignNumbers:
        found = {}
        for campaign in self.campaigns.campaigns():
            progress = self.campaigns.progress(campaign.campaign_id, by_prompt=False)
            values: dict[str, float] = {
                "answers": progress.answers,
                "answers_wanted": progress.wanted,
                "leases_held": progress.leased,
                "leases_expired": progress.expired,
                "tasks_stuck": len(progress.stuck),
                "raters": progress.raters,
            }
            total = progress.shares.get("total", {})
            decided = total.get("good", 0.0) + total.get("bad", 0.0)
            if decided:
                values["good_ratio"] = total["good"] / decided
            agreement = progress.agreement.get("total")
            if agreement is not None and agreement.alpha is not None:
                values["agreement_alpha"] = agreement.alpha
            found[campaign.campaign_id] = values
        return found


def _is_for(door: Session, invite: Invite) -> bool:
    return (door.rater, door.campaign_id) == (invite.rater, invite.campaign_id)


def _open_images(where: Path | str) -> ImageStore:
    """A folder that is not there is made: a service that only records what is served begins without one."""
    if isinstance(where, Path) and not where.is_dir():
        try:
            where.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(
                f"there is no image folder {where}, and it cannot be made: {error.strerror}; name the one "
                "that the images lie in, such as the folder images of a run (images)"
            ) from None
        _log.warning("there was no image folder %s: it was made, and is empty", where)
    return open_images(where)


def own_key(rater: str, key: str) -> str:
    """The store's key of a rater's key: two raters who choose the same one do not meet."""
    return hashlib.sha256(f"{rater}\n{key}".encode()).hexdigest()


def _load_tokens(config: FeedbackServiceConfig) -> TokenFile:
    """The tokens of the config; by default the machine's own, of which a first one is made."""
    if config.tokens is not None:
        return TokenFile.load(config.tokens)
    ensure_first_token(default_tokens_path(), default_secret_path())
    return TokenFile.load(default_tokens_path())
