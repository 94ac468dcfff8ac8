"""Recipes: those that ship are whole, and mistakes are told before any work is done."""

from pathlib import Path

import pytest

from accord.artifacts import canonical_json
from accord.config import load_object, load_yaml
from accord.errors import ConfigError
from accord.prompts import Category, Split
from accord.recipe import Recipe, load_recipe
from ray_jobs.study import StudyConfig
from tests.conftest import ROOT

DEMO = ROOT / "recipes" / "sandbox" / "demo.yaml"
SMOKE = ROOT / "recipes" / "sandbox" / "smoke.yaml"
PAPER = ROOT / "recipes" / "sd15" / "paper.yaml"
STUDIES = sorted((ROOT / "recipes" / "studies").glob("*.yaml"))
# pretrain.yaml makes the sandbox's weights: another kind of recipe, with a config of its own.
OTHER = {ROOT / "recipes" / "sandbox" / "pretrain.yaml", *STUDIES}
LOOPS = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path not in OTHER)


def images(recipe: Recipe) -> tuple[int, int]:
    parts = (recipe.collect.labelled, recipe.collect.unlabelled)
    labelled, unlabelled = (
        sum(number * part.images_per_prompt[category] for category, number in part.prompts.items())
        for part in parts
    )
    return labelled, unlabelled


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_every_recipe_that_ships_loads(path: Path) -> None:
    assert load_recipe(path).run_dir.parts[0] == "runs"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_arm_of_a_study_that_ships_is_a_recipe(path: Path) -> None:
    study = load_yaml(StudyConfig, path)
    assert study.run_dir.parts[0] == "runs"
    for arm, changes in study.arms.items():
        assert load_recipe(ROOT / study.recipe, [*study.set, *changes, "seed=1"]).seed == 1, arm


def test_what_is_confirmed_was_studied_on_other_prompts_and_seeds() -> None:
    study, confirmation = (
        load_yaml(StudyConfig, ROOT / "recipes" / "studies" / name)
        for name in ("sandbox.yaml", "sandbox_confirm.yaml")
    )
    assert len(study.seeds) >= 5
    assert not set(study.seeds) & set(confirmation.seeds)
    assert "evaluate.reserved_prompts=none" in study.set
    assert "evaluate.reserved_prompts=only" in confirmation.set
    assert confirmation.arms.items() <= study.arms.items()


@pytest.mark.parametrize("path", [DEMO, SMOKE], ids=["demo", "smoke"])
def test_the_objects_that_sandbox_recipes_name_exist(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.evaluator is not None
    assert recipe.panel is not None
    assert recipe.reference is not None
    for spec in (recipe.evaluator, recipe.panel, recipe.pretraining.source, recipe.reference.source):
        assert callable(load_object(spec))


def test_demo_has_the_sizes_of_the_study() -> None:
    assert images(load_recipe(DEMO)) == (768, 256)


def test_paper_recipe_has_the_paper_s_numbers() -> None:
    recipe = load_recipe(PAPER)
    labelled = recipe.collect.labelled
    assert labelled.prompts == {
        Category.COUNT: 108,
        Category.COLOUR: 58,
        Category.BACKGROUND: 80,
        Category.COMBINATION: 2528,
    }
    assert sum(labelled.prompts.values()) == 2774
    assert images(recipe)[0] == 27_528
    assert 16_000 <= images(recipe)[1] < 17_000
    reward, finetune, test = recipe.reward, recipe.finetune, recipe.evaluate.test
    assert (reward.hidden_size, reward.temperature, reward.auxiliary_weight) == (1024, 2.0, 0.5)
    assert (finetune.steps, finetune.batch_size, finetune.pretraining_batch_size) == (10_000, 256, 256)
    assert sum(test.prompts[Split.SEEN].values()) == sum(test.prompts[Split.UNSEEN_OBJECT].values()) == 60
    assert (test.images_per_prompt, test.raters, test.quorum) == (4, 9, 7)
    assert recipe.panel is None  # people judge


def test_paper_recipe_says_of_each_choice_that_it_is_one() -> None:
    text = PAPER.read_text()
    for key in ("num_prompts:", "beta:", "learning_rate: 1.0e-5", "ema_decay:", "schedule: constant"):
        line = next(line for line in text.splitlines() if line.strip().startswith(key))
        assert "silent" in line
        assert "hosen" in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("finetune.bata=3", "'finetune.bata'; did you mean 'beta'?"),
        ("evaluate.test.prompts.unseen_object.count=9", "asks for 9 count prompts"),
        ("collect.labelled.prompts.colour=26", "collect.labelled.prompts: the plan asks for 26"),
        ("collect.labelled.images_per_prompt={count: 2}", "images_per_prompt says nothing"),
        ("collect.labelled.prompts.color=2", "'collect.labelled.prompts.color'"),
        ("grammar=shape", "no grammar 'shape'"),
        ("panel=raters", "panel"),
        ("seed=-1", "seed"),
        ("finetune.objective=ppo", "'ppo'"),
        ("on_policy.rounds=2", "images must name prompts"),
        (
            "on_policy={rounds: 1, images: {prompts: {count: 99}, images_per_prompt: {count: 1}}}",
            "on_policy.images.prompts: the plan asks for 99",
        ),
        ("evaluate.reserved_prompts=some", "reserved_prompts"),
    ],
)
def test_mistakes(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(DEMO, [override])
    assert expected in str(caught.value)
    assert str(DEMO) in str(caught.value)


def test_test_prompts_leave_room_for_those_of_the_choice() -> None:
    enough = ["evaluate.test.prompts.seen.count=14"]  # of 15, of which the choice has 1
    assert load_recipe(DEMO, enough).evaluate.test.prompts[Split.SEEN][Category.COUNT] == 14
    with pytest.raises(ConfigError, match="not used elsewhere"):
        load_recipe(DEMO, ["evaluate.test.prompts.seen.count=15"])


def test_stores_lie_in_the_run_directory_by_default(tmp_path: Path) -> None:
    recipe = load_recipe(DEMO)
    assert recipe.feedback_url(tmp_path) == f"sqlite:///{tmp_path}/feedback.db"
    assert recipe.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert load_recipe(DEMO, ["tracking.uri=''"]).tracking_uri(tmp_path) == ""


def test_store_urls_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(DEMO, ["feedback.url=env:ACCORD_TEST_URL"])
    with pytest.raises(ConfigError, match="ACCORD_TEST_URL is not set"):
        recipe.feedback_url(tmp_path)
    monkeypatch.setenv("ACCORD_TEST_URL", "postgresql://h/d")
    assert recipe.feedback_url(tmp_path) == "postgresql://h/d"


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    url = "postgresql://me:hunter2@host/db"
    recipe = load_recipe(DEMO, [f"feedback.url={url}", f"tracking.uri={url}"])
    assert recipe.feedback_url(tmp_path) == recipe.tracking_uri(tmp_path) == url
    for shown in (repr(recipe), str(recipe.feedback), canonical_json(recipe), recipe.model_dump_json()):
        assert "hunter2" not in shown
