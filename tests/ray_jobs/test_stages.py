"""Stages are skipped when done, refuse another configuration, and know how long they took."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from accord.errors import ArtifactError, ConfigError
from accord.recipe import load_recipe
from ray_jobs import stages
from ray_jobs.stages import Stage, is_done, read_seconds, required, stage_writer, start_over, timed


def make(run_dir: Path, stage: Stage, content: str = "x") -> None:
    with stage_writer(stage, run_dir) as directory:
        (directory / "content.txt").write_text(content)


def stage(steps: int = 3, seed: int = 0, model: str = "abc") -> Stage:
    return Stage("scores", "scores", {"sampler": {"steps": steps, "options": {}}}, seed, {"model": model})


def test_a_run_directory_has_one_process_at_a_time(tmp_path: Path) -> None:
    with stages.alone(tmp_path / "run"):
        script = "import sys, pathlib, ray_jobs.stages as s; s.alone(pathlib.Path(sys.argv[1])).__enter__()"
        other = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True, check=False
        )
        assert "another command is at work in" in other.stderr
    with stages.alone(tmp_path / "run"):
        pass


def test_a_stage_is_done_once_its_artifact_is_there(tmp_path: Path) -> None:
    assert not is_done(stage(), tmp_path)
    assert not is_done(stage(), tmp_path)  # noted as started, not as done
    make(tmp_path, stage())
    assert is_done(stage(), tmp_path)


@pytest.mark.parametrize("finished", [False, True])
def test_another_configuration_is_refused_by_the_names_of_its_keys(tmp_path: Path, finished: bool) -> None:
    assert not is_done(stage(), tmp_path)
    if finished:
        make(tmp_path, stage())
    with pytest.raises(ConfigError) as caught:
        is_done(stage(steps=4, seed=1), tmp_path)
    message = str(caught.value)
    assert "config.sampler.steps: 3 then, 4 now" in message
    assert "seed: 0 then, 1 now" in message
    assert "model" not in message
    assert "--run-dir" in message
    assert "--fresh" in message


def test_a_stage_that_an_older_version_noted_is_known_again(tmp_path: Path) -> None:
    assert not is_done(Stage("aligned", "model", {"steps": 3, "log_every": 5}, 0), tmp_path)
    newer: dict[str, Any] = {"defaults": {"steps": 1, "lora": {"rank": 4}}, "free": frozenset({"log_every"})}
    same = Stage("aligned", "model", {"steps": 3, "lora": {"rank": 4}}, 0, **newer)
    assert not is_done(same, tmp_path)
    other = Stage("aligned", "model", {"steps": 3, "lora": {"rank": 8}}, 0, **newer)
    with pytest.raises(ConfigError, match=r"config\.lora\.rank: 4 then, 8 now"):
        is_done(other, tmp_path)


def test_another_input_is_refused(tmp_path: Path) -> None:
    is_done(stage(), tmp_path)
    with pytest.raises(ConfigError, match=r"inputs\.model: 'abc' then, 'xyz' now"):
        is_done(stage(model="xyz"), tmp_path)


def test_a_directory_that_no_stage_made_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="no stage of this run made it"):
        is_done(stage(), tmp_path)
    assert (tmp_path / "scores" / "mine.txt").read_text() == "precious"


def test_a_missing_artifact_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="accord learn-reward"):
        required(tmp_path, "reward")
    with pytest.raises(ArtifactError, match="accord collect"):
        required(tmp_path, "candidates")


def test_seconds_add_up_over_interruptions(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), timed(tmp_path, "score"):
        time.sleep(0.05)
        raise KeyboardInterrupt
    first = read_seconds(tmp_path)["score"]
    with timed(tmp_path, "score"):
        time.sleep(0.05)
    assert first >= 0.05
    assert read_seconds(tmp_path)["score"] >= first + 0.05


def test_seconds_of_a_killed_run_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "HEARTBEAT_S", 0.01)
    with timed(tmp_path, "score"):
        deadline = time.monotonic() + 60
        while not read_seconds(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "score" in read_seconds(tmp_path)  # before the end, which a kill would take away


def test_starting_over_removes_this_stage_and_later_ones_only(tmp_path: Path, recipe_path: Path) -> None:
    run_dir = tmp_path / "run"
    recipe = load_recipe(recipe_path)
    for name in ("candidates", "scores", "aligned", "images"):
        (run_dir / name).mkdir(parents=True)
    (run_dir / "train" / "aligned").mkdir(parents=True)
    (run_dir / "feedback.db").touch()
    stages.write_json(run_dir / "seconds.json", {"collect": 1.0, "score": 2.0})
    start_over(run_dir, "score", recipe)
    left = {path.name for path in run_dir.iterdir()}
    assert left == {"candidates", "feedback.db", "images", "seconds.json", "train"}
    assert not (run_dir / "train" / "aligned").exists()
    assert read_seconds(run_dir) == {"collect": 1.0}


def test_starting_over_removes_the_report_of_what_is_gone(tmp_path: Path, recipe_path: Path) -> None:
    for name in ("report.html", "summary.json"):
        (tmp_path / name).write_text("old")
    start_over(tmp_path, "finetune", load_recipe(recipe_path))
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "summary.json").exists()


def test_what_a_later_stage_would_meet_is_an_error_at_once(tmp_path: Path, recipe_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for options, message in (
        (["--run-dir", str(tmp_path / "file")], "is a file; --run-dir names the directory"),
        (["--set", "evaluator=foo.bar:baz"], "foo.bar"),
    ):
        command = [sys.executable, "-m", "ray_jobs.collect", "--recipe", str(recipe_path), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr + done.stdout
        assert "Traceback" not in done.stderr


def test_votes_of_people_are_never_removed(tmp_path: Path, recipe_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "feedback.db").touch()
    start_over(run_dir, "loop", load_recipe(recipe_path, ["panel=null"]))
    assert (run_dir / "feedback.db").exists()
    start_over(run_dir, "loop", load_recipe(recipe_path))
    assert not (run_dir / "feedback.db").exists()
