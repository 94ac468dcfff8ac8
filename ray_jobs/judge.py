"""Have the panel judge the images, and take a snapshot of all judgements; with no panel, wait for people.

With `feedback.serve` the panel or the person judges through the feedback service, which runs meanwhile.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pandas as pd

from accord import rating
from accord.artifacts import Manifest, read_manifest
from accord.config import redact_url
from accord.errors import FeedbackError
from accord.feedback.campaign_records import Campaign
from accord.feedback.campaigns import Campaigns
from accord.feedback.snapshot import SNAPSHOT_KIND, snapshot_raters, write_snapshot
from accord.feedback.store import FeedbackStore
from accord.feedback.tables import Candidate, Judgement
from accord.prompts import load_grammar
from accord.recipe import Recipe
from ray_jobs import _cli, collect, inputs
from ray_jobs.progress import bar, say
from ray_jobs.stages import Stage, is_done, required, timed

BATCH_SIZE = 128


def run(recipe: Recipe, run_dir: Path) -> Manifest:
    """snapshot/: what was judged, immutable."""
    candidates = required(run_dir, "candidates")
    settings = recipe.feedback.model_dump(mode="json", exclude={"url", "serve", "rater", "comparisons"})
    if recipe.feedback.comparisons:
        settings["comparisons"] = list(recipe.feedback.comparisons)
    if recipe.feedback.serve:  # others say other things than the panel when it is asked directly
        settings |= {"serve": True} if recipe.panel else {"serve": True, "rater": recipe.feedback.rater}
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
            if recipe.feedback.serve:
                _judge_served(recipe, run_dir, store, labelled, candidates.digest)
            elif recipe.panel is not None:
                _judge(recipe, run_dir, store, labelled)
            _require_judgements(recipe, run_dir, store, labelled, candidates.digest)
            write_snapshot(
                store,
                run_dir / "snapshot",
                inputs=stage.inputs,
                seed=recipe.seed,
                aggregation=recipe.feedback.aggregation,
                only=set(zip(labelled["image"], labelled["prompt"], strict=True)),
                campaigns=recipe.feedback.comparisons,
            )
            _tell(run_dir)
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


def _judge_served(
    recipe: Recipe, run_dir: Path, store: FeedbackStore, labelled: pd.DataFrame, candidates_digest: str
) -> None:
    """The run's campaign completed over the feedback service: by the panel's raters, or by a person."""
    if not _waiting(recipe, store, labelled):
        return
    campaign = _campaign(recipe, run_dir, labelled, candidates_digest)
    name, wanted = campaign.campaign_id, campaign.num_answers_wanted
    with rating.rating_service(recipe, run_dir, inputs.image_folder(run_dir).root) as service:
        if recipe.panel is None:
            link = service.invite(name)
            say(f"The images are yours to judge, in the browser: {link}")
            if not rating.open_browser(link):
                say("There is no browser to open here: open the link in yours.")
            say("It goes on by itself after the last image. Ctrl-C stops it, the same command goes on.")
        with bar("Judging images", wanted, "answers") as progress:
            judging = service.panel_rates if recipe.panel else service.person_rates
            judging(name, progress.update)


def _tell(run_dir: Path) -> None:
    found = snapshot_raters(run_dir / "snapshot")
    alpha = "" if found["alpha"] is None else f"; they agree with Krippendorff's alpha {found['alpha']:.2f}"
    say(f"Raters: {found['count']}, {', '.join(found['by_rater'])}{alpha}")


def _waiting(recipe: Recipe, store: FeedbackStore, labelled: pd.DataFrame) -> int:
    """How many of the run's images have too few judgements."""
    ours = set(zip(labelled["image"], labelled["prompt"], strict=True))
    return sum((c.image, c.prompt) in ours for c in store.pending(recipe.feedback.judgements_per_image))


def _campaign(recipe: Recipe, run_dir: Path, labelled: pd.DataFrame, candidates_digest: str) -> Campaign:
    """The campaign of the run's images; made when it is not there."""
    with Campaigns(recipe.feedback_url(run_dir)) as campaigns:
        return campaigns.create_alignment(
            campaign_id(recipe, candidates_digest),
            f"{recipe.name}: does the image fit its text?",
            judgements_per_item=recipe.feedback.judgements_per_image,
            only=sorted(set(zip(labelled["image"], labelled["prompt"], strict=True))),
            seed=recipe.seed,
        )


def _require_judgements(
    recipe: Recipe, run_dir: Path, store: FeedbackStore, labelled: pd.DataFrame, candidates_digest: str
) -> None:
    """Raises FeedbackError, which says what to do, unless every image has its judgements."""
    waiting = _waiting(recipe, store, labelled)
    if not waiting:
        return
    votes_each = recipe.feedback.judgements_per_image
    url = redact_url(recipe.feedback_url(run_dir))
    images = len(labelled[["image", "prompt"]].drop_duplicates())
    problem = f"{waiting} of {images} images have fewer than {votes_each} judgements in {url}."
    if recipe.feedback.serve:
        raise FeedbackError(f"{problem} Give the same command again: the campaign goes on.")
    if recipe.panel is not None:
        raise FeedbackError(f"{problem} The panel gave too few; see judgements_per_image in the recipe.")
    campaign = _campaign(recipe, run_dir, labelled, candidates_digest)
    raise FeedbackError(
        f"{problem} People are to judge them: the campaign {campaign.campaign_id!r} has "
        f"{campaign.num_answers} of {campaign.num_answers_wanted} answers. Open the rating page on "
        f"that store, with the images of {run_dir / 'images'} (docs/feedback.md says how), and give the same "
        "command again when the campaign is complete; or name a `panel` of simulated raters in the recipe."
    )


if __name__ == "__main__":
    _cli.main("judge")
