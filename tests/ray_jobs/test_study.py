"""A study on the tiny world: arms share what they do not change, and a study goes on where it stopped."""

import json
from pathlib import Path

import pytest
import yaml

from accord.config import load_yaml
from accord.errors import ConfigError
from accord.recipe import RayConfig
from ray_jobs import study
from ray_jobs.study import StudyConfig

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, model: Path, clip: Path, ray_cluster: RayConfig
) -> Path:
    """The YAML of a study that has ended."""
    from tests.ray_jobs.world import write_recipe

    directory = tmp_path_factory.mktemp("study")
    content = {
        "recipe": str(write_recipe(directory, model, clip)),
        "run_dir": str(directory / "runs"),
        "seeds": [1, 2],
        "set": ["evaluate.bootstrap_resamples=100"],
        "arms": {
            "paper": [],
            "no auxiliary": ["reward.auxiliary_weight=0", "finetune.pretraining_threshold=0.1"],
            "rounds": [
                "finetune.objective=diffusion_nft",
                "finetune.images=labelled",
                "on_policy={rounds: 1, images: {prompts: {count: 2}, images_per_prompt: {count: 3}}}",
            ],
        },
    }
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    study.run(load_yaml(StudyConfig, path))
    return path


def test_every_arm_of_every_seed_is_measured(finished: Path) -> None:
    content = json.loads((finished.parent / "runs" / "study.json").read_text())
    assert set(content) == {"paper", "no auxiliary", "rounds"}
    for arm in content.values():
        assert set(arm["gain.all"]["seeds"]) == {"1", "2"}
        assert arm["gain.all"]["n"] == 2
    page = (finished.parent / "runs" / "study.md").read_text()
    assert "| rounds |" in page
    assert (finished.parent / "runs" / "study-gains.svg").exists()


def test_arms_share_what_they_do_not_change(finished: Path) -> None:
    seed = finished.parent / "runs" / "seed-1"
    assert (seed / "paper" / "reward").is_symlink()
    assert (seed / "no auxiliary" / "snapshot").is_symlink()
    assert not (seed / "no auxiliary" / "reward").is_symlink()
    assert not (seed / "no auxiliary" / "scores").is_symlink()
    digests = [
        json.loads((seed / arm / "summary.json").read_text())["digests"] for arm in ("paper", "rounds")
    ]
    assert digests[0]["base"] == digests[1]["base"]
    assert digests[0]["aligned"] != digests[1]["aligned"]


def test_rounds_learn_from_images_of_the_model_as_it_is_by_then(finished: Path) -> None:
    rounds = finished.parent / "runs" / "seed-1" / "rounds" / "work" / "aligned" / "round-2"
    assert (rounds / "model" / "manifest.json").exists()
    aligned = json.loads((rounds.parents[2] / "aligned" / "manifest.json").read_text())
    assert aligned["config"]["on_policy"]["rounds"] == 1


def test_a_study_goes_on_and_takes_further_arms_and_seeds(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished.parent / "runs").glob("seed-*/*/summary.json")}
    further = load_yaml(
        StudyConfig, finished, ["arms.matching=[finetune.objective=advantage_weighted_matching]"]
    )
    content = study.run(further)
    assert set(content) == {"paper", "no auxiliary", "rounds", "matching"}
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_common_settings_are_refused(finished: Path) -> None:
    changed = load_yaml(StudyConfig, finished, ["set=[evaluate.bootstrap_resamples=200]"])
    with pytest.raises(ConfigError, match="other common settings"):
        study.run(changed)


def test_a_bad_arm_is_an_error_before_anything_runs(finished: Path, tmp_path: Path) -> None:
    bad = load_yaml(
        StudyConfig, finished, ["arms.typo=[finetune.objektive=x]", f"run_dir={tmp_path / 'runs'}"]
    )
    with pytest.raises(ConfigError, match="objektive"):
        study.run(bad)
    assert not (tmp_path / "runs").exists()
