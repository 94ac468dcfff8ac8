"""Both clients against a real server: what they send, what they give back, and what they try again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from accord import client as api
from accord.client import Client
from accord.errors import ConfigError, ImageError
from tests.client import server
from tests.client.server import ACTOR_DIED, Fault, Faulty, rich_fault

PROMPT = "a red star"
Code = grpc.StatusCode


def test_the_best_of_the_candidates_come_back_ranked(client: Client, faulty: Faulty, tmp_path: Path) -> None:
    made = client.generate(PROMPT, num_images=2, candidates=4, seed=7, steps=8, scheduler="euler")
    assert [image.rank for image in made.images] == [1, 2]
    assert [image.candidate for image in made.images] == [3, 2]
    assert made.best.reward == pytest.approx(0.8)
    assert made.summary == api.Summary("completed", 4, 7, server.MODEL, server.REWARD_MODEL, 1.5)
    assert np.all(made.best.pixels() == 40)
    assert made.best.manifest.prompt == PROMPT
    path = made.best.save(tmp_path / f"best{made.best.suffix}")
    assert path.name == "best.png"
    assert api.manifest_from_png(path.read_bytes()) == made.best.manifest
    (request,) = faulty.requests
    assert (request.spec.num_candidates, request.spec.steps, request.spec.scheduler) == (4, 8, 3)
    assert not request.spec.HasField("guidance_scale")  # the server's choice
    assert faulty.metadata[0]["authorization"] == f"Bearer {server.TOKEN}"


def test_every_option_arrives(client: Client, faulty: Faulty) -> None:
    client.generate(
        PROMPT, negative_prompt="n", guidance_scale=0.0, width=64, height=32, image_format="webp", model="m",
        reward_model="r", accept_reward=0.9, time_budget_s=1.5, request_id="mine",
    )  # fmt: skip
    request = faulty.requests[0]
    assert request.request_id == "mine"
    spec = request.spec
    assert (spec.negative_prompt, spec.width, spec.height, spec.image_format) == ("n", 64, 32, 3)
    assert (spec.model, spec.reward_model) == ("m", "r")
    assert (spec.HasField("guidance_scale"), spec.guidance_scale) == (True, 0.0)
    assert spec.accept_reward == pytest.approx(0.9)
    assert spec.time_budget.ToTimedelta().total_seconds() == 1.5


def test_progress_is_told_and_the_result_is_the_same(client: Client) -> None:
    told: list[api.Progress] = []
    made = client.generate(PROMPT, num_images=2, candidates=3, seed=1, on_progress=told.append)
    assert [progress.fraction for progress in told] == pytest.approx([1 / 3, 2 / 3, 1])
    assert made == client.generate(PROMPT, num_images=2, candidates=3, seed=1, request_id=made.request_id)


def test_a_stream_tells_all_as_it_happens(client: Client) -> None:
    events = list(client.stream(PROMPT, candidates=2, seed=5))
    assert isinstance(events[0], api.Accepted)
    assert events[0].seed == 5
    images = [event for event in events if isinstance(event, api.GeneratedImage)]
    assert [(image.candidate, image.rank) for image in images] == [(0, 0), (1, 0)]
    last = events[-1]
    assert isinstance(last, api.Generation)
    assert [image.candidate for image in last.images] == [1]


def test_scores_come_in_order_and_many_are_sent_in_parts(
    client: Client, faulty: Faulty, tmp_path: Path
) -> None:
    (tmp_path / "image.png").write_bytes(b"1234")
    pairs: list[Any] = [(tmp_path / "image.png", "a star"), *((bytes(n % 7), "stars") for n in range(300))]
    scores = client.score(pairs)
    assert [len(request.pairs) for request in faulty.requests] == [256, 45]
    assert faulty.requests[1].reward_model == server.REWARD_MODEL  # one model for all
    assert (scores[0].clip_similarity, scores[0].prompt_probability) == (pytest.approx(0.04), 0.25)
    assert scores[1].prompt_probability is None
    assert [score.clip_similarity for score in scores[1:]] == pytest.approx([n % 7 / 100 for n in range(300)])
    assert client.score([]) == ()


def test_an_image_is_made_again_from_its_manifest(client: Client, faulty: Faulty) -> None:
    image = client.generate(PROMPT, seed=3).best
    again = client.replay(api.manifest_from_json(api.manifest_json(image.manifest)))
    assert faulty.requests[-1].manifest == image.manifest
    assert again.data == image.data


def test_models_are_listed(client: Client) -> None:
    base, reward = client.models()
    assert (base.kind, base.alias, base.digest, base.is_default) == ("diffusion", "base", server.MODEL, True)
    assert base.load_time.isoformat() == "1970-01-01T00:01:00+00:00"
    assert reward.kind == "reward"


DIED = Fault(Code.INTERNAL, ACTOR_DIED)
PASSING = [
    Fault(Code.UNAVAILABLE, "Socket closed"),
    Fault(Code.RESOURCE_EXHAUSTED, "Request dropped due to backpressure"),
    rich_fault(Code.RESOURCE_EXHAUSTED, "full", "CAPACITY_EXHAUSTED", server.retry_info(0.01)),
    DIED,
    Fault(Code.INTERNAL, "ray.exceptions.ActorUnavailableError: The actor 12 is unavailable"),
    Fault(Code.INTERNAL, "Received RST_STREAM with error code 2"),
    Fault(
        Code.NOT_FOUND, "Application metadata not set. Ping /ray.serve.RayServeAPIService/ListApplications"
    ),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.code.name}-{fault.details[:20]}")
def test_what_passes_is_tried_again_with_the_same_seed_and_name(
    fault: Fault, client: Client, faulty: Faulty
) -> None:
    faulty.faults = [fault, fault]
    made = client.generate(PROMPT)
    first, second, third = faulty.requests
    assert first.request_id
    assert first.spec.HasField("seed")
    assert first == second == third
    assert made.summary.seed == first.spec.seed


def test_all_methods_try_again(client: Client, faulty: Faulty) -> None:
    image = client.generate(PROMPT).best
    for call in (client.models, lambda: client.score([(b"x", "p")]), lambda: client.replay(image.manifest)):
        faulty.faults = [DIED]
        faulty.requests.clear()
        assert call()
        assert len(faulty.requests) == 2


@pytest.mark.parametrize("after", range(5))
def test_a_stream_that_dies_goes_on_and_tells_nothing_twice(
    after: int, client: Client, faulty: Faulty
) -> None:
    faulty.faults = [Fault(Code.INTERNAL, ACTOR_DIED, after=after), Fault(Code.UNAVAILABLE, "x", after=2)]
    events = list(client.stream(PROMPT, candidates=3, num_images=3))
    assert len(faulty.requests) == 3
    assert faulty.requests[0] == faulty.requests[2]
    assert sum(isinstance(event, api.Accepted) for event in events) == 1
    drawn = [event.candidate for event in events if isinstance(event, api.GeneratedImage)]
    assert drawn == [0, 1, 2]
    assert isinstance(events[-1], api.Generation)
    assert len(events[-1].images) == 3


def test_a_stream_that_ends_too_early_is_no_success(client: Client, faulty: Faulty) -> None:
    faulty.faults = [Fault(None, after=3)]
    assert client.generate(PROMPT, on_progress=lambda progress: None).images
    faulty.faults = [Fault(None, after=3)] * 9
    with pytest.raises(api.Unavailable, match="before its last message"):
        client.generate(PROMPT, on_progress=lambda progress: None)


def test_attempts_are_counted_and_the_last_error_is_raised(client: Client, faulty: Faulty) -> None:
    faulty.faults = [DIED] * 9
    with pytest.raises(api.Unavailable, match="died under the call") as caught:
        client.generate(PROMPT)
    assert len(faulty.requests) == 5
    assert "10.0.0.7" not in str(caught.value)


def test_a_wait_beyond_the_deadline_is_not_waited(client: Client, faulty: Faulty) -> None:
    busy = rich_fault(Code.RESOURCE_EXHAUSTED, "full", "CAPACITY_EXHAUSTED", server.retry_info(3600))
    faulty.faults = [busy]
    with pytest.raises(api.Overloaded, match="full") as caught:
        client.generate(PROMPT, timeout_s=60)
    assert caught.value.retry_after_s == 3600
    faulty.faults = [
        rich_fault(Code.UNAVAILABLE, "not ready", "NOT_READY", server.retry_info(3600)),
    ]
    with pytest.raises(api.Unavailable, match="not ready") as waiting:
        client.generate(PROMPT, timeout_s=60)
    assert waiting.value.retry_after_s == 3600
    assert caught.value.reason == "CAPACITY_EXHAUSTED"
    assert len(faulty.requests) == 2


BAD = error_details_pb2.BadRequest(
    field_violations=[
        error_details_pb2.BadRequest.FieldViolation(field="spec.steps", description="at most 150, got 999"),
        error_details_pb2.BadRequest.FieldViolation(field="spec.width", description="a multiple of 8"),
    ]
)
FINAL = [
    (
        rich_fault(Code.PERMISSION_DENIED, "needs generate", "SCOPE_MISSING"),
        api.PermissionDenied,
        "needs gen",
    ),
    (rich_fault(Code.NOT_FOUND, "no model x", "MODEL_NOT_FOUND"), api.ModelNotFound, "no model x"),
    (
        rich_fault(Code.INVALID_ARGUMENT, "bad", "FIELD_INVALID", BAD),
        api.InvalidRequest,
        "spec.width: a mult",
    ),
    (
        rich_fault(Code.DEADLINE_EXCEEDED, "no image yet", "TIME_BUDGET_SPENT"),
        api.DeadlineExceeded,
        "no image",
    ),
    (rich_fault(Code.INTERNAL, "said under the id", "INTERNAL_ERROR"), api.ServerError, "said under the id"),
    (Fault(Code.INTERNAL, "Traceback\n  File '/secret'"), api.ServerError, r"INTERNAL\): Traceback$"),
    (Fault(Code.UNIMPLEMENTED, "Method not found!"), api.ServerError, "is it Accord's gateway"),
    (Fault(Code.NOT_FOUND, "gone"), api.NotFound, "gone"),
    (Fault(Code.UNKNOWN, ""), api.ServerError, "does not say why"),
]


@pytest.mark.parametrize(("fault", "kind", "words"), FINAL, ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_pass_is_raised_at_once_with_its_details(
    fault: Fault, kind: type[api.ClientError], words: str, client: Client, faulty: Faulty
) -> None:
    faulty.faults = [fault]
    with pytest.raises(kind, match=words) as caught:
        client.generate(PROMPT, request_id="mine")
    assert type(caught.value) is kind
    assert caught.value.code == fault.code.name if fault.code else False
    assert caught.value.request_id == "mine"
    assert len(faulty.requests) == 1
    if isinstance(caught.value, api.InvalidRequest):
        assert caught.value.violations[0] == api.Violation("spec.steps", "at most 150, got 999")


def test_a_late_answer_is_a_deadline(client: Client, faulty: Faulty) -> None:
    faulty.delay_s = 5
    with pytest.raises(api.DeadlineExceeded, match="did not answer in time"):
        client.generate(PROMPT, timeout_s=0.2)


def test_leaving_a_stream_stops_the_drawing(client: Client, faulty: Faulty) -> None:
    faulty.delay_s = 0.02
    events = client.stream(PROMPT, candidates=200)
    assert isinstance(next(events), api.Accepted)
    assert not faulty.cancelled.is_set()
    events.close()
    assert faulty.cancelled.wait(60)


def test_an_exception_of_the_callback_stops_the_drawing(client: Client, faulty: Faulty) -> None:
    faulty.delay_s = 0.02

    def on_progress(progress: api.Progress) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        client.generate(PROMPT, candidates=200, on_progress=on_progress)
    assert faulty.cancelled.wait(60)


def test_wrong_and_missing_tokens_are_told_apart(connect: Callable[..., Client], faulty: Faulty) -> None:
    with pytest.raises(api.Unauthenticated, match="does not know this token") as caught:
        connect(faulty.target, token="accord_wrong").models()
    assert "accord_wrong" not in str(caught.value)
    with pytest.raises(api.Unauthenticated, match="set ACCORD_TOKEN"):
        connect(faulty.target, token=None).models()


def test_no_server_says_so_after_few_attempts(connect: Callable[..., Client]) -> None:
    with server.serve() as gone:
        target = gone.target
    with pytest.raises(api.Unavailable, match=r"no server answers at .* `accord serve`") as caught:
        connect(target).models()
    assert caught.value.exit_status == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidate": 3}, "unknown option 'candidate'; options are: num_images"),
        ({"scheduler": "plms"}, "known are: ddim, dpm_solver_multistep"),
        ({"image_format": "gif"}, "unknown image format 'gif'"),
        ({"seed": -1}, "seed is -1; expected an integer from 0 to 18446744073709551615"),
        ({"steps": "many"}, "steps is 'many'; expected an integer from 0 to 4294967295"),
        ({"time_budget_s": float("inf")}, "number of seconds"),
        ({"timeout_s": 0}, "positive"),
    ],
)
def test_options_that_cannot_be_sent_are_refused_here(
    options: dict[str, Any], words: str, client: Client, faulty: Faulty
) -> None:
    with pytest.raises(ConfigError, match=words):
        client.generate(PROMPT, **options)
    assert faulty.requests == []


def test_files_that_are_no_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no manifest"):
        api.manifest_from_json("{}")
    with pytest.raises(ImageError, match="no manifest"):
        api.manifest_from_json(json.dumps({"seed": "x"}))
    with pytest.raises(ImageError, match="no readable PNG"):
        api.manifest_from_png(b"GIF89a")
    from accord.images import encode_png

    with pytest.raises(ImageError, match="carries no manifest"):
        api.manifest_from_png(encode_png(np.zeros((8, 8, 3), np.uint8)))


def test_a_missing_image_file_is_named(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.png: No such file"):
        client.score([(tmp_path / "none.png", "p")])
