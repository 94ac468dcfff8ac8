"""The gRPC interface, over a port, with plain stubs."""

import dataclasses
import datetime
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from accord.feedback import Campaigns, FeedbackStore
from accord.feedback.served import ServedImages
from accord.images import encode_png
from accord.shapes.raters import Rater
from accord.v1 import feedback_pb2 as pb
from accord.v1 import feedback_pb2_grpc
from services.feedback.grpc_server import SERVICE
from services.feedback.raters import Door, rate_campaign
from tests.lanes import missing
from tests.services.feedback.conftest import WAIT_S, Running

KEY = "0123456789abcdef"


class Program:
    """A program with a token."""

    def __init__(self, running: Running, name: str) -> None:
        self.channel = grpc.insecure_channel(running.service.addresses["gRPC"])
        self.stub = feedback_pb2_grpc.FeedbackServiceStub(self.channel)
        self.metadata = running.bearer(name)

    def call(self, method: str, request: object) -> object:
        return getattr(self.stub, method)(request, metadata=self.metadata, timeout=WAIT_S)

    def lease(self, rater: str, campaign: str = "shapes", images: bool = False) -> pb.Task:
        request = pb.LeaseTaskRequest(campaign_id=campaign, rater=rater, include_images=images)
        return self.call("LeaseTask", request).task

    def submit(self, rater: str, task: pb.Task, key: str = KEY, verdict: int = pb.VERDICT_GOOD) -> bool:
        request = pb.SubmitAnswerRequest(task_id=task.task_id, rater=rater, idempotency_key=key)
        request.verdicts.extend([verdict] * len(task.images))
        return self.call("SubmitAnswer", request).counted

    def refused(self, method: str, request: object) -> tuple[grpc.StatusCode, str]:
        """The status and the reason; every error has details."""
        with pytest.raises(grpc.RpcError) as caught:
            reply = self.call(method, request)
            list(reply)  # of a stream the error comes with the first message
        details = rpc_status.from_call(caught.value).details
        info = error_details_pb2.ErrorInfo()
        assert len(details) == 1
        assert details[0].Unpack(info)
        assert info.domain == "accord"
        return caught.value.code(), info.reason


def test_lease_submit_and_undo(service: Running) -> None:
    robot = Program(service, "robot")
    task = robot.lease("ada", images=True)
    assert [service.images.get(image.digest) for image in task.images] == [
        image.data for image in task.images
    ]
    assert task.kind == pb.CAMPAIGN_KIND_ALIGNMENT
    assert task.lease_expire_time.ToDatetime(datetime.UTC) > datetime.datetime.now(datetime.UTC)
    assert robot.submit("ada", task)
    assert not robot.submit("ada", task)
    undo = pb.UndoAnswerRequest(campaign_id="shapes", rater="ada", idempotency_key="undo-0001")
    assert robot.call("UndoAnswer", undo).task_id == task.task_id
    assert robot.lease("ada").task_id == task.task_id
    assert robot.submit("ada", task, "another-key", pb.VERDICT_BAD)
    with FeedbackStore(service.url) as store:
        said = [row.verdict for row in store.judgements() if row.rater == "robot/ada"]
    assert said == ["bad"] * len(task.images)


def test_a_comparison(service: Running) -> None:
    robot = Program(service, "robot")
    task = robot.lease("cmp", "models")
    assert (len(task.images), len(task.right_images)) == (4, 4)
    request = pb.SubmitAnswerRequest(
        task_id=task.task_id, rater="cmp", idempotency_key=KEY, preference=pb.PREFERENCE_TIE
    )
    assert robot.call("SubmitAnswer", request).counted


def test_tokens_have_raters_of_their_own(service: Running) -> None:
    """A program cannot answer for another program's rater, nor for one of a link."""
    task = Program(service, "robot").lease("ben")
    answer = pb.SubmitAnswerRequest(
        task_id=task.task_id, rater="ben", idempotency_key="bens-answer", verdicts=[pb.VERDICT_BAD] * 3
    )
    code = Program(service, "other").refused("SubmitAnswer", answer)
    assert code == (grpc.StatusCode.FAILED_PRECONDITION, "LEASE_LOST")
    for rater in ("robot/ben", "../ben", "", "ben ", "b" * 65):
        request = pb.LeaseTaskRequest(campaign_id="shapes", rater=rater)
        code = Program(service, "other").refused("LeaseTask", request)
        assert code == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


@pytest.mark.parametrize(
    ("method", "request_", "scope"),
    [
        ("CreateCampaign", pb.CreateCampaignRequest(), "feedback"),
        ("ListCampaigns", pb.ListCampaignsRequest(), "feedback"),
        ("CountPreferences", pb.CountPreferencesRequest(), "feedback"),
        ("LeaseTask", pb.LeaseTaskRequest(), "rate"),
        ("SubmitAnswer", pb.SubmitAnswerRequest(), "rate"),
        ("UndoAnswer", pb.UndoAnswerRequest(), "rate"),
        ("RateServedImage", pb.RateServedImageRequest(), "rate"),
        ("RecordServedImage", pb.RecordServedImageRequest(), "feedback"),
        ("CountServedVerdicts", pb.CountServedVerdictsRequest(), "feedback"),
        ("ListJudgements", pb.ListJudgementsRequest(), "feedback"),
        ("ExportJudgements", pb.ExportJudgementsRequest(), "feedback"),
    ],
)
def test_every_method_wants_a_token_with_its_scope(
    service: Running, method: str, request_: object, scope: str
) -> None:
    refused = (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
    assert Program(service, "nobody").refused(method, request_) == refused
    if scope == "feedback":
        assert Program(service, "robot").refused(method, request_) == refused
    stranger = Program(service, "robot")
    for metadata in (
        (),
        (("authorization", "Bearer wrong"),),
        (("authorization", stranger.metadata[0][1][7:]),),
    ):
        stranger.metadata = metadata
        assert stranger.refused(method, request_) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")


@pytest.mark.parametrize(
    ("method", "request_", "code", "reason"),
    [
        ("LeaseTask", pb.LeaseTaskRequest(campaign_id="none", rater="x"), "NOT_FOUND", "NOT_FOUND"),
        (
            "SubmitAnswer",
            pb.SubmitAnswerRequest(
                task_id="none.1", rater="x", idempotency_key=KEY, verdicts=[pb.VERDICT_GOOD]
            ),
            "NOT_FOUND",
            "NOT_FOUND",
        ),
        (
            "SubmitAnswer",
            pb.SubmitAnswerRequest(task_id="shapes.1", rater="x", idempotency_key=KEY),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
        ),
        (
            "SubmitAnswer",
            pb.SubmitAnswerRequest(task_id="shapes.1", rater="x", idempotency_key=KEY, verdicts=[0, 0, 77]),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
        ),
        (
            "SubmitAnswer",
            pb.SubmitAnswerRequest(task_id="shapes.1", rater="x", idempotency_key="a b c d e", verdicts=[1]),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
        ),
        (
            "RateServedImage",
            pb.RateServedImageRequest(image_id="none", rater="x", idempotency_key=KEY, verdict=1),
            "NOT_FOUND",
            "NOT_FOUND",
        ),
        (
            "RecordServedImage",
            pb.RecordServedImageRequest(image_id="i", image=b"no PNG", prompt="x"),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
        ),
        ("ListCampaigns", pb.ListCampaignsRequest(page_size=1001), "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ("ListCampaigns", pb.ListCampaignsRequest(page_token="x"), "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ("ExportJudgements", pb.ExportJudgementsRequest(campaign_id="none"), "NOT_FOUND", "NOT_FOUND"),
        (
            "CreateCampaign",
            pb.CreateCampaignRequest(campaign_id="c", title="T", kind=2, judgements_per_item=1),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
        ),
        (
            "CreateCampaign",
            pb.CreateCampaignRequest(
                campaign_id="c",
                title="T",
                kind=2,
                judgements_per_item=1,
                gold=[pb.GoldImage()],
                comparisons=[pb.SetComparison(prompt="p", first_digests=["a"], second_digests=["b"])],
            ),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
        ),
        (
            "CreateCampaign",
            pb.CreateCampaignRequest(
                campaign_id="c",
                title="T",
                kind=1,
                judgements_per_item=1,
                comparisons=[pb.SetComparison(prompt="p", first_digests=["a"], second_digests=["b"])],
            ),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
        ),
        (
            "CreateCampaign",
            pb.CreateCampaignRequest(
                campaign_id="c",
                title="T",
                kind=1,
                judgements_per_item=1,
                gold=[pb.GoldImage(digest="a", prompt="p", verdict=pb.VERDICT_SKIP)],
            ),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
        ),
        ("CreateCampaign", pb.CreateCampaignRequest(), "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ("CountPreferences", pb.CountPreferencesRequest(campaign_id="none"), "NOT_FOUND", "NOT_FOUND"),
        (
            "CreateCampaign",
            pb.CreateCampaignRequest(campaign_id="c", title="T", kind=1, judgements_per_item=26),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
        ),
    ],
)
def test_refusals(service: Running, method: str, request_: object, code: str, reason: str) -> None:
    assert Program(service, "boss").refused(method, request_) == (grpc.StatusCode[code], reason)


def test_create_and_list_in_pages(start: Callable[..., Running]) -> None:
    boss = Program(start(), "boss")
    for number in range(3):
        request = pb.CreateCampaignRequest(
            campaign_id=f"new-{number}", kind=pb.CAMPAIGN_KIND_ALIGNMENT, title="New", judgements_per_item=2
        )
        made = boss.call("CreateCampaign", request).campaign
        assert boss.call("CreateCampaign", request).campaign == made
        assert (made.num_tasks, made.num_answers_wanted) == (10, 20)
    changed = pb.CreateCampaignRequest(campaign_id="new-0", kind=1, title="Other", judgements_per_item=3)
    assert boss.refused("CreateCampaign", changed)[0] == grpc.StatusCode.INVALID_ARGUMENT
    found, token = [], ""
    while True:
        page = boss.call("ListCampaigns", pb.ListCampaignsRequest(page_size=2, page_token=token))
        assert len(page.campaigns) <= 2
        found += [campaign.campaign_id for campaign in page.campaigns]
        if not (token := page.next_page_token):
            break
    assert found == ["shapes", "models", "new-0", "new-1", "new-2"]


def test_list_and_export_judgements(start: Callable[..., Running]) -> None:
    running = start()
    boss = Program(running, "boss")
    while (task := boss.lease("ada")).task_id:
        boss.submit("ada", task, f"key-of-{task.task_id.replace('.', '-')}")
    with FeedbackStore(running.url) as store:
        stored = [(row.image, row.rater, row.verdict) for row in store.judgements()]
    assert len(stored) == 30

    def plain(rows: list[pb.Judgement]) -> list[tuple[str, str, str]]:
        assert all(row.verdict == pb.VERDICT_GOOD and row.campaign_id == "shapes" for row in rows)
        return [(row.image_digest, row.rater, "good") for row in rows]

    listed, token = [], ""
    while True:
        request = pb.ListJudgementsRequest(campaign_id="shapes", page_size=7, page_token=token)
        page = boss.call("ListJudgements", request)
        listed += page.judgements
        if not (token := page.next_page_token):
            break
    assert plain(listed) == stored
    stream = boss.call("ExportJudgements", pb.ExportJudgementsRequest(campaign_id="shapes"))
    assert plain([row for part in stream for row in part.judgements]) == stored
    wrong = pb.ListJudgementsRequest(page_token=boss.call(
        "ListJudgements", pb.ListJudgementsRequest(campaign_id="shapes", page_size=7)
    ).next_page_token)  # fmt: skip
    assert boss.refused("ListJudgements", wrong)[0] == grpc.StatusCode.INVALID_ARGUMENT


def test_a_served_image_is_rated(start: Callable[..., Running]) -> None:
    running = start()
    robot = Program(running, "robot")
    with FeedbackStore(running.url) as store, Campaigns(running.url) as campaigns:
        served = ServedImages(store, campaigns, running.images)
        collected = store.candidates()[0]
        png = running.images.get(collected.image)
        assert served.record("image-1", png, "a prompt of a client's", model_digest="m" * 64, seed=3)
        assert not served.record("image-1", png, "a prompt of a client's", model_digest="m" * 64, seed=3)
        assert served.record("image-2", png, collected.prompt)  # the very image that a run collected
        for image in ("image-1", "image-2"):
            request = pb.RateServedImageRequest(
                image_id=image, rater="app", idempotency_key=KEY, verdict=pb.VERDICT_GOOD
            )
            assert robot.call("RateServedImage", request).counted
            assert not robot.call("RateServedImage", request).counted
            request.idempotency_key, request.verdict = "another-key", pb.VERDICT_BAD
            assert robot.refused("RateServedImage", request)[0] == grpc.StatusCode.ALREADY_EXISTS
        judged = [(row.prompt, row.rater, row.verdict) for row in store.judgements()]
    assert judged == [
        ("a prompt of a client's", "robot/app", "good"),
        (collected.prompt, "robot/app", "good"),
    ]


def test_served_images_are_recorded_rated_and_counted_by_model(start: Callable[..., Running]) -> None:
    running = start()
    boss, robot = Program(running, "boss"), Program(running, "robot")
    large = encode_png(np.random.default_rng(0).integers(0, 255, (768, 768, 3), dtype=np.uint8))
    assert len(large) > 1 << 20
    models = {"one": "a" * 64, "two": "b" * 64, "three": "b" * 64}
    for image_id, model in models.items():
        request = pb.RecordServedImageRequest(
            image_id=image_id, image=large, prompt="a star", model_digest=model, seed=2**63 - 1
        )
        assert boss.call("RecordServedImage", request).recorded
        assert not boss.call("RecordServedImage", request).recorded
    request.prompt = "another"
    assert boss.refused("RecordServedImage", request) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
    )
    verdicts = {("one", "app"): 1, ("one", "web"): 2, ("two", "app"): 2, ("three", "app"): 3}
    for (image_id, rater), verdict in verdicts.items():
        rating = pb.RateServedImageRequest(
            image_id=image_id, rater=rater, idempotency_key=KEY, verdict=verdict
        )
        assert robot.call("RateServedImage", rating).counted
    # A campaign's verdict on a recorded image is none of a client's.
    with FeedbackStore(running.url) as store:
        judgement = store.judgements()[0]
        store.submit([dataclasses.replace(judgement, idempotency_key="other", rater="r", verdict="bad")])

    def counts(request: pb.CountServedVerdictsRequest) -> dict[str, tuple[int, int, int]]:
        reply = boss.call("CountServedVerdicts", request)
        return {one.model_digest: (one.good, one.bad, one.skip) for one in reply.models}

    # One voice an image and token: whom a client names does not outvote others.
    assert counts(pb.CountServedVerdictsRequest()) == {"a" * 64: (1, 0, 0), "b" * 64: (0, 1, 1)}
    past, future = (Timestamp(seconds=int(time.time()) + ahead) for ahead in (-3600, 3600))
    assert len(counts(pb.CountServedVerdictsRequest(since=past))) == 2
    assert counts(pb.CountServedVerdictsRequest(since=future)) == {}
    with Campaigns(running.url) as campaigns:
        campaigns.exclude("robot/app", "bored")
    assert counts(pb.CountServedVerdictsRequest()) == {"a" * 64: (0, 1, 0)}


def test_health_and_reflection_need_no_token(service: Running) -> None:
    with grpc.insecure_channel(service.service.addresses["gRPC"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=WAIT_S)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        reply = next(iter(stub.ServerReflectionInfo(iter([request]), timeout=WAIT_S)))
        assert SERVICE in {found.name for found in reply.list_services_response.service}


def test_raters_of_the_world_of_shapes(start: Callable[..., Running]) -> None:
    """Several at once: every image gets exactly the wanted judgements, by as many raters."""
    running = start(judgements_per_item=2, prompts=("two stars", "blue heart"))
    door = Door(running.service.addresses["gRPC"], running.tokens["robot"])
    raters = [Rater(name=f"rater-{n}", error_rate=0.1 * n) for n in range(4)]
    counts: list[int] = []
    assert rate_campaign(door, "shapes", raters=raters, on_answer=counts.append) == 20
    assert max(counts) == 20
    with Campaigns(running.url) as campaigns:
        assert campaigns.get("shapes").complete
        judged = list(campaigns.all_judgements("shapes"))
    assert len(judged) == len({(row.image, row.rater) for row in judged}) == 60
    assert {row.rater for row in judged} <= {f"robot/rater-{n}" for n in range(4)}


def test_tls(start: Callable[..., Running], tmp_path: Path) -> None:
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    if shutil.which("openssl") is None:
        missing("there is no openssl")
    subprocess.run([*command.split(), *names], check=True, capture_output=True, timeout=WAIT_S)
    running = start(certificate=certificate, private_key=key)
    address = f"localhost:{running.service.addresses['gRPC'].rpartition(':')[2]}"
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    with grpc.secure_channel(address, credentials) as channel:
        reply = feedback_pb2_grpc.FeedbackServiceStub(channel).ListCampaigns(
            pb.ListCampaignsRequest(), metadata=running.bearer("boss"), timeout=WAIT_S
        )
    assert [campaign.campaign_id for campaign in reply.campaigns] == ["shapes", "models"]
    with pytest.raises(grpc.RpcError):  # nothing is answered without TLS
        Program(running, "boss").call("ListCampaigns", pb.ListCampaignsRequest())
