"""Between the store's records and the messages of protos/accord/v1/feedback.proto."""

from __future__ import annotations

import datetime
from collections.abc import Callable

from google.protobuf.timestamp_pb2 import Timestamp

from accord.feedback import Campaign, Task
from accord.feedback.campaign_reading import PreferenceCount
from accord.feedback.campaign_records import StoredJudgement
from accord.v1 import feedback_pb2 as pb
from services.feedback.signing import RequestError

KINDS = {"alignment": pb.CAMPAIGN_KIND_ALIGNMENT, "comparison": pb.CAMPAIGN_KIND_COMPARISON}
QUESTIONS = {
    "": pb.QUESTION_UNSPECIFIED,
    "alignment": pb.QUESTION_ALIGNMENT,
    "fidelity": pb.QUESTION_FIDELITY,
}
VERDICTS = {"good": pb.VERDICT_GOOD, "bad": pb.VERDICT_BAD, "skip": pb.VERDICT_SKIP}
PREFERENCES = {"left": pb.PREFERENCE_LEFT, "right": pb.PREFERENCE_RIGHT, "tie": pb.PREFERENCE_TIE}

_VERDICT_NAMES: dict[int, str] = {value: name for name, value in VERDICTS.items()}
_PREFERENCE_NAMES: dict[int, str] = {value: name for name, value in PREFERENCES.items()}


def campaign_message(campaign: Campaign) -> pb.Campaign:
    """A campaign, and how far it is."""
    return pb.Campaign(
        campaign_id=campaign.campaign_id,
        kind=KINDS[campaign.kind],
        title=campaign.title,
        judgements_per_item=campaign.judgements_per_item,
        create_time=_timestamp(campaign.created_at),
        num_tasks=campaign.num_tasks,
        num_answers=campaign.num_answers,
        num_answers_wanted=campaign.num_answers_wanted,
    )


def task_message(task: Task, read_image: Callable[[str], bytes] | None) -> pb.Task:
    """A task; with its images when `read_image` gives them by digest."""

    def image(digest: str) -> pb.TaskImage:
        return pb.TaskImage(digest=digest, data=read_image(digest) if read_image else b"")

    return pb.Task(
        task_id=task.task_id,
        campaign_id=task.campaign_id,
        kind=KINDS[task.kind],
        prompt=task.prompt,
        images=[image(digest) for digest in task.images],
        right_images=[image(digest) for digest in task.right_images],
        question=QUESTIONS[task.question],
        lease_expire_time=_timestamp(task.expires_at),
    )


def judgement_message(judgement: StoredJudgement) -> pb.Judgement:
    """A judgement that counts."""
    return pb.Judgement(
        judgement_id=str(judgement.judgement_id),
        campaign_id=judgement.campaign_id,
        image_digest=judgement.image,
        prompt=judgement.prompt,
        category=judgement.category,
        split=judgement.split,
        rater=judgement.rater,
        verdict=VERDICTS[judgement.verdict],
        create_time=_timestamp(judgement.created_at),
    )


def preference_message(count: PreferenceCount) -> pb.PreferenceCount:
    """What raters preferred of one comparison."""
    return pb.PreferenceCount(
        comparison=count.item,
        prompt=count.prompt,
        category=count.category,
        question=QUESTIONS[count.question],
        first=count.first,
        second=count.second,
        tie=count.tie,
    )


def answer_of(request: pb.SubmitAnswerRequest) -> list[str] | str:
    """The answer in the store's words.

    Raises:
        RequestError: neither or both of verdicts and preference, or an unspecified one.
    """
    if bool(request.verdicts) == (request.preference != pb.PREFERENCE_UNSPECIFIED):
        raise RequestError("expected verdicts (alignment) or a preference (comparison), one of the two")
    if request.verdicts:
        return [verdict_of(verdict) for verdict in request.verdicts]
    if request.preference not in _PREFERENCE_NAMES:
        raise RequestError(f"unknown preference {request.preference}; expected LEFT, RIGHT or TIE")
    return _PREFERENCE_NAMES[request.preference]


def verdict_of(value: int) -> str:
    """Raises RequestError for a verdict that is none."""
    if value not in _VERDICT_NAMES:
        raise RequestError(f"unknown verdict {value}; expected GOOD, BAD or SKIP")
    return _VERDICT_NAMES[value]


def _timestamp(moment: datetime.datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
