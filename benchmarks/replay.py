"""Same spec, same image? How many images are bit-identical alone, in whatever batch, and after a restart.

python -m benchmarks.replay --draws 1000
python -m benchmarks.replay --draws 1000 --batch-size 8     # every UNet batch padded to 8 rows
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from accord.config import resolve_path
from accord.diffusion.adapters import Pixels
from accord.diffusion.engine import Engine, EngineConfig, SampleSpec
from accord.diffusion.model import DiffusionModel, load_diffusion_model
from accord.diffusion.sample import SamplerConfig, sample_images
from benchmarks.tables import describe, table, write_json
from benchmarks.traffic import PROMPTS

SANDBOX = "pkg://accord.shapes/weights/diffusion"
SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
)


def main(
    model: Annotated[str, typer.Option(help="A StableDiffusionPipeline directory.")] = SANDBOX,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    draws: Annotated[int, typer.Option(help="Images, each made four times.")] = 100,
    batch_size: Annotated[
        int, typer.Option(help="Pad every UNet batch to so many rows, and decode one by one; 0: neither.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the specs.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Where to write all numbers.")] = None,
) -> None:
    """Prints a Markdown table: each way of making the images against making each of them alone."""
    config = EngineConfig(max_queue=draws)
    if batch_size:
        config = EngineConfig(
            max_queue=draws, max_batch=batch_size, batch_sizes=(batch_size,), decode_batch=1
        )
    loaded = load_diffusion_model(resolve_path(model), device=device)
    specs = _specs(draws, loaded.default_size, seed)
    with _engine(config, device, loaded) as engine:
        alone = _said("alone", [_draw(engine, [spec])[0] for spec in specs])
        batches = _said("in batches", _draw(engine, specs))
    random.Random(seed).shuffle(order := list(range(draws)))
    with _engine(config, device, load_diffusion_model(resolve_path(model), device=device)) as engine:
        again = _said("after a restart", _draw(engine, [specs[number] for number in order]))
    restarted = [again[order.index(number)] for number in range(draws)]
    sampled = _said("sample_images", [_sample(loaded, spec) for spec in specs])
    results = [
        _compare("in batches, against alone", alone, batches),
        _compare("restarted and in other batches, against alone", alone, restarted),
        _compare("sample_images (the library's plain loop), against alone", alone, sampled),
    ]
    print(f"\n{describe(device)}\n")
    print(table(list(results[0]), [list(result.values()) for result in results]))
    write_json(json, device, {"draws": draws, "batch_size": batch_size, "seed": seed}, results)


def _specs(number: int, size: tuple[int, int], seed: int) -> list[SampleSpec]:
    choose = random.Random(seed)
    return [
        SampleSpec(
            model="model",
            prompt=choose.choice(PROMPTS),
            seed=choose.getrandbits(63),
            steps=choose.randint(8, 30),
            guidance_scale=choose.choice([1.0, 3.0, 5.0, 7.5]),
            scheduler=choose.choice(SCHEDULERS),
            height=size[0],
            width=size[1],
        )
        for _ in range(number)
    ]


def _engine(config: EngineConfig, device: str, model: DiffusionModel) -> Engine:
    engine = Engine(config, device=device)
    engine.load("model", model)
    return engine


def _draw(engine: Engine, specs: Sequence[SampleSpec]) -> list[Pixels]:
    tickets = [engine.submit(spec) for spec in specs]
    return [ticket.future.result() for ticket in tickets]


def _sample(model: DiffusionModel, spec: SampleSpec) -> Pixels:
    config = SamplerConfig(scheduler=spec.scheduler, steps=spec.steps, guidance_scale=spec.guidance_scale)
    images_BHWC: Pixels = sample_images(model, [spec.prompt], [spec.seed], config)
    image_HWC: Pixels = images_BHWC[0]
    return image_HWC


def _said(what: str, images: list[Pixels]) -> list[Pixels]:
    print(f"{what}: {len(images)} images", file=sys.stderr)
    return images


def _compare(name: str, first: Sequence[Pixels], second: Sequence[Pixels]) -> dict[str, Any]:
    apart = [
        int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max()) for a, b in zip(first, second, strict=True)
    ]
    return {
        "": name,
        "images": len(apart),
        "bit-identical": f"{sum(most == 0 for most in apart) / len(apart):.1%}",
        "largest difference, of 255": max(apart),
    }


if __name__ == "__main__":
    typer.run(main)
