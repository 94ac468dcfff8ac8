"""Batches are fixed by their rows, and a run that goes on computes only what is missing."""

from dataclasses import replace
from pathlib import Path

import pytest

from accord.diffusion.settings import SamplerConfig
from accord.recipe import RayConfig
from ray_jobs.generation import Row, Source, generate, make_batches

SAMPLER = SamplerConfig(steps=2)
MODELS = {name: Source(Path(name), name * 8) for name in ("base", "tuned")}


def rows(count: int, model: str = "base", guidance_scale: float = 1.0) -> list[Row]:
    return [Row(model, "red star", seed, guidance_scale) for seed in range(count)]


def test_batches_hold_rows_of_one_model_and_scale_in_their_order() -> None:
    mixed = [row for pair in zip(rows(5), rows(5, "tuned", 3.0), strict=True) for row in pair]
    found = [
        (batch.directory, batch.sampler.guidance_scale, batch.seeds, at)
        for batch, at in make_batches(mixed, MODELS, SAMPLER, 3)
    ]
    assert found == [
        ("base", 1.0, (0, 1, 2), [0, 2, 4]),
        ("base", 1.0, (3, 4), [6, 8]),
        ("tuned", 3.0, (0, 1, 2), [1, 3, 5]),
        ("tuned", 3.0, (3, 4), [7, 9]),
    ]


def test_a_batch_is_named_by_all_that_determines_its_images() -> None:
    def name(row: Row, sampler: SamplerConfig = SAMPLER, digest: str = "d") -> str:
        return make_batches([row], {"base": Source(Path("anywhere"), digest)}, sampler, 4)[0][0].name

    row = rows(1)[0]
    others = {
        name(replace(row, prompt="blue star")),
        name(replace(row, seed=7)),
        name(replace(row, guidance_scale=2.0)),
        name(row, SamplerConfig(steps=3)),
        name(row, digest="e"),
    }
    assert len(others) == 5
    assert name(row) not in others


@pytest.mark.cluster
def test_only_missing_batches_are_computed(tmp_path: Path, model: Path, ray_cluster: RayConfig) -> None:
    def run(config: RayConfig = ray_cluster) -> list[str]:
        index = generate(
            rows(6, guidance_scale=2.0),
            models={"base": Source(model, "d")},
            sampler=SAMPLER,
            batch_size=2,
            images=tmp_path / "images",
            work=tmp_path / "work",
            config=config,
            title="test",
        )
        assert list(index.columns) == ["image", "width", "height"]
        return list(index["image"])

    first = run()
    assert len(set(first)) == 6
    shards = sorted((tmp_path / "work").iterdir())
    assert len(shards) == 3
    shards[0].unlink()
    written = {shard: shard.stat().st_mtime_ns for shard in shards[1:]}
    assert run() == first
    assert shards[0].exists()
    assert {shard: shard.stat().st_mtime_ns for shard in shards[1:]} == written
    assert {path.stem for path in (tmp_path / "images").rglob("*.png")} == set(first)
    for shard in shards:
        shard.unlink()
    assert run(ray_cluster.model_copy(update={"local": True})) == first, "without Ray, the same images"
