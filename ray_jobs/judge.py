"""Have the panel judge the images, and take a snapshot of all judgements; with no panel, wait for people."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pandas as pd

from accord.artifacts import Manifest, read_manifest
from accord.config import redact_url
from accord.errors import FeedbackError
from accord.feedback.campaigns import Campaigns
from accord.feedback.snapshot import SNAPSHOT_KIND, write_snapshot
from accord.feedback.store import FeedbackStore
from accord.feedback.tables import Candidate, Judgement
from accord.prompts import load_grammar
from accord.recipe import Recipe
from ray_jobs import _cli, collect, inputs
from ray_jobs.progress import bar
from ray_jobs.stages import Stage, is_done, required, timed

BATCH_SIZE = 128


def run(recipe: Recipe, run_dir: Path) -> Manifest:
    """snapshot/: what was judged, immutable."""
    candidates = required(run_dir, "candidates")
    settings = recipe.feedback.model_dump(mode="json", exclude={"url"})
    stage = Stage(
        "snapshot",
        SNAPSHOT_KIND,
        {"panel": recipe.panel, **settings},
        recipe.seed,
        {"candidates": candidates.digest},
    )
    if not is_done(stage, run_dir):
        with timed(run_dir, "judge"), FeedbackStore(recipe.feedback_url(run_dir)) as store:
            index = collect.load_index(run_dir)
            labelled = index[index["part"] == "labelled"]
            store.add_candidates(_candidates(labelled, candidates.inputs["model"]))
            if recipe.panel is not None:
                _judge(recipe, run_dir, store, labelled)
            _require_judgements(recipe, run_dir, store, labelled, candidates.digest)
            write_snapshot(
                store,
                run_dir / "snapshot",
                inputs=stage.inputs,
                seed=recipe.seed,
                aggregation=recipe.feedback.aggregation,
            )
    return read_manifest(run_dir / "snapshot")


def _candidates(labelled: pd.DataFrame, source: str) -> list[Candidate]:
    return [
        Candidate(r.image, r.prompt, r.category, r.split, r.seed, r.width, r.height, source)
        for r in inputs.records(labelled)
    ]


def _judge(recipe: Recipe, run_dir: Path, store: FeedbackStore, labelled: pd.DataFrame) -> None:
    """Judgements of the panel for every image that lacks some; each batch is one transaction."""
    panel = inputs.make_panel(recipe, "judge")
    grammar, folder = load_grammar(recipe.grammar), inputs.image_folder(run_dir)
    votes_each = recipe.feedback.judgements_per_image
    waiting = {(c.image, c.prompt) for c in store.pending(votes_each)}
    rows = [r for r in inputs.records(labelled) if (r.image, r.prompt) in waiting]
    with bar("Judging images", len(labelled), "images") as progress:
        done = len(labelled) - len(rows)
        for part in inputs.batches(rows, BATCH_SIZE):
            progress.update(done)
            judged = panel.judge(
                [folder.load(r.image) for r in part],
                [grammar.parse(r.prompt) for r in part],
                [judgement_key(recipe, r.image, r.prompt) for r in part],
                votes_each,
            )
            store.submit(
                Judgement(
                    f"panel {judgement_key(recipe, r.image, r.prompt)} {v.rater}",
                    r.image,
                    r.prompt,
                    v.rater,
                    v.verdict,
                )
                for r, votes in zip(part, judged, strict=True)
                for v in votes
            )
            done += len(part)
        progress.update(done)


def judgement_key(recipe: Recipe, image: str, prompt: str) -> str:
    """What the panel's judgement of an image is determined by."""
    return hashlib.sha256(f"{recipe.panel} {recipe.seed} {image} {prompt}".encode()).hexdigest()[:32]


def campaign_id(recipe: Recipe, candidates_digest: str) -> str:
    """The campaign in which people judge a run's images."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", recipe.name).strip("-")[:40] or "run"
    return f"{name}-{candidates_digest[:12]}"


def _require_judgements(
    recipe: Recipe, run_dir: Path, store: FeedbackStore, labelled: pd.DataFrame, candidates_digest: str
) -> None:
    """Raises FeedbackError, which says what to do, unless every image has its judgements."""
    ours = set(zip(labelled["image"], labelled["prompt"], strict=True))
    votes_each = recipe.feedback.judgements_per_image
    waiting = sum((c.image, c.prompt) in ours for c in store.pending(votes_each))
    if not waiting:
        return
    url = redact_url(recipe.feedback_url(run_dir))
    problem = f"{waiting} of {len(ours)} images have fewer than {votes_each} judgements in {url}."
    if recipe.panel is not None:
        raise FeedbackError(f"{problem} The panel gave too few; see judgements_per_image in the recipe.")
    name = campaign_id(recipe, candidates_digest)
    with Campaigns(recipe.feedback_url(run_dir)) as campaigns:
        campaign = campaigns.create_alignment(
            name,
            f"{recipe.name}: does the image fit its text?",
            judgements_per_item=votes_each,
            only=sorted(ours),
            seed=recipe.seed,
        )
    raise FeedbackError(
        f"{problem} People are to judge them: the campaign {name!r} has {campaign.num_answers} of "
        f"{campaign.num_answers_wanted} answers. Open the rating page on that store, with the images of "
        f"{run_dir / 'images'} (docs/feedback.md says how), and give the same command again when the "
        "campaign is complete; or name a `panel` of simulated raters in the recipe."
    )


if __name__ == "__main__":
    _cli.main("judge")
