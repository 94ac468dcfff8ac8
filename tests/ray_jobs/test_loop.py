"""The whole loop on a tiny world: it ends with a summary and a report, and killed on the way with the same
ones.
"""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from accord.artifacts import load_tensors
from accord.diffusion.model import load_diffusion_model
from accord.errors import ConfigError
from accord.evaluation.plan import TEST
from accord.recipe import RayConfig, load_recipe
from ray_jobs import evaluate, finetune, inputs, loop, second_reward
from tests.ray_jobs.processes import start_and_kill

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]


def summary(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    assert set(content.pop("seconds")) >= {
        "collect",
        "judge",
        "learn_reward",
        "score",
        "finetune",
        "evaluate",
    }
    content.pop("latency")  # of this machine, now
    return content


def files(run_dir: Path) -> dict[str, int]:
    """When each file of a finished stage was written."""
    names = (
        "candidates",
        "snapshot",
        "reward",
        "reward_no_auxiliary",
        "scores",
        "aligned",
        "control",
        "evaluation",
    )
    return {str(path): path.stat().st_mtime_ns for name in names for path in (run_dir / name).rglob("*.*")}


LOCAL = ["ray.local=true"]
LORA = ["finetune.parameters=lora", "finetune.lora.rank=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path, clip: Path) -> Path:
    """The directory of a recipe whose loop has ended without Ray, in `run`."""
    from tests.ray_jobs.world import write_recipe

    directory = tmp_path_factory.mktemp("loop")
    recipe = load_recipe(write_recipe(directory, model, clip), LOCAL)
    loop.run(recipe, directory / "run")
    return directory


def test_the_loop_ends_with_numbers_and_a_report(finished: Path) -> None:
    content = summary(finished / "run")
    assert set(content["guidance"]) == {"base", "control", "aligned"}
    assert content["success"]["aligned"]["seen"]["overall"]["n"] == 4
    assert content["best_of"]["base"]["4"]["n"] == 1
    assert content["digests"]["base"] != content["digests"]["aligned"] != content["digests"]["control"]
    assert content["feedback"]["total"]["judgements"] == 16
    assert (
        content["net_win"]["alignment"]["seen"]["wins"] + content["net_win"]["alignment"]["seen"]["losses"]
        >= 0
    )
    assert "<html" in (finished / "run" / "report.html").read_text()


def test_a_finished_loop_does_nothing_again(finished: Path) -> None:
    before, numbers = files(finished / "run"), summary(finished / "run")
    loop.run(load_recipe(finished / "recipe.yaml"), finished / "run")
    assert files(finished / "run") == before
    timed = json.loads((finished / "run" / "latency.json").read_text())  # with Ray they are
    assert all(timed[model]["seconds_per_image"] > 0 for model in ("base", "aligned"))
    assert summary(finished / "run") == numbers


def test_a_second_reward_is_that_of_the_directory_that_was_named(finished: Path, clip: Path) -> None:
    run_dir = finished / "run"
    measured = evaluate.load_tables(run_dir)[evaluate.MEASUREMENTS]
    rows = measured[measured["group"] == TEST].iloc[:6]
    for directory, column in ((run_dir / "reward_no_auxiliary", "reward_no_auxiliary"), (clip, "clip")):
        recipe = load_recipe(finished / "recipe.yaml", [f"evaluate.second_reward={directory}"])
        assert set(second_reward.digests(recipe)) == {"second_reward"}
        scored = second_reward.score(recipe, rows, inputs.image_folder(run_dir))
        assert scored == pytest.approx(rows[column].tolist(), abs=1e-5)
    with pytest.raises(ConfigError, match=r"inputs\.second_reward"):  # other measurements: another evaluation
        evaluate.run(recipe, run_dir)
    assert second_reward.digests(load_recipe(finished / "recipe.yaml")) == {}


def test_a_changed_recipe_is_refused_by_its_key(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.learning_rate: 0\.001 then, 0\.002 now"):
        loop.run(load_recipe(finished / "recipe.yaml", ["finetune.learning_rate=0.002"]), finished / "run")


def test_adapters_are_handed_on_as_a_whole_model(finished: Path, tmp_path: Path, model: Path) -> None:
    run_dir = tmp_path / "run"
    undone = shutil.ignore_patterns("aligned*", "control*", "train", "evaluation*")
    shutil.copytree(finished / "run", run_dir, ignore=undone)
    manifest = finetune.run(load_recipe(finished / "recipe.yaml", [*LOCAL, *LORA]), run_dir)
    assert manifest.config["parameters"] == "lora"
    base, aligned = (load_diffusion_model(path) for path in (model, run_dir / "aligned"))
    assert aligned.digest == manifest.digest != base.digest
    before, after = base.unet.state_dict(), aligned.unet.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("attn" in name for name in changed)
    checkpoint = max((run_dir / "train" / "aligned").glob("step-*")) / "state.safetensors"
    assert all("lora_" in name for name in load_tensors(checkpoint))


@pytest.mark.parametrize(
    ("moment", "changes"),
    [
        ("work/candidates/*.parquet", LOCAL),
        ("train/aligned/step-*", []),
        ("work/evaluation/*.parquet", LOCAL),
    ],
)
def test_killed_and_continued_it_ends_with_the_same_numbers(
    finished: Path, root: Path, ray_cluster: RayConfig, moment: str, changes: list[str]
) -> None:
    """With Ray and without it: the numbers are those of a loop that nobody stopped."""
    run_dir = finished / moment.split("/")[1]
    options = ["--recipe", str(finished / "recipe.yaml"), "--run-dir", str(run_dir)]
    options += [part for change in changes for part in ("--set", change)]
    start_and_kill("loop", options, root, lambda: bool(list(run_dir.glob(moment))))
    assert not (run_dir / "summary.json").exists()
    loop.run(load_recipe(finished / "recipe.yaml", changes), run_dir)
    assert summary(run_dir) == summary(finished / "run")


def ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize(("by", "changes"), [(signal.SIGINT, LOCAL), (signal.SIGTERM, [])])
def test_stopped_it_says_how_to_go_on(
    finished: Path, root: Path, tmp_path: Path, by: signal.Signals, changes: list[str]
) -> None:
    """By Ctrl-C, even where the parent ignores it; by an orchestrator, although Ray listens to it too."""
    run_dir = tmp_path / "stopped"
    options = ["--recipe", str(finished / "recipe.yaml"), "--run-dir", str(run_dir)]
    options += [part for change in changes for part in ("--set", change)]
    done = start_and_kill(
        "loop",
        options,
        root,
        lambda: bool(list(run_dir.glob("work/candidates/*.parquet"))),
        by=by,
        preexec_fn=ignore_ctrl_c,
    )
    assert done.returncode == 130, done.stderr
    assert "Nothing is lost; go on with the same command" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run_dir / "summary.json").exists()
