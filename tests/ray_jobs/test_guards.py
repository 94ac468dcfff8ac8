"""Guards end a training that breaks a bound, here and on Ray, and the model handed on is the best before."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from accord.artifacts import load_tensors, read_manifest
from accord.diffusion.model import load_diffusion_model
from accord.errors import ConfigError, FeedbackError
from accord.guards.rule import Measured
from accord.recipe import RayConfig, Recipe, load_recipe
from ray_jobs import cluster, collect, finetune, guards, judge, learn_reward, score
from ray_jobs import train as train_module
from ray_jobs.snapshots import MOST_PENDING, WEIGHTS, Snapshots, ask_to_stop, pending
from ray_jobs.train import Training, train
from tests.ray_jobs.test_train import training

GUARDS: dict[str, Any] = {
    "every": 1,
    "prompts": {"colour": 2},
    "images_per_prompt": 2,
    "held_out": "tests.ray_jobs.world:greenness",
    "bounds": {"reference_distance": {"most": 1e-9}},
}


def guarded(path: Path, *overrides: str, **changes: Any) -> Recipe:
    text = json.dumps(GUARDS | changes)
    return load_recipe(path, [f"finetune.guards={text}", "control=false", "ray.local=true", *overrides])


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, model: Path, clip: Path) -> tuple[Path, Path]:
    """A recipe, and a run of it up to its scores."""
    from tests.ray_jobs.world import write_recipe

    directory = tmp_path_factory.mktemp("judged")
    path = write_recipe(directory, model, clip)
    recipe = load_recipe(path, ["ray.local=true"])
    for stage in (collect, judge, learn_reward, score):
        stage.run(recipe, directory / "run")
    return path, directory / "run"


@pytest.fixture
def run_dir(judged: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run, by links: what is made in it is its own."""
    made = tmp_path / "run"
    made.mkdir()
    for path in judged[1].iterdir():
        if path.name in ("train", "work", "stages"):
            continue
        (made / path.name).symlink_to(path)
    (made / "stages").mkdir()
    for note in (judged[1] / "stages").iterdir():
        (made / "stages" / note.name).write_bytes(note.read_bytes())
    return made


class Weights:
    """A learner that has learned one number."""

    def trained(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.ones(1)}


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_diffusion_model(directory).unet.state_dict()
    return weights


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in second)


def test_a_broken_bound_stops_the_training_and_says_why(
    judged: tuple[Path, Path], run_dir: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = guarded(judged[0])
    finetune.run(recipe, run_dir)
    verdict = read_manifest(run_dir / "aligned").config["guards_verdict"]
    assert (verdict["tripped"], verdict["step"], verdict["best_step"]) == (True, 1, 0)
    assert "the reference distance is" in verdict["reason"]
    assert "above its bound of 1e-09 (before fine-tuning it was 0.000)" in verdict["reason"]
    assert verdict["reason"] in " ".join(capsys.readouterr().err.split())
    assert json.loads((run_dir / "guards" / "verdict.json").read_text())["action"] == "stop"
    assert equal(weights_of(run_dir / "aligned"), weights_of(model)), "nothing was better than the base model"
    assert [path.name for path in (run_dir / "train" / "aligned").glob("step-*")] == ["step-00000001"]
    rows = guards.load_measurements(run_dir)
    assert [row.step for row in rows] == [0, 1]
    assert rows[0].mean("reference_distance") == 0.0 < rows[1].mean("reference_distance")
    assert {path.name for path in (run_dir / "guards" / "pictures").iterdir()} == {
        "step-00000000.png",
        "step-00000001.png",
    }
    assert not list((run_dir / "guards").glob("*/step-*/" + WEIGHTS))

    before = (run_dir / "aligned" / "manifest.json").read_bytes()
    finetune.run(recipe, run_dir)
    assert (run_dir / "aligned" / "manifest.json").read_bytes() == before
    with pytest.raises(ConfigError, match="every"):
        finetune.run(guarded(judged[0], every=2), run_dir)


def test_the_best_checkpoint_is_kept_while_training_goes_on(
    judged: tuple[Path, Path], run_dir: Path, model: Path
) -> None:
    """The bound is far off, the held-out judge is one that likes the later snapshots less and less."""
    recipe = guarded(
        judged[0],
        "tracking.uri=null",
        action="keep_best",
        held_out="tests.ray_jobs.world:faithfulness",
        bounds={"saturation": {"least": 2}},
    )
    finetune.run(recipe, run_dir)
    verdict = read_manifest(run_dir / "aligned").config["guards_verdict"]
    assert verdict["tripped"]
    assert [row.step for row in guards.load_measurements(run_dir)] == [0, 1, 2, 3, 4]
    assert verdict["best_step"] == 0, "every other snapshot broke the bound"
    assert (run_dir / "train" / "aligned" / "step-00000004").exists()
    client = MlflowClient(tracking_uri=recipe.tracking_uri(run_dir))
    run_id = (run_dir / "train" / "aligned" / "mlflow_run_id").read_text()
    logged = client.get_metric_history(run_id, "guard/held_out")
    assert [metric.step for metric in logged] == [0, 1, 2, 3, 4]
    assert logged[0].value == max(metric.value for metric in logged), "the base is the most like itself"


def test_guards_that_never_trip_change_nothing(
    judged: tuple[Path, Path], run_dir: Path, tmp_path: Path
) -> None:
    plain = load_recipe(judged[0], ["control=false", "ray.local=true"])
    finetune.run(plain, run_dir)
    assert "guards" not in read_manifest(run_dir / "aligned").config
    expected = weights_of(run_dir / "aligned")
    (run_dir / "aligned").rename(tmp_path / "plain")
    (run_dir / "stages" / "aligned.json").unlink()
    (run_dir / "train" / "aligned").rename(tmp_path / "plain_train")

    finetune.run(guarded(judged[0], bounds={}, patience=50), run_dir)
    config = read_manifest(run_dir / "aligned").config
    assert not config["guards_verdict"]["tripped"]
    assert "no guard tripped in 5 measurements" in config["guards_verdict"]["reason"]
    assert equal(weights_of(run_dir / "aligned"), expected)


def test_a_planted_reward_is_measured_as_it_is_trained_on(judged: tuple[Path, Path], run_dir: Path) -> None:
    """Several rewards that combine, one of them from outside; adapters are what is trained."""
    (run_dir / "scores").unlink()
    (run_dir / "stages" / "scores.json").unlink()
    recipe = guarded(
        judged[0],
        'rewards=[{"scorer": "tests.ray_jobs.world:saturated"}]',
        "finetune.parameters=lora",
        "finetune.learning_rate=0.05",
        measures={"again": "tests.ray_jobs.world:saturated"},
        bounds={"reward": {"most_ratio": 0.5}},
        every=4,
    )
    score.run(recipe, run_dir)
    finetune.run(recipe, run_dir)
    rows = guards.load_measurements(run_dir)
    assert [row.step for row in rows] == [0, 4]
    for row in rows:
        assert row.mean("reward") == pytest.approx(row.mean("saturation"), abs=1e-6)
        assert row.by_prompt["again"] == pytest.approx(row.by_prompt["reward"])
    assert rows[0].mean("reward") != rows[1].mean("reward")
    verdict = read_manifest(run_dir / "aligned").config["guards_verdict"]
    assert "the reward is" in verdict["reason"]


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_ray_the_training_goes_on_while_it_is_measured(
    judged: tuple[Path, Path], run_dir: Path, model: Path, ray_cluster: RayConfig
) -> None:
    recipe = guarded(judged[0], "ray.local=false", "finetune.steps=300", "finetune.checkpoint_every=300")
    finetune.run(recipe, run_dir)
    verdict = read_manifest(run_dir / "aligned").config["guards_verdict"]
    assert (verdict["tripped"], verdict["step"], verdict["best_step"]) == (True, 1, 0)
    assert equal(weights_of(run_dir / "aligned"), weights_of(model))
    assert not pending(run_dir / "guards")


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_workers_end_at_the_same_step(tmp_path: Path, model: Path, ray_cluster: RayConfig) -> None:
    from dataclasses import replace

    ask_to_stop(tmp_path / "guards", "enough")
    stopped = replace(training("two", model), snapshots=Snapshots(str(tmp_path / "guards"), every=2))
    (last,) = train([stopped], tmp_path, ray_cluster.model_copy(update={"num_workers": 2}))
    assert last.name == "step-00000001"


def test_snapshots_wait_whole_and_not_without_end(tmp_path: Path) -> None:
    unet = Weights()
    snapshots = Snapshots(str(tmp_path), every=5, offset=100)
    assert snapshots.at(10)
    assert not snapshots.at(11)
    assert [snapshots.take(unet, 5 * n) for n in range(1, 6)] == [True] * MOST_PENDING + [False] * 2
    assert not snapshots.take(unet, 5), "it is there already"
    assert [step for step, _ in pending(tmp_path)] == [105, 110, 115]
    assert snapshots.take(unet, 25, last=True), "the last is always measured"
    assert load_tensors(pending(tmp_path)[0][1] / WEIGHTS)["weight"].tolist() == [1.0]


def test_what_a_crash_left_is_settled(judged: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed after a measurement was noted and before its snapshot was kept or removed."""
    directory = tmp_path / "guards"
    rows = [
        Measured(step, {"reward": (0.1,), "held_out": (value,)})
        for step, value in ((0, 0.5), (5, 0.9), (10, 0.2))
    ]
    directory.mkdir()
    lines = [json.dumps(row.as_row()) for row in rows]
    (directory / guards.MEASUREMENTS).write_text("\n".join([*lines, lines[0][:20]]))
    for step in (5, 10, 15):
        Snapshots(str(directory), every=5).take(Weights(), step)
    recipe = guarded(judged[0], bounds={})
    assert recipe.finetune.guards is not None
    watch = guards.Guards(recipe, tmp_path, recipe.finetune.guards)
    assert watch._next() == (15, str(directory / "pending" / "step-00000015"))
    assert [path.name for path in (directory / "best").iterdir()] == ["step-00000005"]
    assert [step for step, _ in pending(directory)] == [15]
    assert watch.best() == directory / "best" / "step-00000005"


def test_a_trip_that_was_noted_stops_the_training_even_if_the_guards_were_killed_then(
    judged: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = [Measured(step, {"saturation": (value,)}) for step, value in ((0, 0.2), (5, 0.9))]
    (tmp_path / "guards").mkdir()
    lines = [json.dumps(row.as_row()) for row in rows]
    (tmp_path / "guards" / guards.MEASUREMENTS).write_text("\n".join([*lines, lines[0][:20]]))
    recipe = guarded(judged[0], bounds={"saturation": {"most": 0.5}}, action="stop")
    assert recipe.finetune.guards is not None
    watch = guards.Guards(recipe, tmp_path, recipe.finetune.guards)
    assert watch.snapshots("aligned", 0, "").must_stop()
    watch._note(10, Measured(10, {"saturation": (0.95,)}).as_row())
    assert [row.step for row in guards.load_measurements(tmp_path)] == [0, 5, 10], "the cut line is gone"


def test_nothing_is_asked_of_the_cluster_before_the_training_left_a_snapshot(
    judged: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else, on a single GPU, what measures would take it, and the training wait for it for ever."""
    recipe = guarded(judged[0], "ray.local=false")
    assert recipe.finetune.guards is not None
    asked: list[Path] = []

    def start(recipe: Recipe, run_dir: Path) -> Any:
        asked.append(run_dir)
        raise RuntimeError("asked")

    monkeypatch.setattr(guards, "_start_meter", start)
    monkeypatch.setattr(cluster, "has_room", lambda *_, **__: False)
    watch = guards.Guards(recipe, tmp_path, recipe.finetune.guards)
    watch.poll()
    assert not asked
    watch.snapshots("aligned", 0, "").take(Weights(), 1)
    with pytest.raises(RuntimeError, match="asked"):
        watch.poll()


def test_what_measures_lets_go_before_the_next_training_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Run(threading.Thread):
        def __init__(self, of: Training, directory: Path, config: RayConfig) -> None:
            super().__init__()
            self.training, self.directory = of, directory

        def run(self) -> None:
            events.append(self.training.name)

        def result(self) -> Path:
            return self.directory

    class Watch:
        def poll(self) -> None:
            pass

        def finish(self) -> None:
            events.append("finish")

    monkeypatch.setattr(train_module, "_Run", Run)
    monkeypatch.setattr(cluster, "ensure", lambda config: None)
    monkeypatch.setattr(cluster, "has_room", lambda *_, **__: False)
    aligned = Training("aligned", "", {}, 1, 1, 1, "", snapshots=Snapshots(str(tmp_path), every=1))
    train([aligned, Training("control", "", {}, 1, 1, 1, "")], tmp_path, RayConfig(), Watch())
    assert events == ["aligned", "finish", "control"]


def test_a_held_out_reward_is_learned_from_the_judgements_that_the_first_never_saw(
    judged: tuple[Path, Path], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = guarded(judged[0], "reward.validation_fraction=0.5", held_out="judgements")
    with pytest.raises(FeedbackError, match=r"keeps only \d+ judged images from the reward"):
        guards.learn_held_out(recipe, run_dir)
    monkeypatch.setattr(guards, "LEAST_JUDGED", 4)
    guards.learn_held_out(recipe, run_dir)
    config = read_manifest(run_dir / "guards" / "held_out").config
    assert config["judgements"] == 8
    assert 0.0 <= config["auc_on_the_others"] <= 1.0


def test_what_cannot_work_is_said_when_the_recipe_is_read(recipe_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"finetune.guards.prompts"):
        guarded(recipe_path, prompts={"colour": 10_000})
    with pytest.raises(ConfigError, match="validation_fraction"):
        guarded(recipe_path, "reward.validation_fraction=0", held_out="judgements")
