"""The engine in a process of its own does what the engine does."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from accord.diffusion.engine import EngineConfig
from accord.diffusion.model import DiffusionModel
from accord.diffusion.process_engine import ProcessEngine
from accord.errors import ArtifactError, ConfigError, EngineClosed, EngineFull, ModelNotLoaded
from tests.diffusion.engines import SCHEDULERS, WAIT_S, difference, reference, spec, until


@pytest.fixture(scope="module")
def engine(tiny_model: DiffusionModel) -> Iterator[ProcessEngine]:
    with ProcessEngine(EngineConfig(max_queue=200), threads=1) as engine:
        engine.load("m", tiny_model)
        yield engine


def test_same_images(engine: ProcessEngine, tiny_model: DiffusionModel) -> None:
    wanted = [spec(seed, scheduler=SCHEDULERS[seed % 5], steps=3 + seed % 3) for seed in range(10)]
    told: list[tuple[int, int]] = []
    tickets = [engine.submit(each, lambda done, of: told.append((done, of))) for each in wanted]
    for ticket, each in zip(tickets, wanted, strict=True):
        assert difference(ticket.future.result(WAIT_S), reference(tiny_model, each)) <= 1
        assert ticket.steps_done == ticket.steps == each.steps
    assert told
    assert engine.stats().finished >= 10
    assert engine.healthy
    assert engine.models == ["m"]


def test_cancelling(engine: ProcessEngine, tiny_model: DiffusionModel) -> None:
    before = engine.stats()
    tickets = [engine.submit(spec(seed, steps=500)) for seed in range(8)]
    until(lambda: tickets[0].steps_done > 0)
    assert all(ticket.cancel() for ticket in tickets)
    until(lambda: engine.stats().in_flight == 0)
    after = engine.stats()
    assert after.cancelled - before.cancelled == 8
    assert after.sample_steps - before.sample_steps < 8 * 500
    with pytest.raises(CancelledError):
        tickets[0].future.result(0)
    ticket = engine.submit(spec(3))
    assert difference(ticket.future.result(WAIT_S), reference(tiny_model, ticket.spec)) <= 1


def test_errors_are_the_same(engine: ProcessEngine, tiny_model: DiffusionModel) -> None:
    with pytest.raises(ConfigError, match="multiples of 8"):
        engine.submit(spec(height=60))
    with pytest.raises(ConfigError, match="no scheduler"):
        engine.submit(spec(scheduler="os"))
    with pytest.raises(ModelNotLoaded, match="loaded: m"):
        engine.submit(spec(model="n"))
    with pytest.raises(ModelNotLoaded):
        engine.unload("n")
    nowhere = DiffusionModel(**{**vars(tiny_model), "directory": "/nowhere"})
    with pytest.raises(ArtifactError, match="nowhere"):
        engine.load("n", nowhere)
    engine.load("n", tiny_model)
    ticket = engine.submit(spec(model="n"))
    engine.unload("n")
    assert difference(ticket.future.result(WAIT_S), reference(tiny_model, ticket.spec)) <= 1
    tickets = [engine.submit(spec(seed, steps=500)) for seed in range(200)]
    with pytest.raises(EngineFull, match="max_queue"):
        engine.submit(spec())
    for ticket in tickets:
        ticket.cancel()
    assert engine.stats().refused >= 1


def test_closing_ends_the_process_and_what_runs(engine: ProcessEngine) -> None:
    """The last test with the shared engine."""
    ticket = engine.submit(spec(steps=1000))
    until(lambda: ticket.steps_done > 0)
    engine.close()
    assert engine._child.returncode == 0
    assert isinstance(ticket.future.exception(WAIT_S), EngineClosed)
    assert not engine.healthy
    engine.close()


def test_a_killed_process_fails_its_samples_at_once(tiny_model: DiffusionModel) -> None:
    engine = ProcessEngine(EngineConfig(), threads=1)
    engine.load("m", tiny_model)
    ticket = engine.submit(spec(steps=1000))
    until(lambda: ticket.steps_done > 0)
    os.kill(engine._child.pid, signal.SIGKILL)
    with pytest.raises(EngineClosed, match="died"):
        ticket.future.result(WAIT_S)
    until(lambda: not engine.healthy)
    with pytest.raises(EngineClosed):
        engine.submit(spec())
    assert engine.stats().failed == 0, "the last known numbers"
    engine.close()
