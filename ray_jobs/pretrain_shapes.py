"""Make the sandbox's weights from nothing: autoencoder, evaluator, CLIP and diffusion model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from accord.artifacts import Manifest, read_manifest
from accord.config import Config, load_yaml
from accord.errors import ArtifactError
from accord.recipe import RayConfig
from accord.shapes.pretraining import build
from accord.shapes.pretraining.build import PretrainConfig
from ray_jobs import cluster
from ray_jobs._cli import AddressOption, RecipeOption, SetOption, guarded
from ray_jobs.progress import say


def run(config: PretrainConfig) -> dict[str, Manifest]:
    """Train what is missing in `config.output`; CLIP and the diffusion model wait for the autoencoder.

    Each part is all or nothing: what was interrupted starts over, what is finished is kept.
    """
    cluster.ensure(RayConfig())
    import ray

    def part(name: str, function: Callable[..., Manifest], settings: Config, after: Any = None) -> Any:
        """A Ray task that makes one part, after another is there; or its manifest if it is there already."""
        done = _finished(config.output / name, settings)
        if done is not None:
            say(f"{name}: there already ({done.digest[:12]})")
            return ray.put(done)
        return ray.remote(num_cpus=1)(_build).remote(function, config, name, after)

    vae = part("vae", build.build_vae, config.vae)
    waiting = {
        "evaluator": part("evaluator", build.build_evaluator, config.evaluator),
        "clip": part("clip", build.build_clip, config.clip, after=vae),
        "diffusion": part("diffusion", build.build_diffusion, config.diffusion, after=vae),
    }
    _follow([vae, *waiting.values()], config.output)
    return {name: ray.get(task) for name, task in {"vae": vae, **waiting}.items()}


def _build(function: Callable[..., Manifest], config: PretrainConfig, name: str, after: Any) -> Manifest:
    """One part, in a worker. Its progress is appended to OUTPUT/pretraining.log, which the driver prints."""
    started = time.monotonic()
    config.output.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        with (config.output / "pretraining.log").open("a") as file:
            file.write(f"{time.monotonic() - started:6.0f} s  {line}\n")

    return function(config, log)


def _finished(directory: Path, settings: Config) -> Manifest | None:
    try:
        manifest = read_manifest(directory)
    except ArtifactError:
        return None
    return manifest if manifest.config == settings.model_dump(mode="json") else None


def _follow(tasks: list[Any], output: Path) -> None:
    """Print the log as it grows, until every task is done; the first failure stops the rest."""
    import ray

    log, shown, running = output / "pretraining.log", 0, list(tasks)
    shown = log.stat().st_size if log.exists() else 0
    while running:
        done, running = ray.wait(running, timeout=2.0)
        if log.exists():
            with log.open() as file:
                file.seek(shown)
                for line in file:
                    say(line.rstrip())
                shown = file.tell()
        ray.get(done)


def _command(recipe: RecipeOption, overrides: SetOption = [], address: AddressOption = None) -> None:  # noqa: B006
    def work() -> int:
        config = load_yaml(PretrainConfig, recipe, overrides)
        with cluster.connect(address):
            for name, manifest in run(config).items():
                say(f"{name}: {manifest.digest}")
        return 0

    raise typer.Exit(guarded(work))


if __name__ == "__main__":
    _command.__doc__ = __doc__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(_command)
    app(prog_name="accord pretrain-shapes")
