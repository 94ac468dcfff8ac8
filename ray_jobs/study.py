"""Compare ways of training over several seeds: each arm is a recipe with some settings changed, each seed a
run of its own from prompts to test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from pydantic import Field, PositiveInt, model_validator

from accord.artifacts import sha256_bytes
from accord.config import Config, load_yaml
from accord.errors import AccordError, ConfigError
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
from ray_jobs.progress import bar, console, say
from ray_jobs.stages import write_json

SHARED: dict[str, tuple[str, ...]] = {
    "candidates": ("grammar", "model", "collect"),
    "snapshot": ("panel", "feedback"),
    "reward": ("clip", "reward"),
    "reward_no_auxiliary": (),
    "scores": ("rewards",),
    "pretraining": ("pretraining",),
    "reference": ("reference",),
}
"""What the arms of a seed share, in the order of the loop, and the parts of a recipe that it is made by; an
arm that has its own of one thing has its own of those made from it too."""
APART = ("pretraining", "reference")
"""These are made from nothing else."""
FIXED = ("seed", "run_dir", "ray", "tracking", "control")
"""What a study decides itself."""
SIDE_BY_SIDE = ("images", "work/evaluation", "work/encoded")
"""Files named by their content, which several arms may write at once."""
ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]*$")]


class StudyConfig(Config):
    """A study's YAML file."""

    recipe: Path
    run_dir: Path
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    set: tuple[str, ...] = ()
    """Changes of the recipe in every arm, as "section.key=value"."""
    arms: Annotated[dict[ArmName, tuple[str, ...]], Field(min_length=1)]
    """Each arm's further changes."""
    cpus_per_run: PositiveInt = 1

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        if len({*self.seeds}) != len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}: each may be given once")
        if "shared" in self.arms:
            raise ValueError("an arm may not be called 'shared': what all arms share is kept under that name")
        for change in (*self.set, *(change for changes in self.arms.values() for change in changes)):
            if change.split("=")[0].split(".")[0].strip() in FIXED:
                raise ValueError(f"{change!r}: a study decides itself on {', '.join(FIXED)}")
        return self


def run(config: StudyConfig) -> dict[str, Any]:
    """study.json and study.md in the run directory; every run that is done already is kept.

    Raises AccordError that names every run that failed, once all others have ended.
    """
    config = config.model_copy(
        update={"recipe": config.recipe.resolve(), "run_dir": config.run_dir.expanduser().resolve()}
    )
    # All recipes are read now: an edit of the file while the study runs changes nothing.
    recipes = {
        (seed, arm): _recipe(config, seed, arm) for seed in config.seeds for arm in (None, *config.arms)
    }
    _note(config)
    cluster.ensure(RayConfig())
    import ray

    remote: Any = ray.remote(num_cpus=config.cpus_per_run, max_retries=2)
    names: dict[Any, str] = {}
    for seed in config.seeds:
        directory, common = config.run_dir / f"seed-{seed}", recipes[seed, None]
        shared = remote(_run_shared).remote(common, directory / "shared")
        names[shared] = f"seed {seed}"
        for arm, changes in config.arms.items():
            task = remote(_run_arm).remote(recipes[seed, arm], common, directory / arm, changes, shared)
            names[task] = f"seed {seed}, {arm}"
    failures = _follow(names)
    if failures:
        raise AccordError(
            f"{len(failures)} of {len(names)} runs of the study failed; the others are done. Mend these and "
            "start the study again:\n" + "\n".join(failures)
        )
    return _report(config)


def _follow(names: dict[Any, str]) -> list[str]:
    """Waits for all tasks; a line for each that failed for a reason that a user can mend."""
    import ray

    waiting, failures = list(names), []
    with bar("Runs of the study", len(names), "runs") as progress:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=5.0)
            for task in done:
                try:
                    ray.get(task)
                except Exception as error:
                    known = cluster.accord_error(error)
                    if known is None:
                        raise
                    failures.append(f"  {names[task]}: {known}")
            progress.update(len(names) - len(waiting), names[done[0]] if done else "")
    return failures


def _note(config: StudyConfig) -> None:
    """Refuses to mix runs of different recipes in one directory."""
    note = config.run_dir / "study_config.json"
    wanted = config.model_dump(mode="json", include={"set"})
    wanted["recipe"] = sha256_bytes(config.recipe.read_bytes())
    if note.exists() and json.loads(note.read_text()) != wanted:
        raise ConfigError(
            f"{config.run_dir} holds runs of another recipe or of other common settings; give the study "
            "another run_dir, or set them back. (Arms and seeds may be added at any time.)"
        )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(note, wanted)


def _recipe(config: StudyConfig, seed: int, arm: str | None) -> Recipe:
    changes = [*config.set, *(() if arm is None else config.arms[arm]), f"seed={seed}"]
    fixed = ("ray.local=true", "ray.gpus_per_worker=0", 'tracking.uri=""', "control=false")
    try:
        return load_recipe(config.recipe, [*changes, *fixed])
    except AccordError as error:
        raise ConfigError(f"arm {arm!r}: {error}" if arm else str(error)) from None


def _run_shared(recipe: Recipe, directory: Path) -> None:
    """What all arms of a seed have in common: images, judgements, reward, and the base model's evaluation."""
    with _quiet():
        for stage in (collect, judge, learn_reward, score):
            stage.run(recipe, directory)
        sources.run(recipe, directory, "pretraining")
        sources.run(recipe, directory, "reference")
        evaluate.prepare_base(recipe, directory)


def _run_arm(recipe: Recipe, common: Recipe, directory: Path, changes: Sequence[str], shared: None) -> None:
    """One arm of a seed, to its summary.json; `shared` only orders the tasks."""
    note = directory / "changes.json"
    if note.exists() and json.loads(note.read_text()) != list(changes):
        raise ConfigError(f"{directory} was made with other settings; remove it, or name the arm otherwise")
    directory.mkdir(parents=True, exist_ok=True)
    write_json(note, list(changes))
    if (directory / "summary.json").exists():
        return
    _link_shared(directory.parent / "shared", directory, recipe, common)
    with _quiet():
        for stage in (collect, judge, learn_reward, score, finetune, evaluate, report):
            stage.run(recipe, directory)


def _link_shared(shared: Path, directory: Path, recipe: Recipe, common: Recipe) -> None:
    """Links to everything that the arm's changes leave as it is."""
    for name in SIDE_BY_SIDE:
        (shared / name).mkdir(parents=True, exist_ok=True)
        _link(shared / name, directory / name)
    own = False
    for name, sections in SHARED.items():
        own = own and name not in APART
        own = own or any(getattr(recipe, section) != getattr(common, section) for section in sections)
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
        console.quiet = True

    def __exit__(self, *_: object) -> None:
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
    import ray_jobs.study as imported  # what `__main__` defines could not be sent to a Ray worker

    imported._command.__doc__ = __doc__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(imported._command)
    app(prog_name="accord study")
