"""A feedback service that runs: on ports of its own, over a store with a campaign of shapes."""

import asyncio
import dataclasses
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from accord import tokens
from accord.feedback import Campaigns, Candidate, ComparisonItem, FeedbackStore
from accord.images import ImageFolder, encode_png
from accord.v1 import feedback_pb2_grpc
from services.feedback.config import FeedbackServiceConfig
from services.feedback.main import Service
from services.feedback.signing import Signer, load_secret
from tests.feedback import conftest as databases

postgres = databases.postgres
any_database = databases.url
"""The URL of an empty database: each test that takes it runs on SQLite and on PostgreSQL."""

WAIT_S = 60.0
IMAGES = 30
PROMPTS = ("two red stars", "a <script>document.title='owned'</script> circle", "green square")


@dataclasses.dataclass
class Running:
    """A service, and what belongs to it."""

    config: FeedbackServiceConfig
    service: Service
    url: str
    images: ImageFolder
    tokens: dict[str, str]

    @property
    def site(self) -> str:
        return self.service.addresses["page"]

    @property
    def signer(self) -> Signer:
        return Signer(load_secret(self.config.state_dir))

    def invite(self, rater: str, campaign: str = "shapes", hours: float = 1.0) -> str:
        """The path of a new link."""
        return f"/invite/{self.signer.make_invite(campaign, rater, hours)[0]}"

    def client(self) -> httpx.Client:
        """A browser without scripts."""
        return httpx.Client(base_url=self.site, timeout=WAIT_S)

    def enter(self, rater: str, campaign: str = "shapes") -> "Rater":
        """A rater who opened a link."""
        client = self.client()
        token = self.invite(rater, campaign).rpartition("/")[2]
        assert client.post("/invite", data={"token": token}).status_code == 303
        return Rater(client)

    def stub(self, token: str = "") -> feedback_pb2_grpc.FeedbackServiceStub:
        """A plain stub; see `bearer` for its metadata."""
        return feedback_pb2_grpc.FeedbackServiceStub(grpc.insecure_channel(self.service.addresses["gRPC"]))

    def bearer(self, name: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.tokens[name]}"),)


class Rater:
    """What the page's script does, by hand."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        found = re.search(r'name="csrf-token" content="([^"]+)"', client.get("/rate").text)
        assert found
        self.csrf = found[1]

    def call(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.client.post(path, json=body, headers={"X-CSRF-Token": self.csrf, **headers})

    def next(self, *held: str) -> dict[str, Any]:
        reply = self.call("/api/next", {"held": held})
        assert reply.status_code == 200, reply.text
        task: dict[str, Any] = reply.json()["task"]
        return task

    def answer(self, task_id: str, key: str, **answer: Any) -> httpx.Response:
        return self.call(f"/api/tasks/{task_id}/answer", {"idempotency_key": key, **answer})


def make_store(directory: Path, *, judgements_per_item: int = 1, prompts: tuple[str, ...] = PROMPTS) -> str:
    """Thirty images in a store, with an alignment campaign `shapes` and a comparison `models`."""
    url = f"sqlite:///{directory}/feedback.db"
    folder, rng = ImageFolder(directory / "images"), np.random.default_rng(0)
    digests = [
        folder.put(encode_png(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))) for _ in range(IMAGES)
    ]
    with FeedbackStore(url) as store, Campaigns(url) as campaigns:
        store.add_candidates(
            Candidate(digest, prompts[i // 3 % len(prompts)], "count", "seen", i, 16, 16, "run")
            for i, digest in enumerate(digests)
        )
        campaigns.create_alignment("shapes", "Shapes & <more>", judgements_per_item=judgements_per_item)
        item = ComparisonItem(PROMPTS[0], digests[:4], digests[4:8])
        campaigns.create_comparison("models", "Models", [item], judgements_per_item=2)
    return url


def run_service(config: FeedbackServiceConfig, url: str, made: dict[str, str]) -> Iterator[Running]:
    """Runs the service in a thread, as `Service.run` does in a process of its own."""
    service, ended = Service(config), threading.Event()
    failure: list[BaseException] = []
    loop = asyncio.new_event_loop()

    def work() -> None:
        try:
            loop.run_until_complete(service.run(handle_signals=False))
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while not (ended.wait(0.02) or service.serving.is_set()):
        pass
    assert not failure, failure
    try:
        yield Running(config, service, url, ImageFolder(config.images), made)
    finally:
        loop.call_soon_threadsafe(service.stop)
        thread.join(WAIT_S)
        assert not thread.is_alive()
        loop.close()


def make_config(directory: Path, url: str, **settings: Any) -> FeedbackServiceConfig:
    """Its ports are the system's choice."""
    values: dict[str, Any] = {
        "url": url, "images": directory / "images", "state_dir": directory / "state",
        "tokens": directory / "tokens.yaml", "port": 0, "grpc_port": 0, "metrics_port": 0, "shutdown_s": 5,
    }  # fmt: skip
    return FeedbackServiceConfig(**values, **settings)


def make_tokens(directory: Path) -> dict[str, str]:
    """Tokens by name: of a program that rates, of an operator, and one that may do neither."""
    path = directory / "tokens.yaml"
    scopes = {"robot": ["rate"], "other": ["rate"], "boss": ["rate", "feedback"], "nobody": ["generate"]}
    return {name: tokens.add(path, name, given) for name, given in scopes.items()}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One for a module: its tests use raters of their own."""
    directory = tmp_path_factory.mktemp("feedback")
    url = make_store(directory, judgements_per_item=25)
    yield from run_service(make_config(directory, url), url, make_tokens(directory))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts a service of the test's own."""
    running: list[Iterator[Running]] = []

    def begin(
        *, judgements_per_item: int = 1, prompts: tuple[str, ...] = PROMPTS, **settings: Any
    ) -> Running:
        url = make_store(tmp_path, judgements_per_item=judgements_per_item, prompts=prompts)
        running.append(run_service(make_config(tmp_path, url, **settings), url, make_tokens(tmp_path)))
        return next(running[-1])

    yield begin
    for one in running:
        next(one, None)
