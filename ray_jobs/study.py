"""Compare ways of training over several seeds: each arm is a recipe with some settings changed, each seed a
run of its own from prompts to test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field, PositiveInt

from accord.artifacts import sha256_bytes
from accord.config import Config, load_yaml
from accord.errors import ConfigError
from accord.evaluation.study import build_study
from accord.evaluation.study_page import study_page
from accord.recipe import RayConfig, Recipe, load_recipe
from ray_jobs import (
    cluster,
    collect,
    evaluate,
    finetune,
    judge,
    learn_reward,
    report,
    score,
    sources,
)
from ray_jobs._cli import AddressOption, SetOption, guarded
from ray_jobs.progress import bar, say
from ray_jobs.stages import write_json

SHARED = {
    "candidates": "collect.",
    "snapshot": "feedback.",
    "reward": "reward.",
    "reward_no_auxiliary": "reward.",
    "scores": "reward.",
    "pretraining": "pretraining.",
    "reference": "reference.",
}
"""What the arms of a seed share, in the order of the loop, and the settings that an arm changes to have its
own; whoever has its own of one thing has its own of those made from it too."""
SIDE_BY_SIDE = ("images", "work/evaluation")
"""Files named by their content, which several arms may write at once."""


class StudyConfig(Config):
    """A study's YAML file."""

    recipe: Path
    run_dir: Path
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    set: tuple[str, ...] = ()
    """Changes of the recipe in every arm, as "section.key=value"."""
    arms: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
    """Each arm's further changes."""
    cpus_per_run: PositiveInt = 1


def run(config: StudyConfig) -> dict[str, Any]:
    """study.json and study.md in the run directory; every run that is done already is kept."""
    config = config.model_copy(
        update={"recipe": config.recipe.resolve(), "run_dir": config.run_dir.expanduser().resolve()}
    )
    _check(config)
    cluster.ensure(RayConfig())
    import ray

    remote: Any = ray.remote(num_cpus=config.cpus_per_run, max_retries=2)
    waiting: list[Any] = []
    for seed in config.seeds:
        shared = remote(_run_shared).remote(config, seed)
        waiting += [shared, *(remote(_run_arm).remote(config, seed, arm, shared) for arm in config.arms)]
    with bar("Runs of the study", len(waiting), "runs") as progress:
        total, note = len(waiting), ""
        while waiting:
            done, waiting = ray.wait(waiting, timeout=5.0)
            for task in done:
                note = str(ray.get(task))
            progress.update(total - len(waiting), note)
    return _report(config)


def _check(config: StudyConfig) -> None:
    """What would stop a run later, and can be known now, is an error now."""
    for seed in config.seeds:
        for arm in config.arms:
            _recipe(config, seed, arm)
    note = config.run_dir / "study_config.json"
    wanted = config.model_dump(mode="json", exclude={"run_dir", "cpus_per_run", "seeds", "arms"})
    wanted["recipe"] = sha256_bytes(config.recipe.read_bytes())
    if note.exists() and json.loads(note.read_text()) != wanted:
        raise ConfigError(
            f"{config.run_dir} holds runs of another recipe or of other common settings; give the study "
            "another run_dir, or set them back. (Arms and seeds may be added at any time.)"
        )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(note, wanted)


def _recipe(config: StudyConfig, seed: int, arm: str | None) -> Recipe:
    changes = [*config.set, *(config.arms[arm] if arm else ()), f"seed={seed}"]
    fixed = ("ray.local=true", "ray.gpus_per_worker=0", 'tracking.uri=""', "control=false")
    return load_recipe(config.recipe, [*changes, *fixed])


def _run_shared(config: StudyConfig, seed: int) -> str:
    """What all arms of a seed have in common: images, judgements, reward, and the base model's evaluation."""
    directory = config.run_dir / f"seed-{seed}" / "shared"
    recipe = _recipe(config, seed, None)
    with _quiet():
        for stage in (collect, judge, learn_reward, score):
            stage.run(recipe, directory)
        sources.run(recipe, directory, "pretraining")
        sources.run(recipe, directory, "reference")
        evaluate.prepare_base(recipe, directory)
    return f"seed {seed}"


def _run_arm(config: StudyConfig, seed: int, arm: str, shared: str) -> str:
    """One arm of a seed, to its summary.json; `shared` only orders the tasks."""
    directory = config.run_dir / f"seed-{seed}" / arm
    changes = config.arms[arm]
    recipe = _recipe(config, seed, arm)
    if (directory / "summary.json").exists() and (directory / "changes.json").exists():
        if json.loads((directory / "changes.json").read_text()) == list(changes):
            return f"seed {seed} {arm}"
        raise ConfigError(f"{directory} was made with other settings; remove it, or name the arm otherwise")
    _link_shared(directory.parent / "shared", directory, changes)
    with _quiet():
        for stage in (collect, judge, learn_reward, score, finetune, evaluate, report):
            stage.run(recipe, directory)
    write_json(directory / "changes.json", list(changes))
    return f"seed {seed} {arm}"


def _link_shared(shared: Path, directory: Path, changes: Sequence[str]) -> None:
    """Links to everything that the arm's changes leave as it is."""
    (directory / "stages").mkdir(parents=True, exist_ok=True)
    for name in SIDE_BY_SIDE:
        _link(shared / name, directory / name)
    own = False
    for name, section in SHARED.items():
        changed = any(change.startswith(section) for change in changes)
        if name in ("pretraining", "reference"):
            own = False
        own = own or changed
        if not own:
            _link(shared / name, directory / name)
            _link(shared / "stages" / f"{name}.json", directory / "stages" / f"{name}.json")


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(os.path.relpath(target, link.parent))


class _quiet:  # noqa: N801 - reads as the statement that it is
    """No progress bars of single runs: many of them run at once."""

    def __enter__(self) -> None:
        from ray_jobs.progress import console

        console.quiet = True

    def __exit__(self, *_: object) -> None:
        from ray_jobs.progress import console

        console.quiet = False


def _report(config: StudyConfig) -> dict[str, Any]:
    summaries: dict[str, Mapping[int, Any]] = {
        arm: {
            seed: json.loads((config.run_dir / f"seed-{seed}" / arm / "summary.json").read_text())
            for seed in config.seeds
        }
        for arm in config.arms
    }
    study = build_study(summaries)
    write_json(config.run_dir / "study.json", study)
    recipes = {arm: list(changes) for arm, changes in config.arms.items()}
    page, pictures = study_page(study, recipes)
    for name, content in pictures.items():
        (config.run_dir / name).write_text(content, encoding="utf-8")
    (config.run_dir / "study.md").write_text(page, encoding="utf-8")
    say(f"Study: {config.run_dir / 'study.md'}\nNumbers: {config.run_dir / 'study.json'}")
    return study


def _command(
    study: Annotated[Path, typer.Option("--study", help="The study's YAML file.", dir_okay=False)],
    overrides: SetOption = [],  # noqa: B006
    address: AddressOption = None,
) -> None:
    def work() -> int:
        with cluster.connect(address):
            run(load_yaml(StudyConfig, study, overrides))
        return 0

    raise typer.Exit(guarded(work))


if __name__ == "__main__":
    _command.__doc__ = __doc__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(_command)
    app(prog_name="accord study")
