"""The denoising engine against its rivals in one process, without gRPC, and against the model's own ceiling.

python -m benchmarks.engine                      # the shapes world's weights on this machine's CPU
python -m benchmarks.engine --device cuda --model /path/to/stable-diffusion-v1-5
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from accord.config import resolve_path
from accord.diffusion.engine import EngineConfig
from benchmarks.local import EngineServer, LockedServer, Server, StaticServer, measure_ceiling
from benchmarks.report import report
from benchmarks.tables import describe, write_json
from benchmarks.traffic import MIXES, Mix, play

SANDBOX = "pkg://accord.shapes/weights/diffusion"


def main(
    model: Annotated[str, typer.Option(help="A StableDiffusionPipeline directory.")] = SANDBOX,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    traffic: Annotated[list[str], typer.Option(help=f"Any of {', '.join(MIXES)}.")] = ["single", "mixed"],  # noqa: B006 - typer copies it
    load: Annotated[
        list[float], typer.Option(help="Arrivals, as shares of the ceiling; above 1 shows the capacity.")
    ] = [0.5, 1.3],  # noqa: B006
    images: Annotated[int, typer.Option(help="Images in a run.")] = 120,
    repeats: Annotated[int, typer.Option(help="Runs of each; every one with new arrivals.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    wait_s: Annotated[float, typer.Option(help="How long static batching waits.")] = 1.0,
    max_batch: Annotated[int, typer.Option(help="Rows of the UNet's batch, for engine and static.")] = 64,
    json: Annotated[Path | None, typer.Option(help="Where to write all numbers.")] = None,
) -> None:
    """Prints a Markdown table of images per second and latency."""
    directory = resolve_path(model)
    rivals: dict[str, Callable[[], Server]] = {
        "engine": lambda: EngineServer(directory, device, EngineConfig(max_batch=max_batch)),
        "static": lambda: StaticServer(directory, device, wait_s=wait_s, most=max_batch // 2),
        "locked": lambda: LockedServer(directory, device),
    }
    runs: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for name in traffic:
            for share in load:
                runs += _round(directory, device, MIXES[name], share, images, seed + repeat, rivals)
    print(f"\n{describe(device)}\n")
    print(report(runs, "engine"))
    write_json(json, device, {"images": images, "repeats": repeats, "seed": seed, "model": model}, runs)


def _round(
    directory: Path,
    device: str,
    mix: Mix,
    share: float,
    images: int,
    seed: int,
    rivals: dict[str, Callable[[], Server]],
) -> list[dict[str, Any]]:
    """The same arrivals for each rival; the ceiling is measured just before them."""
    ceiling = measure_ceiling(directory, device)
    best = ceiling.images_per_s(mix)
    requests = mix.requests(share * best, images, seed)
    runs: list[dict[str, Any]] = []
    for name, make in rivals.items():
        server = make()
        try:
            warm = play(mix.requests(1000.0, 4, seed=10_000), server.submit)
            if warm.failed:
                raise SystemExit(f"{name} failed to answer {warm.failed} requests: nothing to measure")
            started_s, cpu_s = time.perf_counter(), time.process_time()
            outcome = play(requests, server.submit)
            busy = (time.process_time() - cpu_s) / (time.perf_counter() - started_s)
        finally:
            server.close()
        runs.append(
            {
                "traffic": mix.name,
                "load": share,
                "rival": name,
                "ceiling": best,
                "images_per_s": outcome.images_per_s,
                "p50_s": outcome.latency_s(50),
                "p95_s": outcome.latency_s(95),
                "failed": outcome.failed,
                "cores_busy": busy,
            }
        )
        print(
            f"{mix.name}, load {share}: {name} {outcome.images_per_s:.2f} of {best:.2f} images/s",
            file=sys.stderr,
        )
    return runs


if __name__ == "__main__":
    typer.run(main)
