"""Raters of the world of shapes, who rate over gRPC like anyone else: several at once, each as good as he is.

A campaign's raters are `accord.shapes.raters` by name. What one says of an image depends on the image, its
prompt, himself and the seed; not on the order in which tasks come.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from accord.config import load_object
from accord.errors import ConfigError, FeedbackError
from accord.evaluation.protocols import Question
from accord.images import decode_image
from accord.prompts import Grammar, load_grammar
from accord.shapes.raters import RATERS, Rater, SimulatedPanel
from accord.v1 import feedback_pb2 as pb
from accord.v1 import feedback_pb2_grpc
from services.feedback.conversions import VERDICTS

_MAX_MESSAGE_BYTES = 64 << 20  # a task's images come in one message
_CALL_S = 60.0
_TRIES = 8
_QUESTIONS: dict[int, Question] = {pb.QUESTION_ALIGNMENT: "alignment", pb.QUESTION_FIDELITY: "fidelity"}
_PREFERENCES = {1: pb.PREFERENCE_LEFT, -1: pb.PREFERENCE_RIGHT, 0: pb.PREFERENCE_TIE}
# The server may be restarting: nothing is lost by asking again, under the same idempotency key.
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclasses.dataclass(frozen=True)
class Door:
    """How raters reach the service. `certificates` are PEM, for TLS; without them the channel is plain."""

    address: str
    token: str = dataclasses.field(repr=False)
    certificates: bytes | None = None

    def channel(self) -> grpc.Channel:
        """A channel of its own; close it."""
        options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)]
        if self.certificates is None:
            return grpc.insecure_channel(self.address, options)
        credentials = grpc.ssl_channel_credentials(self.certificates)
        return grpc.secure_channel(self.address, credentials, options)


def rate_campaign(
    door: Door,
    campaign_id: str,
    *,
    raters: Sequence[Rater] = RATERS,
    grammar: str = "shapes",
    seed: int = 0,
    on_answer: Callable[[int], None] = lambda total: None,
    stop: threading.Event | None = None,
) -> int:
    """Have all `raters` rate at once until nothing is left for any of them; how many answers they gave.

    Args:
        grammar: of the prompts; see `accord.prompts.load_grammar`.
        on_answer: called with the number of answers so far, from any of the raters' threads.
        stop: when set, each rater stops after the answer that he is giving.

    Raises:
        FeedbackError: the service refuses, or does not answer.
        PromptError: a prompt outside the grammar.
    """
    stop = stop or threading.Event()
    known, lock, total = load_grammar(grammar), threading.Lock(), 0

    def count() -> None:
        nonlocal total
        with lock:
            total += 1
            on_answer(total)

    def work(rater: Rater) -> None:
        try:
            with door.channel() as channel:
                _OneRater(door, channel, campaign_id, rater, known, seed).rate(count, stop)
        except BaseException:
            stop.set()  # the others need not go on for an answer that is lost anyway
            raise

    with ThreadPoolExecutor(max(1, len(raters))) as pool:
        done = [pool.submit(work, rater) for rater in raters]
        try:
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            raise
    return total


def raters_of(panel: str, names: Sequence[str] = ()) -> Sequence[Rater]:
    """The members of a panel that a recipe names; only those of these names, if any are given.

    Raises:
        ConfigError: there is no such panel or rater, or the panel cannot be asked rater by rater.
    """
    found = load_object(panel)()
    if not isinstance(found, SimulatedPanel):
        raise ConfigError(
            f"the raters of {panel} cannot rate one by one; expected the factory of a "
            "accord.shapes.raters.SimulatedPanel (in a recipe, feedback.serve=false asks any panel directly)"
        )
    by_name = {rater.name: rater for rater in found.members}
    if unknown := [name for name in names if name not in by_name]:
        raise ConfigError(f"{panel} has no rater {unknown[0]!r}; expected one of {', '.join(by_name)}")
    return [by_name[name] for name in names] or found.members


class _OneRater:
    def __init__(
        self, door: Door, channel: grpc.Channel, campaign_id: str, rater: Rater, grammar: Grammar, seed: int
    ) -> None:
        self._stub = feedback_pb2_grpc.FeedbackServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {door.token}"),)
        self._campaign_id = campaign_id
        self._rater = rater
        self._grammar = grammar
        self._panel = SimulatedPanel(seed, (rater,))

    def rate(self, count: Callable[[], None], stop: threading.Event) -> None:
        while not stop.is_set():
            lease = pb.LeaseTaskRequest(
                campaign_id=self._campaign_id, rater=self._rater.name, include_images=True
            )
            reply = self._call(self._stub.LeaseTask, lease)
            if not reply.HasField("task"):
                return
            self._call(self._stub.SubmitAnswer, self._answer(reply.task))
            count()

    def _answer(self, task: pb.Task) -> pb.SubmitAnswerRequest:
        answer = pb.SubmitAnswerRequest(
            task_id=task.task_id, rater=self._rater.name, idempotency_key=secrets.token_hex(16)
        )
        prompt = self._grammar.parse(task.prompt)
        images = [decode_image(image.data) for image in task.images]
        if task.kind == pb.CAMPAIGN_KIND_COMPARISON:
            right = [decode_image(image.data) for image in task.right_images]
            question = _QUESTIONS[task.question]
            vote = self._panel.compare(question, prompt, images, right, _key(task, task.images))[0]
            answer.preference = _PREFERENCES[vote]
            return answer
        keys = [_key(task, [image]) for image in task.images]
        votes = self._panel.judge(images, [prompt] * len(images), keys, 1)
        answer.verdicts.extend(VERDICTS[one[0].verdict] for one in votes)
        return answer

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        for attempt in range(_TRIES):
            try:
                return method(request, metadata=self._metadata, timeout=_CALL_S)
            except grpc.RpcError as error:
                if error.code() not in _AGAIN or attempt == _TRIES - 1:
                    raise FeedbackError(
                        f"the rater {self._rater.name} cannot go on: {error.code().name}: {error.details()}"
                    ) from None
                time.sleep(min(2.0, 0.1 * 2**attempt))
        raise AssertionError


def _key(task: pb.Task, images: Sequence[pb.TaskImage]) -> str:
    text = "\n".join([task.prompt, *(image.digest for image in images)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
