"""Learn the reward model from the snapshot (the paper's stage 2): with the auxiliary loss, and without to
compare.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accord.artifacts import Manifest, load_tensors, read_manifest, save_tensors
from accord.feedback.snapshot import load_snapshot
from accord.prompts import load_grammar
from accord.recipe import Recipe
from accord.reward.settings import RewardConfig
from ray_jobs import _cli, cluster, collect, inputs
from ray_jobs.progress import say
from ray_jobs.stages import Stage, is_done, required, timed
from ray_jobs.train import Tracking, Training, train

if TYPE_CHECKING:  # takes seconds to import
    import torch

KIND = "reward_model"
BUILD = "ray_jobs.learn_reward:build_learner"


def run(recipe: Recipe, run_dir: Path) -> Manifest:
    """reward/ and reward_no_auxiliary/, learned from the same data in the same way but for lambda."""
    digests = {"snapshot": required(run_dir, "snapshot").digest, "clip": inputs.clip_digest(recipe)}
    configs = {
        "reward": recipe.reward,
        "reward_no_auxiliary": recipe.reward.model_copy(update={"auxiliary_weight": 0.0}),
    }
    stages = {
        name: Stage(name, KIND, {"grammar": recipe.grammar, **config.described()}, recipe.seed, digests)
        for name, config in configs.items()
    }
    missing = [name for name, stage in stages.items() if not is_done(stage, run_dir)]
    if missing:
        with timed(run_dir, "learn_reward"):
            data = run_dir / "work" / "reward" / "data.safetensors"
            if not data.exists():
                cluster.on_device(recipe.ray, prepare_data, recipe, run_dir, data)
            trainings = [_training(recipe, run_dir, name, configs[name], data) for name in missing]
            checkpoints = train(trainings, run_dir / "train", recipe.ray)
            for name, checkpoint in zip(missing, checkpoints, strict=True):
                _save(recipe, run_dir, stages[name], configs[name], data, checkpoint)
    return read_manifest(run_dir / "reward")


def prepare_data(recipe: Recipe, run_dir: Path, path: Path) -> None:
    """The snapshot as CLIP features (safetensors), read by every worker."""
    from accord.reward.data import build_reward_data

    cache, encoder = feature_cache(recipe, run_dir)
    folder = inputs.image_folder(run_dir)
    snapshot = load_snapshot(run_dir / "snapshot")
    ours = set(collect.load_index(run_dir)["image"])  # a shared store may hold other runs' images too
    data = build_reward_data(
        snapshot[snapshot["image"].isin(ours)],
        load_grammar(recipe.grammar),
        image_features=lambda digests: cache.image_features(digests, folder.load),
        text_features=lambda texts: encoder.text_features(texts).cpu(),
        num_prompts=recipe.reward.num_prompts,
        seed=recipe.seed,
    )
    tensors = {name: value for name, value in vars(data).items() if name != "category_N"}
    save_tensors(path, tensors, {"category": json.dumps(data.category_N)})


def feature_cache(recipe: Recipe, run_dir: Path) -> tuple[Any, Any]:
    """The run's CLIP features by image, and the encoder that makes them."""
    import torch

    from accord.reward.features import ClipEncoder, FeatureCache

    encoder = ClipEncoder(recipe.clip, "cuda" if torch.cuda.is_available() else "cpu")
    return FeatureCache(run_dir / "features", encoder), encoder


def build_learner(
    *,
    rank: int,
    world_size: int,
    wrap: Callable[[torch.nn.Module], torch.nn.Module] | None,
    device: torch.device,
    data: str,
    config: dict[str, Any],
    seed: int,
) -> Any:
    """A RewardLearner on a worker."""
    from safetensors import safe_open

    from accord.reward.data import RewardData
    from accord.reward.learn import RewardLearner

    with safe_open(data, framework="pt") as file:
        categories = tuple(json.loads(file.metadata()["category"]))
    loaded = RewardData(**load_tensors(data), category_N=categories)
    settings = RewardConfig(**config)
    return RewardLearner(loaded, settings, seed, rank=rank, world_size=world_size, wrap=wrap, device=device)


def _training(recipe: Recipe, run_dir: Path, name: str, config: RewardConfig, data: Path) -> Training:
    return Training(
        name=name,
        build=BUILD,
        arguments={"data": str(data), "config": config.model_dump(mode="json"), "seed": recipe.seed},
        steps=config.steps,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        title="Learning the reward" if name == "reward" else "  without the auxiliary loss",
        tracking=Tracking(
            uri=recipe.tracking_uri(run_dir),
            experiment=recipe.tracking.experiment,
            run_name=f"{recipe.name} {name}",
            params={**config.model_dump(mode="json"), "seed": recipe.seed},
            tags={"stage": name, "snapshot": read_manifest(run_dir / "snapshot").digest},
        ),
    )


def _save(
    recipe: Recipe, run_dir: Path, stage: Stage, config: RewardConfig, data: Path, checkpoint: Path
) -> None:
    """The reward model of a finished training, with its calibration."""
    import torch

    from accord.reward.model import RewardModel

    settings = config.model_dump(mode="json")
    learner = build_learner(
        rank=0,
        world_size=1,
        wrap=None,
        device=torch.device("cpu"),
        data=str(data),
        config=settings,
        seed=recipe.seed,
    )
    learner.load(checkpoint)
    _, encoder = feature_cache(recipe, run_dir)
    model = RewardModel(
        learner.trained_head(),
        encoder,
        temperature=config.temperature,
        calibration=learner.calibration(),
        uncertainty_penalty=config.uncertainty_penalty,
    )
    report = learner.calibration_report()
    config_now = {**stage.config, "validation": learner.validate(), "calibration_report": report}
    model.save(run_dir / stage.name, inputs=stage.inputs, config=config_now, seed=recipe.seed)
    if stage.name == "reward":
        say(calibration_line(report))


def calibration_line(report: Mapping[str, Any] | None) -> str:
    """What a person wants to know of a calibration report."""
    if report is None:
        return "Calibration: none, there are no good and bad images that were kept from training"
    scaled = report["ece_calibrated"]
    after = "" if scaled is None else f", {scaled:.3f} once scaled by the other half's {report['method']}"
    return f"Calibration error on {report['images']} images kept from training: {report['ece']:.3f}{after}"


if __name__ == "__main__":
    _cli.main("learn_reward")
