"""The client of the feedback service: makes campaigns, rates in them, and says whether a served image was
right.
"""

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import grpc

from accord.client.connection import TLS, Endpoint
from accord.client.errors import ClientError
from accord.client.retry import Attempts, RetryPolicy
from accord.client.sync import describe
from accord.errors import ConfigError
from accord.v1 import feedback_pb2 as pb
from accord.v1 import feedback_pb2_grpc

DEFAULT_FEEDBACK_TARGET = "localhost:8081"
"""Where `accord feedback serve` listens for gRPC."""
FEEDBACK_ENDPOINT_VARIABLE = "ACCORD_FEEDBACK_ENDPOINT"
RATE_TIMEOUT_S = 30.0

VerdictName = Literal["good", "bad", "skip"]
PreferenceName = Literal["left", "right", "tie"]
_VERDICTS = {
    "good": pb.VERDICT_GOOD,
    "bad": pb.VERDICT_BAD,
    "skip": pb.VERDICT_SKIP,
}
_PREFERENCES = {
    "left": pb.PREFERENCE_LEFT,
    "right": pb.PREFERENCE_RIGHT,
    "tie": pb.PREFERENCE_TIE,
}
_QUESTIONS: dict[int, str] = {pb.QUESTION_ALIGNMENT: "alignment", pb.QUESTION_FIDELITY: "fidelity"}


@dataclass(frozen=True)
class GoldImage:
    """An image of the store (SHA-256 of its PNG) whose verdict, "good" or "bad", is known."""

    digest: str
    prompt: str
    verdict: Literal["good", "bad"]


@dataclass(frozen=True)
class SetComparison:
    """Two sets of one to four images of one prompt, by digest, such as of two models."""

    prompt: str
    first: Sequence[str]
    second: Sequence[str]
    category: str = "comparison"


@dataclass(frozen=True)
class RatingTask:
    """What a rater is asked. `images` are digests; of a comparison those of the left set.

    `pngs` and `right_pngs` are the images themselves, when the lease asked for them. `question` is
    "alignment" or "fidelity" of a comparison, else "".
    """

    task_id: str
    prompt: str
    images: tuple[str, ...]
    right_images: tuple[str, ...]
    pngs: tuple[bytes, ...]
    right_pngs: tuple[bytes, ...]
    question: str


@dataclass(frozen=True)
class Preferences:
    """How many raters preferred which set of a comparison (its number in the campaign), for one question."""

    comparison: int
    prompt: str
    question: str
    first: int
    second: int
    tie: int


class FeedbackClient:
    """A connection to Accord's feedback service. Safe to share between threads; use it in a `with`.

    Every method is safe to repeat, and repeats itself when the service is away for a moment. Its errors:
    NotFound (no such campaign, task or recorded image), ConfigError (a verdict or preference that there is
    not), and other ClientErrors when the service refuses or cannot be reached.

    Args:
        target: HOST:PORT, or grpcs://HOST:PORT for TLS; without it, $ACCORD_FEEDBACK_ENDPOINT or
            localhost:8081.
        token, token_file, tls, retry: as those of `accord.client.Client`; the token needs the scope `rate`,
            and `feedback` to make campaigns and read what was said.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        token_file: str | Path | None = None,
        tls: TLS | bool | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        address = target or os.environ.get(FEEDBACK_ENDPOINT_VARIABLE) or DEFAULT_FEEDBACK_TARGET
        self.endpoint = Endpoint.find(address, token=token, token_file=token_file, tls=tls)
        self._retry = retry or RetryPolicy()
        self._reached = False
        self._channel = self.endpoint.channel(aio=False)
        self._stub = feedback_pb2_grpc.FeedbackServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def rate(
        self,
        image_id: str,
        verdict: VerdictName,
        *,
        rater: str = "client",
        timeout_s: float = RATE_TIMEOUT_S,
    ) -> bool:
        """Say whether a served image was right; False when this rater said so before.

        `rater` is a name within the token's own: letters, digits, - and _; a rater has one voice an image.
        NotFound: the image was not recorded; gateways record a share of what they serve.
        """
        request = pb.RateServedImageRequest(
            image_id=image_id, rater=rater, idempotency_key=uuid.uuid4().hex, verdict=_verdict(verdict)
        )
        return bool(self._call(self._stub.RateServedImage, request, timeout_s).counted)

    def create_alignment(
        self,
        campaign_id: str,
        title: str,
        *,
        judgements_per_item: int,
        collections: Sequence[str] = (),
        gold: Sequence[GoldImage] = (),
        timeout_s: float = RATE_TIMEOUT_S,
    ) -> int:
        """A campaign of good, bad and skip over images in the store; how many tasks it has.

        Made again with the same arguments it is the same campaign. `collections` are the sources whose images
        are judged (all by default); `gold` images measure raters, besides the judgements that are wanted.
        """
        request = pb.CreateCampaignRequest(
            campaign_id=campaign_id,
            kind=pb.CAMPAIGN_KIND_ALIGNMENT,
            title=title,
            judgements_per_item=judgements_per_item,
            collections=collections,
            gold=[pb.GoldImage(digest=g.digest, prompt=g.prompt, verdict=_verdict(g.verdict)) for g in gold],
        )
        return int(self._call(self._stub.CreateCampaign, request, timeout_s).campaign.num_tasks)

    def create_comparison(
        self,
        campaign_id: str,
        title: str,
        comparisons: Sequence[SetComparison],
        *,
        judgements_per_item: int,
        timeout_s: float = RATE_TIMEOUT_S,
    ) -> int:
        """A campaign of comparisons, blind and with sides shuffled; how many tasks it has, two a comparison:
        which set fits its prompt better, and which looks better.
        """
        request = pb.CreateCampaignRequest(
            campaign_id=campaign_id,
            kind=pb.CAMPAIGN_KIND_COMPARISON,
            title=title,
            judgements_per_item=judgements_per_item,
            comparisons=[
                pb.SetComparison(
                    prompt=c.prompt, category=c.category, first_digests=c.first, second_digests=c.second
                )
                for c in comparisons
            ],
        )
        return int(self._call(self._stub.CreateCampaign, request, timeout_s).campaign.num_tasks)

    def lease(
        self, campaign_id: str, *, rater: str, images: bool = False, timeout_s: float = RATE_TIMEOUT_S
    ) -> RatingTask | None:
        """The task that the rater is to answer now, with its PNGs if wanted; None when nothing is left."""
        request = pb.LeaseTaskRequest(campaign_id=campaign_id, rater=rater, include_images=images)
        reply = self._call(self._stub.LeaseTask, request, timeout_s)
        if not reply.HasField("task"):
            return None
        task = reply.task
        return RatingTask(
            task_id=task.task_id,
            prompt=task.prompt,
            images=tuple(image.digest for image in task.images),
            right_images=tuple(image.digest for image in task.right_images),
            pngs=tuple(image.data for image in task.images) if images else (),
            right_pngs=tuple(image.data for image in task.right_images) if images else (),
            question=_QUESTIONS.get(task.question, ""),
        )

    def submit(
        self,
        task_id: str,
        answer: Sequence[VerdictName] | PreferenceName,
        *,
        rater: str,
        idempotency_key: str | None = None,
        timeout_s: float = RATE_TIMEOUT_S,
    ) -> bool:
        """Commit an answer: a verdict an image, or a preference; False when this very one was counted before.

        Give a key of your own (8 to 64 letters, digits and -) to repeat the call after a crash.
        """
        request = pb.SubmitAnswerRequest(
            task_id=task_id, rater=rater, idempotency_key=idempotency_key or uuid.uuid4().hex
        )
        if isinstance(answer, str):
            if answer not in _PREFERENCES:
                raise ConfigError(f"unknown preference {answer!r}; known are: {', '.join(_PREFERENCES)}")
            request.preference = _PREFERENCES[answer]
        else:
            request.verdicts.extend(_verdict(verdict) for verdict in answer)
        return bool(self._call(self._stub.SubmitAnswer, request, timeout_s).counted)

    def undo(self, campaign_id: str, *, rater: str, timeout_s: float = RATE_TIMEOUT_S) -> str | None:
        """Take back the rater's last answer; the id of its task, which he holds again, or None."""
        request = pb.UndoAnswerRequest(campaign_id=campaign_id, rater=rater, idempotency_key=uuid.uuid4().hex)
        return str(self._call(self._stub.UndoAnswer, request, timeout_s).task_id) or None

    def preferences(self, campaign_id: str, *, timeout_s: float = RATE_TIMEOUT_S) -> list[Preferences]:
        """What raters preferred of each comparison that was answered, sides put right again."""
        request = pb.CountPreferencesRequest(campaign_id=campaign_id)
        reply = self._call(self._stub.CountPreferences, request, timeout_s)
        return [
            Preferences(row.comparison, row.prompt, _QUESTIONS[row.question], row.first, row.second, row.tie)
            for row in reply.counts
        ]

    def _call(self, method: Callable[..., Any], request: Any, timeout_s: float) -> Any:
        attempts = Attempts(self._retry, timeout_s)
        while True:
            try:
                return method(request, timeout=attempts.remaining_s(), metadata=self.endpoint.metadata())
            except grpc.RpcError as error:
                failure: ClientError = describe(error, self.endpoint, request)
                self._reached = self._reached or not getattr(failure, "never_connected", False)
            time.sleep(attempts.delay_after(failure, reached=self._reached))


def _verdict(name: str) -> "pb.Verdict.ValueType":
    if name not in _VERDICTS:
        raise ConfigError(f"unknown verdict {name!r}; known are: {', '.join(_VERDICTS)}")
    return _VERDICTS[name]
