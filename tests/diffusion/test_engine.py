"""The engine makes the images that `sample_images` makes, whoever shares the batch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accord.diffusion.engine import Engine, EngineConfig, SampleSpec, Ticket
from accord.diffusion.model import DiffusionModel, load_diffusion_model
from accord.diffusion.seeds import candidate_seed
from accord.errors import ConfigError
from tests.diffusion.engines import SCHEDULERS, WAIT_S, difference, reference, spec

PROMPTS = ["red star", "two circles on grass", "blue heart", ""]


@pytest.fixture(scope="module")
def engine(tiny_model: DiffusionModel, tiny_v_model: DiffusionModel) -> Iterator[Engine]:
    engine = Engine(EngineConfig())
    engine.load("m", tiny_model)
    engine.load("v", tiny_v_model)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def models(tiny_model: DiffusionModel, tiny_v_model: DiffusionModel) -> dict[str, DiffusionModel]:
    return {"m": tiny_model, "v": tiny_v_model}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("model", ["m", "v"])
def test_equals_sample_images_alone_and_in_a_batch(
    engine: Engine, models: dict[str, DiffusionModel], model: str, scheduler: str
) -> None:
    wanted = [
        spec(seed, model=model, scheduler=scheduler, prompt=PROMPTS[seed % 3], steps=3 + seed % 3)
        for seed in range(6)
    ]
    others = [
        spec(seed, model=model, scheduler=SCHEDULERS[seed % 5], guidance_scale=1.0)
        for seed in range(100, 110)
    ]
    tickets = [engine.submit(each) for each in [*wanted, *others]]
    together = [ticket.future.result(WAIT_S) for ticket in tickets[:6]]
    alone = [engine.submit(each).future.result(WAIT_S) for each in wanted]
    expected = [reference(models[model], each) for each in wanted]
    for first, second, third in zip(together, alone, expected, strict=True):
        assert first.dtype == np.uint8
        assert first.shape == (64, 64, 3)
        assert difference(first, third) <= 1
        assert difference(second, third) <= 1
    assert difference(together[0], together[1]) > 5, "samples do differ, or the test would show nothing"


def test_guidance_negative_prompt_and_size_count(engine: Engine, tiny_model: DiffusionModel) -> None:
    wanted = [
        spec(guidance_scale=1.0),
        spec(guidance_scale=0.0),
        spec(guidance_scale=8.0),
        spec(guidance_scale=8.0, negative_prompt="cross"),
        spec(height=48, width=80),
    ]
    tickets = [engine.submit(each) for each in wanted]
    images = [ticket.future.result(WAIT_S) for ticket in tickets]
    for image, each in zip(images, wanted, strict=True):
        assert difference(image, reference(tiny_model, each)) <= 1
    assert np.array_equal(images[0], images[1])
    assert difference(images[0], images[2]) > 1
    assert difference(images[2], images[3]) > 1
    assert images[4].shape == (48, 80, 3)


requests = st.lists(
    st.builds(
        spec,
        st.integers(0, 2**63 - 1),
        model=st.sampled_from(["m", "v"]),
        prompt=st.sampled_from(PROMPTS),
        negative_prompt=st.sampled_from(["", "cross"]),
        steps=st.integers(1, 6),
        guidance_scale=st.sampled_from([0.0, 1.0, 1.5, 7.5]),
        scheduler=st.sampled_from([*SCHEDULERS, "HeunDiscreteScheduler", "DDPMScheduler"]),
        height=st.sampled_from([32, 64]),
    ),
    min_size=1,
    max_size=10,
)


@given(requests)
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
def test_any_mixture_of_requests(
    engine: Engine, models: dict[str, DiffusionModel], wanted: list[SampleSpec]
) -> None:
    tickets: list[Ticket] = [engine.submit(each) for each in wanted]
    for ticket, each in zip(tickets, wanted, strict=True):
        image = ticket.future.result(WAIT_S)
        assert ticket.steps_done == ticket.steps >= each.steps
        assert difference(image, reference(models[each.model], each)) <= 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_padded_batches_give_the_same_images(tiny_model: DiffusionModel, scheduler: str) -> None:
    with Engine(EngineConfig(max_batch=8, batch_sizes=(3, 8))) as engine:
        engine.load("m", tiny_model)
        wanted = [spec(seed, scheduler=scheduler, guidance_scale=[1.0, 4.0][seed % 2]) for seed in range(7)]
        tickets = [engine.submit(each) for each in wanted]
        for ticket, each in zip(tickets, wanted, strict=True):
            assert difference(ticket.future.result(WAIT_S), reference(tiny_model, each)) <= 1
        stats = engine.stats()
        assert stats.padding > 0
        assert stats.sample_steps == 7 * 4


def test_one_batch_size_makes_images_bit_identical(tiny_model: DiffusionModel) -> None:
    """The same kernels for every batch, so the same bits alone and together."""
    with Engine(EngineConfig(max_batch=8, batch_sizes=(8,), decode_batch=1)) as engine:
        engine.load("m", tiny_model)
        wanted = [spec(seed, scheduler=SCHEDULERS[seed % 5], steps=3 + seed % 2) for seed in range(10)]
        tickets = [engine.submit(each) for each in wanted]
        together = [ticket.future.result(WAIT_S) for ticket in tickets]
        alone = [engine.submit(each).future.result(WAIT_S) for each in wanted]
        for first, second in zip(together, alone, strict=True):
            assert np.array_equal(first, second)


@pytest.mark.gpu
@pytest.mark.slow
def test_compiled_on_a_gpu(tiny_directory: Path) -> None:
    model = load_diffusion_model(tiny_directory)
    wanted = [spec(seed, guidance_scale=[1.0, 4.0][seed % 2]) for seed in range(7)]
    expected = [reference(model, each) for each in wanted]
    config = EngineConfig(max_batch=8, batch_sizes=(2, 8), compile=True)
    with Engine(config, device="cuda") as engine:
        engine.load("m", model)
        tickets = [engine.submit(each) for each in wanted]
        for ticket, image in zip(tickets, expected, strict=True):
            assert difference(ticket.future.result(WAIT_S), image) <= 3


def test_prompts_are_encoded_once(tiny_model: DiffusionModel) -> None:
    with Engine(EngineConfig(text_cache=2)) as engine:
        engine.load("m", tiny_model)
        for prompt in [
            "red star",
            "red star",
            "blue heart",
            "red star",
            "one cross",
            "two hearts",
            "red star",
        ]:
            engine.submit(spec(prompt=prompt, guidance_scale=1.0, steps=1)).future.result(WAIT_S)
        assert engine.stats().cache_hits == 2
        assert engine.stats().cache_misses == 5


def test_candidate_seeds() -> None:
    seeds = {candidate_seed(seed, candidate) for seed in range(40) for candidate in range(40)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert candidate_seed(7, 3) == candidate_seed(7, 3)
    assert candidate_seed(1, 23) != candidate_seed(12, 3)
    assert candidate_seed(7, 0) == 8862997118719747769, "manifests hold seeds: this must never change"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 60}, "multiples of 8"),
        ({"width": 0}, "multiples of 8"),
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": 100_000}, "from 1 to 1000"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"seed": 2**64}, "64 bits"),
        ({"scheduler": "UNet2DConditionModel"}, "no scheduler"),
        ({"scheduler": "os"}, "no scheduler"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(
    engine: Engine, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.submit(spec(**({"seed": 1} | changes)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_batch": 64, "batch_sizes": [8, 32]}, "must hold max_batch"),
        ({"batch_sizes": [0, 64]}, "positive"),
        ({"compile": True}, "needs batch_sizes"),
    ],
)
def test_configs_that_contradict_themselves(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.model_validate(values)
