"""The parts of the benchmarks that numbers depend on; the benchmarks themselves are run by hand."""

import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from benchmarks.local import EngineServer, LockedServer, Server, StaticServer, all_of, measure_ceiling
from benchmarks.overload import Seen
from benchmarks.report import report
from benchmarks.traffic import MIXED, SINGLE, Request, play


def test_the_same_seed_gives_every_rival_the_same_traffic() -> None:
    requests = MIXED.requests(10.0, 400, seed=3)
    assert requests == MIXED.requests(10.0, 400, seed=3)
    assert requests != MIXED.requests(10.0, 400, seed=4)
    total = sum(request.images for request in requests)
    assert 400 <= total < 404
    assert {request.steps for request in requests} == set(range(8, 31))
    assert 8.0 < total / requests[-1].arrival_s < 12.5
    assert {(request.steps, request.images) for request in SINGLE.requests(10.0, 9, seed=0)} == {(20, 1)}


def test_play_counts_answers_and_failures() -> None:
    def submit(request: Request) -> Future[int]:
        future: Future[int] = Future()
        if request.images == 1:
            future.set_exception(RuntimeError("no"))
        else:
            threading.Timer(0.01, future.set_result, (1,)).start()
        return future

    requests = MIXED.requests(2000.0, 40, seed=1)
    outcome = play(requests, submit)
    assert outcome.failed == sum(request.images == 1 for request in requests) > 0
    assert outcome.images == sum(request.images for request in requests if request.images > 1)
    assert outcome.latency_s(50) >= 0.005
    assert outcome.images_per_s > 0


@pytest.mark.parametrize("make", [EngineServer, LockedServer, StaticServer])
def test_every_server_answers_mixed_traffic(make: type, tiny_directory: Path) -> None:
    from accord.diffusion.engine import EngineConfig

    options = {EngineServer: {"config": EngineConfig()}, StaticServer: {"wait_s": 0.05, "most": 4}}
    server: Server = make(tiny_directory, "cpu", **options.get(make, {}))
    try:
        outcome = play(MIXED.requests(500.0, 8, seed=0), server.submit)
    finally:
        server.close()
    assert outcome.failed == 0
    assert outcome.images >= 8


def test_the_ceiling_is_that_of_the_rows_and_the_image(tiny_directory: Path) -> None:
    ceiling = measure_ceiling(tiny_directory, "cpu", batches=(2, 4), calls=2)
    assert ceiling.rows in (2, 4)
    assert 1 / ceiling.images_per_s(SINGLE) == pytest.approx(40 * ceiling.row_s + ceiling.image_s)


def test_all_of_ends_with_the_last_and_fails_with_any() -> None:
    parts: list[Future[int]] = [Future(), Future()]
    together = all_of(list(parts))
    parts[0].set_result(1)
    assert not together.done()
    parts[1].set_result(2)
    assert together.result(0) == [1, 2]
    failing: list[Future[int]] = [Future(), Future()]
    together = all_of(list(failing))
    failing[1].set_exception(ValueError("no"))
    failing[0].set_result(1)
    assert together.exception(0) is not None


def test_fairness_and_the_table() -> None:
    assert Seen(images=[5, 5]).jain == 1.0
    assert Seen(images=[10, 0]).jain == 0.5
    run = {"traffic": "t", "load": 1.0, "ceiling": 10.0, "p50_s": 1.0, "p95_s": 2.0, "failed": 0}
    text = report(
        [run | {"rival": "engine", "images_per_s": 8.0}, run | {"rival": "locked", "images_per_s": 2.0}],
        "engine",
    )
    lines = text.splitlines()
    assert len({line.count("|") for line in lines}) == 1, "every row has a cell for each heading"
    assert "0.8 (0.8 to 0.8)" in lines[2]
    assert "4 (4 to 4)" in lines[3]
