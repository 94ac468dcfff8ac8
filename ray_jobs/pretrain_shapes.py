"""Make the sandbox's weights from nothing: autoencoder, evaluator, CLIP and diffusion model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

from accord.artifacts import Manifest, read_manifest
from accord.config import Config, load_yaml
from accord.errors import ArtifactError
from accord.recipe import RayConfig
from accord.shapes.pretraining import build
from accord.shapes.pretraining.build import PretrainConfig
from accord.shapes.pretraining.diffusion import DiffusionPretrainer
from ray_jobs import cluster
from ray_jobs._cli import AddressOption, RecipeOption, SetOption, guarded
from ray_jobs.progress import say
from ray_jobs.train import Training, train

BUILD = "ray_jobs.pretrain_shapes:build_pretrainer"


def run(config: PretrainConfig) -> dict[str, Manifest]:
    """Train what is missing in `config.output`: the autoencoder, then CLIP beside the evaluator, then the
    diffusion model on `diffusion.workers` workers.

    What is finished is kept: the diffusion model goes on from its last checkpoint, the others
    start over.
    """
    config = config.model_copy(update={"output": config.output.resolve()})  # workers have other directories
    ray_config = RayConfig(num_workers=config.diffusion.workers, threads_per_worker=config.threads)
    cluster.ensure(ray_config)
    import ray

    def part(name: str, function: Callable[..., Manifest], settings: Config, after: Any = None) -> Any:
        """A Ray task that makes one part, after another is there; or its manifest if it is there already."""
        done = _finished(config.output, name, settings)
        if done is not None:
            say(f"{name}: there already ({done.digest[:12]})")
            return ray.put(done)
        return ray.remote(num_cpus=1)(_build).remote(function, config, name, after)

    vae = part("vae", build.build_vae, config.vae)
    clip = part("clip", build.build_clip, config.clip, after=vae)
    tasks = {
        "vae": vae,
        "clip": clip,
        "evaluator": part("evaluator", build.build_evaluator, config.evaluator),
    }
    _follow(list(tasks.values()), config.output)
    made: dict[str, Manifest] = {name: ray.get(task) for name, task in tasks.items()}
    return made | {"diffusion": _diffusion(config, ray_config)}


def _diffusion(config: PretrainConfig, ray_config: RayConfig) -> Manifest:
    done = _finished(config.output, "diffusion", config.diffusion)
    if done is not None:
        say(f"diffusion: there already ({done.digest[:12]})")
        return done
    if _finished(config.output, build.LATENTS, build.diffusion_scenes(config)) is None:
        say("diffusion: encoding scenes")
        build.encode_scenes(config)
    training = Training(
        name="diffusion",
        build=BUILD,
        arguments={"config": config.model_dump(mode="json")},
        steps=config.diffusion.steps,
        log_every=20,
        checkpoint_every=500,
        title="Pre-training the diffusion model",
    )
    (checkpoint,) = train([training], config.output / "train", ray_config)
    learner = build.diffusion_pretrainer(config)
    learner.load(checkpoint)
    return build.save_diffusion(config, learner.model(), say)


def build_pretrainer(
    *, rank: int, world_size: int, wrap: Any, device: torch.device, config: dict[str, Any]
) -> DiffusionPretrainer:
    """The diffusion model's learner on a worker; on CPUs, for which its sizes were chosen."""
    settings = PretrainConfig.model_validate(config)
    return build.diffusion_pretrainer(settings, rank=rank, world_size=world_size, wrap=wrap)


def _build(function: Callable[..., Manifest], config: PretrainConfig, name: str, after: Any) -> Manifest:
    """One part, in a worker. Its progress is appended to OUTPUT/pretraining.log, which the driver prints."""
    started = time.monotonic()
    config.output.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        with (config.output / "pretraining.log").open("a") as file:
            file.write(f"{time.monotonic() - started:6.0f} s  {line}\n")

    return function(config, log)


def _finished(output: Path, name: str, settings: Config) -> Manifest | None:
    """The part's manifest, unless it is missing, of other settings, or made from another autoencoder."""
    try:
        manifest = read_manifest(output / name)
        of_this_vae = manifest.inputs.get("vae") in (None, read_manifest(output / "vae").digest)
    except ArtifactError:
        return None
    return manifest if of_this_vae and manifest.config == settings.model_dump(mode="json") else None


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
