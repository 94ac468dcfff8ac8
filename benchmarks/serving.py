"""Accord against its rivals behind the same gRPC surface, and against the model's own ceiling.

    python -m benchmarks.serving --repeats 3 --json serving.json

Each server runs alone, in a process of its own. The ceiling is measured in the same run, on as many threads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from accord.config import resolve_path
from accord.cpu import use_cpu
from benchmarks.local import Ceiling, measure_ceiling
from benchmarks.remote import Client, started
from benchmarks.report import report
from benchmarks.rivals import NAMES, Settings
from benchmarks.tables import describe, write_json
from benchmarks.traffic import MIXES, play

SANDBOX = "pkg://accord.shapes/weights/diffusion"


def main(
    model: Annotated[str, typer.Option(help="A StableDiffusionPipeline directory.")] = SANDBOX,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads of torch for whoever draws.")] = 1,
    rival: Annotated[list[str], typer.Option(help=f"Any of {', '.join(NAMES)}.")] = list(NAMES),  # noqa: B006
    traffic: Annotated[list[str], typer.Option(help=f"Any of {', '.join(MIXES)}.")] = list(MIXES),  # noqa: B006
    load: Annotated[
        list[float], typer.Option(help="Arrivals, as shares of the ceiling; above 1 shows the capacity.")
    ] = [0.3, 0.6, 1.3],  # noqa: B006
    images: Annotated[int, typer.Option(help="Images in a run.")] = 300,
    repeats: Annotated[int, typer.Option(help="Runs of each; every one with new arrivals.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    wait_s: Annotated[float, typer.Option(help="How long static batching waits.")] = 1.0,
    max_batch: Annotated[int, typer.Option(help="Rows of the UNet's batch.")] = 64,
    own_process: Annotated[bool, typer.Option(help="Accord's engine in a process of its own.")] = True,
    json: Annotated[Path | None, typer.Option(help="Where to write all numbers.")] = None,
) -> None:
    """Prints a Markdown table of images per second and latency."""
    use_cpu(threads)
    settings = Settings(model, device, threads, wait_s, max_batch, own_process=own_process)
    runs: list[dict[str, Any]] = []
    for repeat in range(repeats):
        ceiling = measure_ceiling(resolve_path(model), device)
        for name in rival:
            runs += _runs(name, settings, ceiling, traffic, load, images, seed + repeat)
    print(f"\n{describe(device)}\n")
    print(report(runs, "accord"))
    write_json(json, device, {"images": images, "repeats": repeats, "seed": seed, "model": model}, runs)


def _runs(
    name: str,
    settings: Settings,
    ceiling: Ceiling,
    traffic: list[str],
    load: list[float],
    images: int,
    seed: int,
) -> list[dict[str, Any]]:
    """All traffic against one server; the arrivals depend on the ceiling and the seed alone."""
    runs: list[dict[str, Any]] = []
    with started(name, settings) as remote:
        client = Client(remote)
        client.wait_until_ready()
        for mix in (MIXES[kind] for kind in traffic):
            best = ceiling.images_per_s(mix)
            warm = play(mix.requests(1000.0, 4, seed=10_000), client.submit)
            if warm.failed:
                raise SystemExit(f"{name} failed to answer {warm.failed} requests: nothing to measure")
            for share in load:
                outcome = play(mix.requests(share * best, images, seed), client.submit)
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
                    }
                )
                speed = f"{outcome.images_per_s:.2f} of {best:.2f} images/s"
                print(f"{mix.name}, load {share}: {name} {speed}", file=sys.stderr)
        client.close()
    return runs


if __name__ == "__main__":
    typer.run(main)
