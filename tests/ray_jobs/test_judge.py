"""Without a panel the loop waits for people, and goes on when they are done."""

from pathlib import Path

import pandas as pd
import pytest

from accord.artifacts import artifact_writer
from accord.errors import FeedbackError
from accord.feedback import Campaigns, Candidate, FeedbackStore
from accord.feedback.snapshot import load_snapshot
from accord.recipe import Recipe, load_recipe
from ray_jobs import judge
from tests.ray_jobs.world import write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = write_recipe(tmp_path, tmp_path / "model", tmp_path / "clip")
    overrides = ["panel=null", "feedback.judgements_per_image=2", "feedback.aggregation=weighted"]
    return load_recipe(path, [*overrides, f"feedback.url=sqlite:///{tmp_path}/shared.db"])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has collected four images to be judged, and one that is not."""
    run_dir = tmp_path / "run"
    rows = [
        {
            "part": "unlabelled" if number == 4 else "labelled",
            "image": f"{number:064x}",
            "prompt": "a red circle",
            "category": "colour",
            "split": "seen",
            "seed": number,
            "width": 64,
            "height": 64,
        }
        for number in range(5)
    ]
    with artifact_writer(
        run_dir / "candidates", "candidates", inputs={"model": "f" * 64}, config={}, seed=0
    ) as temporary:
        pd.DataFrame(rows).to_parquet(temporary / "index.parquet")
    return run_dir


def test_people_judge(recipe: Recipe, run_dir: Path) -> None:
    url = recipe.feedback_url(run_dir)
    with FeedbackStore(url) as store:  # another run's image, of the same model, in the shared store
        store.add_candidates([Candidate("e" * 64, "a red circle", "colour", "seen", 9, 64, 64, "f" * 64)])
    with pytest.raises(FeedbackError, match=r"4 of 4 images .* 0 of 4 answers.*rating page"):
        judge.run(recipe, run_dir)
    with Campaigns(url) as campaigns:
        (campaign,) = campaigns.campaigns()
        assert campaign.campaign_id.startswith("tiny-")
        for rater in ("ann", "bob"):
            if rater == "bob":
                with pytest.raises(FeedbackError, match="2 of 4 answers"):
                    judge.run(recipe, run_dir)
            while (task := campaigns.lease(campaign.campaign_id, rater)) is not None:
                verdicts = ["good" if int(image, 16) % 2 else "bad" for image in task.images]
                campaigns.submit(task.task_id, rater, verdicts, idempotency_key=f"{rater} {task.task_id}")
    assert judge.run(recipe, run_dir).config == {"aggregation": "weighted"}
    frame = load_snapshot(run_dir / "snapshot")
    assert frame["label"].tolist() == [0, 1, 0, 1]
    assert ((frame["weight"] > 0.4) & (frame["weight"] < 1)).all()
