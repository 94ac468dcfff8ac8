"""Fifty raters at once over the running service, half on the page and half over gRPC, while it is killed."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from accord import tokens
from accord.client import ClientError, FeedbackClient, RetryPolicy
from accord.feedback import Campaigns, FeedbackStore
from services.feedback.signing import Signer, load_secret
from tests.feedback.conftest import make_candidate
from tests.services.feedback.conftest import WAIT_S

RATERS = 50
JUDGEMENTS = 3
KILLS = 50 if os.environ.get("ACCORD_SOAK") else 2
IMAGES = 40 * KILLS + 370 - (40 * KILLS + 370) % 3
LONG_S = 10 * WAIT_S


class Served:
    """A service as a process that can be killed and started again; each time on other ports."""

    def __init__(self, directory: Path, url: str) -> None:
        self._directory = directory
        self.token = tokens.add(directory / "tokens.yaml", "robot", ["rate"])
        self.config = directory / "config.json"
        settings = {
            "url": url, "images": f"{directory}/images", "state_dir": f"{directory}/state",
            "tokens": f"{directory}/tokens.yaml", "port": 0, "grpc_port": 0, "metrics_port": 0,
        }  # fmt: skip
        self.config.write_text(json.dumps(settings))
        self.addresses: dict[str, str] = {}
        self._lives = 0

    def start(self) -> None:
        self._lives += 1
        endpoint = self._directory / f"endpoint-{self._lives}.json"
        command = [sys.executable, "-m", "services.feedback", "serve", "--config", str(self.config)]
        self._process = subprocess.Popen(
            [*command, "--endpoint-file", str(endpoint)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=Path(__file__).parents[3],
        )
        end_s = time.monotonic() + WAIT_S
        while not endpoint.exists():
            assert self._process.poll() is None, "the service ended"
            assert time.monotonic() < end_s, "the service does not start"
            time.sleep(0.02)
        self.addresses = json.loads(endpoint.read_text())

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        assert self._process.wait(WAIT_S) == -signal.SIGKILL

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(WAIT_S)


class Acknowledged:
    """What the service said that it has: images and whose judgements."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: list[tuple[str, str]] = []

    def add(self, images: list[str], rater: str) -> None:
        with self._lock:
            self._seen += [(image, rater) for image in images]

    def all(self) -> list[tuple[str, str]]:
        with self._lock:
            return list(self._seen)


def _until_answered(call: Any) -> Any:
    """The result of a call that is repeated while nobody answers."""
    end_s = time.monotonic() + LONG_S
    while True:
        try:
            return call()
        except (httpx.TransportError, ClientError) as error:
            if isinstance(error, ClientError) and not error.retryable:
                raise
            if time.monotonic() > end_s:
                raise
            time.sleep(random.uniform(0.02, 0.2))


def _rate_on_the_page(served: Served, signer: Signer, rater: str, said: Acknowledged) -> None:
    with httpx.Client(timeout=WAIT_S) as browser:

        def post(path: str, **arguments: Any) -> httpx.Response:
            reply = _until_answered(lambda: browser.post(served.addresses["page"] + path, **arguments))
            assert reply.status_code in (200, 303, 401), reply.text
            return reply

        # A link opens once. Whoever lost the answer to that asks for another, as he is told to.
        while post("/invite", data={"token": signer.make_invite("c", rater, 1.0)[0]}).status_code == 401:
            pass
        page = _until_answered(lambda: browser.get(served.addresses["page"] + "/rate")).text
        token = re.search(r'name="csrf-token" content="([^"]+)"', page)
        assert token
        headers = {"X-CSRF-Token": token[1]}
        while (task := post("/api/next", json={"held": []}, headers=headers).json()["task"]) is not None:
            body = {"idempotency_key": str(uuid.uuid4()), "verdicts": ["good"] * len(task["images"])}
            time.sleep(random.uniform(0, 0.1))
            path = f"/api/tasks/{task['task_id']}/answer"
            assert "counted" in post(path, json=body, headers=headers).json()
            said.add(task["images"], rater)


def _rate_over_grpc(served: Served, rater: str, said: Acknowledged) -> None:
    with contextlib.ExitStack() as stack:
        clients: dict[str, FeedbackClient] = {}

        def client() -> FeedbackClient:
            address = served.addresses["gRPC"]
            if address not in clients:
                made = FeedbackClient(address, token=served.token, retry=RetryPolicy(max_attempts=1))
                clients[address] = stack.enter_context(made)
            return clients[address]

        while (task := _until_answered(lambda: client().lease("c", rater=rater))) is not None:
            key, verdicts = uuid.uuid4().hex, ["bad"] * len(task.images)
            time.sleep(random.uniform(0, 0.1))
            _until_answered(
                lambda task=task, key=key, verdicts=verdicts: client().submit(
                    task.task_id, verdicts, rater=rater, idempotency_key=key
                )
            )
            said.add(list(task.images), f"robot/{rater}")


@pytest.fixture
def served(tmp_path: Path, any_database: str) -> Iterator[Served]:
    url = any_database
    with FeedbackStore(url) as store, Campaigns(url) as campaigns:
        store.add_candidates(make_candidate(number) for number in range(IMAGES))
        campaigns.create_alignment("c", "Title", judgements_per_item=JUDGEMENTS)
    running = Served(tmp_path, url)
    running.start()
    yield running
    running.close()


def test_fifty_raters_while_the_service_is_killed(served: Served, any_database: str, tmp_path: Path) -> None:
    """What was acknowledged before a kill is there, and in the end every image has exactly k judgements."""
    said = Acknowledged()
    signer = Signer(load_secret(tmp_path / "state"))
    with ThreadPoolExecutor(RATERS) as pool, Campaigns(any_database) as campaigns:
        raters: list[Future[None]] = []
        for number in range(RATERS // 2):
            raters.append(pool.submit(_rate_on_the_page, served, signer, f"page-{number}", said))
            raters.append(pool.submit(_rate_over_grpc, served, f"rater-{number}", said))
        for _ in range(KILLS):
            before = len(said.all())
            while len(said.all()) < before + 15:
                done = [rater.result() for rater in raters if rater.done()]
                assert len(done) < RATERS, "all was judged before the kills were over"
                time.sleep(0.005)
            served.kill()
            acknowledged = said.all()
            stored = {(row.image, row.rater) for row in campaigns.all_judgements("c")}
            assert set(acknowledged) <= stored
            served.start()
        for rater in raters:
            rater.result(LONG_S)
        judged = [(row.image, row.rater) for row in campaigns.all_judgements("c")]
        assert campaigns.get("c").complete
    assert Counter(image for image, _ in judged) == {f"{n:064x}": JUDGEMENTS for n in range(IMAGES)}
    assert len(set(judged)) == len(judged)  # nobody twice
    assert sorted(judged) == sorted(said.all())  # none lost, and none that nobody was told of
