"""The one place that generates images in bulk: rows of (model, prompt, seed, guidance) to PNG files.

Rows are cut into batches once, in their given order, and a batch is always computed whole and alone. So every
image has the same batch mates whether or not the run was interrupted, and however many actors share the work.
An actor puts a batch's PNGs into the image folder and then commits the batch by renaming its index file into
place; a batch whose index file is there is never computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from accord.artifacts import canonical_json, sha256_bytes, write_file
from accord.cpu import use_cpu
from accord.diffusion.settings import SamplerConfig
from accord.images import ImageFolder, encode_png
from ray_jobs import cluster
from ray_jobs.progress import bar

if TYPE_CHECKING:
    from accord.recipe import RayConfig


@dataclass(frozen=True)
class Row:
    """One image to be generated. `model` is a key of the models given to `generate`."""

    model: str
    prompt: str
    seed: int
    guidance_scale: float


@dataclass(frozen=True)
class Source:
    """Where a model is, and the digest of its content."""

    directory: Path
    digest: str


@dataclass(frozen=True)
class Batch:
    """Rows that share a model and a guidance scale; `name` follows from everything that determines its
    images.
    """

    name: str
    directory: str
    sampler: SamplerConfig
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


def make_batches(
    rows: Sequence[Row], models: Mapping[str, Source], sampler: SamplerConfig, batch_size: int
) -> list[tuple[Batch, list[int]]]:
    """Each batch with the positions of its rows. Batches depend on the rows and their order alone."""
    groups: dict[tuple[str, float], list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault((row.model, row.guidance_scale), []).append(position)
    batches = []
    for (model, guidance_scale), positions in groups.items():
        settings = sampler.model_copy(update={"guidance_scale": guidance_scale})
        for start in range(0, len(positions), batch_size):
            part = positions[start : start + batch_size]
            prompts = tuple(rows[position].prompt for position in part)
            seeds = tuple(rows[position].seed for position in part)
            identity = {
                "model": models[model].digest,
                "sampler": settings,
                "prompts": list(prompts),
                "seeds": list(seeds),
            }
            name = sha256_bytes(canonical_json(identity).encode())[:32]
            batches.append((Batch(name, str(models[model].directory), settings, prompts, seeds), part))
    return batches


def generate(
    rows: Sequence[Row],
    *,
    models: Mapping[str, Source],
    sampler: SamplerConfig,
    batch_size: int,
    images: Path,
    work: Path,
    config: RayConfig,
    title: str,
) -> pd.DataFrame:
    """Generates what is missing, and returns one line a row, in the rows' order: image (digest), width,
    height.

    `images` is the image folder, `work` the directory of the index files; both must be reachable from every
    node.
    """
    batches = make_batches(rows, models, sampler, batch_size)
    missing = [batch for batch, _ in batches if not _index_file(work, batch.name).exists()]
    with bar(title, len(rows), "images") as progress:
        done = len(rows) - sum(len(batch.seeds) for batch in missing)
        progress.update(done)
        if missing:
            for count in _run(missing, images, work, config):
                done += count
                progress.update(done)
    parts = [
        pd.read_parquet(_index_file(work, batch.name)).assign(position=positions)
        for batch, positions in batches
    ]
    index = pd.concat(parts).sort_values("position").reset_index(drop=True)
    wanted = [(row.prompt, row.seed) for row in rows]
    assert list(zip(index["prompt"], index["seed"], strict=True)) == wanted, (
        "an index file is not of its batch"
    )
    return index[["image", "width", "height"]]


def _index_file(work: Path, name: str) -> Path:
    return work / f"{name}.parquet"


def _run(missing: list[Batch], images: Path, work: Path, config: RayConfig) -> Any:
    """Computes batches, on an actor pool unless `config.local`; yields the number of images of each as it is
    committed.

    A row of the data set is a whole batch: Ray Data regroups rows as it likes, and which images are computed
    together must not depend on that.
    """
    work.mkdir(parents=True, exist_ok=True)
    if config.local:
        worker = _Generator(str(images), str(work), config.threads_per_generator)
        yield from (worker.run(_plain(batch)) for batch in missing)
        return
    cluster.ensure(config)
    import ray

    items = [{"batch": canonical_json(_plain(batch))} for batch in missing]
    size = min(config.generators, len(missing))
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Generator,
        fn_constructor_kwargs={
            "images": str(images),
            "work": str(work),
            "threads": config.threads_per_generator,
        },
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=config.cpus_per_generator,
        num_gpus=config.gpus_per_generator or None,
    )
    for row in results.iter_rows():
        yield int(row["images"])


def _plain(batch: Batch) -> dict[str, Any]:
    return {
        **vars(batch),
        "sampler": batch.sampler.model_dump(mode="json"),
        "prompts": list(batch.prompts),
        "seeds": list(batch.seeds),
    }


class _Generator:
    """An actor that keeps the model of its last batch."""

    def __init__(self, images: str, work: str, threads: int) -> None:
        import torch

        use_cpu(threads)
        self.folder = ImageFolder(images)
        self.work = Path(work)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.directory = ""
        self.model: Any = None

    def __call__(self, table: dict[str, Any]) -> dict[str, Any]:
        import json

        return {"images": [self.run(json.loads(str(item))) for item in table["batch"]]}

    def run(self, batch: dict[str, Any]) -> int:
        from accord.diffusion.model import load_diffusion_model
        from accord.diffusion.sample import sample_images

        if batch["directory"] != self.directory:
            self.model = None  # before the next is loaded, so that memory holds one
            self.model = load_diffusion_model(batch["directory"], device=self.device)
            self.directory = batch["directory"]
        sampler = SamplerConfig(**batch["sampler"])
        images_BHWC = sample_images(self.model, batch["prompts"], batch["seeds"], sampler)
        index = pd.DataFrame({"prompt": batch["prompts"], "seed": batch["seeds"]})
        index["image"] = [
            self.folder.put(
                encode_png(image_HWC, {"prompt": prompt, "seed": str(seed), "model": self.model.digest})
            )
            for image_HWC, prompt, seed in zip(images_BHWC, batch["prompts"], batch["seeds"], strict=True)
        ]
        index["height"], index["width"] = images_BHWC.shape[1], images_BHWC.shape[2]
        write_file(_index_file(self.work, batch["name"]), index.to_parquet(index=False))
        return len(index)
