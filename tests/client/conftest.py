"""A server that plays faults, and clients of both kinds."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from accord.client import Client, RetryPolicy
from tests.client import server
from tests.client.both import Blocking

# Waits that a test does not feel; how long they are is tested on its own.
QUICK = RetryPolicy(max_attempts=5, initial_backoff_s=0.01, max_backoff_s=0.02)


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ACCORD_ENDPOINT", "ACCORD_TOKEN", "ACCORD_CA_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCORD_HOME", str(tmp_path / "home"))


@pytest.fixture
def faulty() -> Iterator[server.Faulty]:
    with server.serve() as servicer:
        yield servicer


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Client]]:
    """Makes clients, of each kind in turn, that behave as the blocking one does."""
    made: list[Client] = []

    def make(target: str, **settings: object) -> Client:
        settings = {"token": server.TOKEN, "retry": QUICK, **settings}
        client = (Client if request.param == "sync" else Blocking)(target, **settings)  # type: ignore[arg-type]
        made.append(client)  # type: ignore[arg-type]
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(connect: Callable[..., Client], faulty: server.Faulty) -> Client:
    return connect(faulty.target)
