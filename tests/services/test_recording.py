"""Served images go to the feedback service and come back rated; requests never wait for it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from accord.cli import app
from accord.client import FeedbackClient, InvalidRequest, NotFound
from accord.diffusion.seeds import candidate_seed
from accord.errors import ConfigError
from accord.feedback import FeedbackStore
from accord.images import decode_image
from accord.v1 import feedback_pb2
from accord.v1 import generation_pb2 as pb
from services.config import RecordSettings
from services.gateway.recording import Recorder, Served
from tests.services.deployment import Deployment, eventually
from tests.services.feedback.conftest import Running, make_config, make_store, make_tokens, run_service


class Counted:
    """The one counter that a recorder uses, which can be read."""

    def __init__(self) -> None:
        self.recorded, self.outcomes = self, list[str]()

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        self.outcomes.append((tags or {})["outcome"])


@pytest.fixture(scope="module")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("recording")
    url = make_store(directory)
    yield from run_service(make_config(directory, url), url, make_tokens(directory))


def settings(feedback: Running, directory: Path, token: str = "boss", **changed: Any) -> RecordSettings:
    file = directory / f"{token}.token"
    file.write_text(feedback.tokens[token])
    values: dict[str, Any] = {
        "url": feedback.service.addresses["gRPC"],
        "share": 1.0,
        "token_file": str(file),
        **changed,
    }
    return RecordSettings(**values)


def served(image_id: str, seed: int = 0) -> Served:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Served(image_id, pixels, b"", pb.ImageManifest(prompt="a star", model_digest="c" * 64, seed=seed))


Made = Callable[[RecordSettings | None], tuple[Recorder, Counted]]


@pytest.fixture
def made() -> Iterator[Made]:
    recorders: list[Recorder] = []

    def make(settings: RecordSettings | None) -> tuple[Recorder, Counted]:
        counted = Counted()
        metrics: Any = counted
        recorders.append(Recorder(metrics))
        recorders[-1].configure(settings)
        return recorders[-1], counted

    yield make
    for recorder in recorders:
        recorder.close()


def test_what_is_recorded_can_be_rated(feedback: Running, tmp_path: Path, made: Made) -> None:
    recorder, counted = made(settings(feedback, tmp_path))
    for number in range(3):
        assert recorder.wants(f"image-{number}")
        recorder.offer(served(f"image-{number}", number))
    eventually(lambda: counted.outcomes == ["sent"] * 3, "all are sent")
    address = feedback.service.addresses["gRPC"]
    with FeedbackClient(address, token=feedback.tokens["robot"]) as client:
        assert client.rate("image-0", "good", rater="app")
        assert not client.rate("image-0", "good", rater="app")
        with pytest.raises(InvalidRequest, match="another verdict"):
            client.rate("image-0", "bad", rater="app")
        with pytest.raises(NotFound, match="no served image"):
            client.rate("image-9", "good")
        with pytest.raises(ConfigError, match="unknown verdict"):
            client.rate("image-0", "fine")  # type: ignore[arg-type]
    (tmp_path / "rates").write_text(feedback.tokens["robot"])
    arguments = ["rate", "image-1", "bad", "--endpoint", address, "--token-file", str(tmp_path / "rates")]
    for words in ("Counted.", "Was counted before."):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert words in done.output
    reply = feedback.stub().CountServedVerdicts(
        feedback_pb2.CountServedVerdictsRequest(), metadata=feedback.bearer("boss"), timeout=60
    )
    assert {one.model_digest: (one.good, one.bad) for one in reply.models}["c" * 64] == (1, 1)


def test_a_share_is_kept_and_none_by_default(feedback: Running, tmp_path: Path, made: Made) -> None:
    some, _ = made(settings(feedback, tmp_path, share=0.25))
    wanted = sum(some.wants(f"{number}") for number in range(2000))
    assert abs(wanted - 500) < 3.3 * (2000 * 0.25 * 0.75) ** 0.5
    none, counted = made(None)
    assert not none.wants("x")
    none.offer(served("x"))
    assert counted.outcomes == []


def test_a_full_queue_drops_at_once(feedback: Running, tmp_path: Path, made: Made) -> None:
    with socket.socket() as deaf:  # takes connections and says nothing
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        recorder, counted = made(settings(feedback, tmp_path, url=address, queue_images=2))
        for number in range(8):
            recorder.offer(served(f"lost-{number}"))
        assert counted.outcomes.count("dropped") >= 5  # two wait, and one may be with the thread


def test_a_token_that_is_refused_costs_the_image_and_a_new_one_is_read(
    feedback: Running, tmp_path: Path, made: Made
) -> None:
    wanted = settings(feedback, tmp_path, token="robot")  # which lacks the scope
    recorder, counted = made(wanted)
    recorder.offer(served("refused"))
    eventually(lambda: counted.outcomes == ["failed"], "it is refused")
    Path(wanted.token_file).unlink()
    recorder.offer(served("unreadable"))
    eventually(lambda: counted.outcomes == ["failed"] * 2, "the token cannot be read")
    Path(wanted.token_file).write_text(feedback.tokens["boss"])
    recorder.offer(served("accepted", 7))
    eventually(lambda: counted.outcomes[2:] == ["sent"], "the new token is used")


@pytest.mark.cluster
def test_served_images_reach_the_store_live(
    deployment: Deployment, feedback: Running, tmp_path: Path
) -> None:
    def recording(config: dict[str, Any]) -> None:
        config["gateway"]["user_config"]["record"] = settings(feedback, tmp_path).model_dump(mode="json")

    def known(image: pb.Image) -> bool:
        try:
            with FeedbackClient(feedback.service.addresses["gRPC"], token=feedback.tokens["robot"]) as client:
                return client.rate(image.image_id, "good", rater="live")
        except NotFound:
            return False

    with deployment.deployed(recording):
        first: list[pb.Image] = []

        def begun() -> bool:
            first.extend(deployment.generate(steps=2).images)
            return any(known(image) for image in first)

        eventually(begun, "recording has begun")
        jpeg = deployment.generate(steps=2, image_format=pb.IMAGE_FORMAT_JPEG, num_images=2)
        streamed = list(deployment.stream(steps=2))
        ranked = streamed[-1].completed.ranking[0].image_id
        images = [event.image for event in streamed if event.HasField("image")]
        for image in (*jpeg.images, *images):
            eventually(lambda image=image: known(image), "the image is recorded")
        assert [image.image_id for image in images] == [ranked]
    with FeedbackStore(feedback.url) as store:
        found = {one.seed: one for one in store.candidates()}
    manifest = jpeg.images[0].manifest
    stored = found[candidate_seed(manifest.seed, manifest.candidate)]
    assert (stored.prompt, stored.source) == (manifest.prompt, manifest.model_digest)
    assert decode_image(feedback.images.get(stored.image)).shape[0] == jpeg.images[0].height
