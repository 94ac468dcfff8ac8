"""How long an image takes, of the base and of the aligned model, each at its own guidance.

Both are timed in turns, so that a machine that slows down slows both; what counts is their ratio. The seconds
are those of this machine, beside the evaluation and not in it: they differ from run to run, its digest must
not.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accord.recipe import Recipe
from ray_jobs import stages
from ray_jobs.generation import Source

FILE = "latency.json"
TIMED = ("base", "aligned")
ROUNDS = 5
BATCH_SIZE = 4
PROMPT = "a picture"


def measure(
    recipe: Recipe, run_dir: Path, models: Mapping[str, Source], guidance: Mapping[str, float]
) -> None:
    """latency.json: seconds_per_image by model, with its digest and guidance scale."""
    import torch

    from accord.diffusion.model import load_diffusion_model  # diffusers takes seconds to import
    from accord.diffusion.sample import sample_images

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = {name: load_diffusion_model(models[name].directory, device=device) for name in TIMED}
    size = min(BATCH_SIZE, recipe.evaluate.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    for number in range(ROUNDS + 1):
        for name in TIMED if number % 2 else TIMED[::-1]:
            sampler = recipe.evaluate.sampler.model_copy(update={"guidance_scale": guidance[name]})
            begun = time.perf_counter()
            sample_images(loaded[name], [PROMPT] * size, list(range(size)), sampler)  # ends on the CPU
            seconds[name].append((time.perf_counter() - begun) / size)
    found = {
        name: {
            "seconds_per_image": statistics.median(times[1:]),  # the first one warms up
            "guidance": guidance[name],
            "digest": models[name].digest,
        }
        for name, times in seconds.items()
    }
    stages.write_json(run_dir / FILE, found)


def is_measured(run_dir: Path, models: Mapping[str, str]) -> bool:
    """Whether latency.json is of these models (digests by name)."""
    found = read(run_dir)
    return all(found.get(name, {}).get("digest") == models[name] for name in TIMED)


def read(run_dir: Path) -> dict[str, Any]:
    """What `measure` wrote; empty when it did not."""
    try:
        found: dict[str, Any] = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
