"""The whole loop on a tiny world: it ends with a summary and a report, and killed on the way with the same
ones.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from accord.errors import ConfigError
from accord.recipe import RayConfig, load_recipe
from ray_jobs import loop

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


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, model: Path, clip: Path, ray_cluster: RayConfig
) -> Path:
    """The directory of a recipe whose loop has ended, in `run`."""
    from tests.ray_jobs.world import write_recipe

    directory = tmp_path_factory.mktemp("loop")
    recipe = load_recipe(write_recipe(directory, model, clip))
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
    assert summary(finished / "run") == numbers


def test_a_changed_recipe_is_refused_by_its_key(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.learning_rate: 0\.001 then, 0\.002 now"):
        loop.run(load_recipe(finished / "recipe.yaml", ["finetune.learning_rate=0.002"]), finished / "run")


@pytest.mark.parametrize(
    "moment", ["work/candidates/*.parquet", "train/aligned/step-*", "work/evaluation/*.parquet"]
)
def test_killed_and_continued_it_ends_with_the_same_numbers(finished: Path, root: Path, moment: str) -> None:
    run_dir = finished / moment.split("/")[1]
    command = [sys.executable, "-m", "ray_jobs.loop", "--recipe", str(finished / "recipe.yaml")]
    driver = subprocess.Popen(
        [*command, "--run-dir", str(run_dir)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        while not list(run_dir.glob(moment)):
            assert driver.poll() is None, "the loop ended before it was killed"
            time.sleep(0.05)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert not (run_dir / "summary.json").exists()
    loop.run(load_recipe(finished / "recipe.yaml"), run_dir)
    assert summary(run_dir) == summary(finished / "run")
