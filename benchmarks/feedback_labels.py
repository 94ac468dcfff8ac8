"""What labels of noisy raters cost the reward: its AUC beside that of clean labels of the same images.

    python -m benchmarks.feedback_labels [--seeds 5] [--errors 0.05 0.15 0.25]     generated images
    python -m benchmarks.feedback_labels --rendered [--images 768]                 renders: minutes less

The images are the sandbox model's, on the prompts of recipes/sandbox/demo.yaml and with its sampler: 768 to
learn from and, of other prompts and seeds, 512 to measure on. With --rendered they are drawn by the renderer
of the world of shapes, with careless captions (its look-alikes: heart for circle, orange for red).

They are candidates of a feedback store. A campaign collects a judgement of each by every rater, who is wrong
at random with his own error rate; snapshots aggregate them by majority and by reliability. A third snapshot
is of a rater who is never wrong. A reward is learned from each with the settings of the recipe, and measured
on the other images, by their clean labels. The claim: labels aggregated by reliability cost at most 0.02 of
AUC in the mean over seeds; the majority's stand beside them.
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch

from accord.config import load_yaml, resolve_path
from accord.diffusion.model import load_diffusion_model
from accord.diffusion.sample import sample_images
from accord.evaluation.statistics import auc
from accord.feedback import Campaigns, Candidate, FeedbackStore
from accord.feedback.snapshot import load_snapshot, write_snapshot
from accord.images import ImageFolder, Pixels, encode_png
from accord.prompts import Category, Grammar, Prompt, Split, load_grammar
from accord.recipe import Recipe
from accord.reward.data import build_reward_data
from accord.reward.features import ClipEncoder
from accord.reward.learn import RewardLearner
from accord.shapes.captions import captioned_renders
from accord.shapes.judge import fits, read_image

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "sandbox" / "demo.yaml"
CLAIM, CLAIMED = 0.02, "weighted"
TEST_RENDERS, TEST_IMAGES = 2000, 512
BATCH = 128

Truth = dict[tuple[str, str], bool]
Drawn = tuple[list[Candidate], Truth]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rendered", action="store_true", help="renders instead of the model's images")
    parser.add_argument("--images", type=int, default=768, help="how many renders are judged")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--errors", type=float, nargs="+", default=[0.05, 0.15, 0.25], help="one a rater")
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    arguments = parser.parse_args()
    recipe = load_yaml(Recipe, RECIPE)
    encoder = ClipEncoder(recipe.clip)
    world: World = Rendered(arguments.images) if arguments.rendered else Generated(recipe)
    rows = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        with tempfile.TemporaryDirectory() as directory:
            row = measure(recipe, encoder, Path(directory), world, arguments.errors, seed)
        print(json.dumps(row), flush=True)
        rows.append(row)
    names = ("clean", "majority", "weighted")
    mean = {name: round(statistics.fmean(row["auc"][name] for row in rows), 4) for name in names}
    lost = {name: round(mean["clean"] - mean[name], 4) for name in names[1:]}
    result = {"errors": arguments.errors, "seeds": rows, "mean_auc": mean, "lost": lost, "claim": CLAIM}
    print(f"mean AUC {mean}; aggregated labels cost {lost}, the claim is at most {CLAIM} for the weighted")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    raise SystemExit(lost[CLAIMED] > CLAIM)


class World(Protocol):
    """Where images come from."""

    def draw(self, seed: int, grammar: Grammar, folder: ImageFolder) -> tuple[Drawn, Drawn]:
        """Candidates to learn from and to measure on, each with its clean label."""
        ...


class Rendered:
    def __init__(self, images: int) -> None:
        self._images = images

    def draw(self, seed: int, grammar: Grammar, folder: ImageFolder) -> tuple[Drawn, Drawn]:
        def part(count: int, seed: int) -> Drawn:
            rows = [(item.image, grammar.parse(item.caption)) for item in captioned_renders(count, seed)]
            return keep(rows, folder)

        return part(self._images, 1000 + seed), part(TEST_RENDERS, 2000 + seed)


class Generated:
    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._model = load_diffusion_model(resolve_path(recipe.model))

    def draw(self, seed: int, grammar: Grammar, folder: ImageFolder) -> tuple[Drawn, Drawn]:
        collect = self._recipe.collect
        learned = grammar.sample(collect.labelled.plan, seed)
        given = collect.labelled.images_per_prompt
        parts = (
            [prompt for prompt in learned for _ in range(given[prompt.category])],
            self._others(learned, seed, grammar),
        )
        first, second = (self._sample(prompts, 2 * seed + n) for n, prompts in enumerate(parts))
        return keep(first, folder), keep(second, folder)

    def _others(self, learned: Sequence[Prompt], seed: int, grammar: Grammar) -> list[Prompt]:
        """Prompts that nothing is learned from, equally many a category; those of few come more often."""
        seen = {prompt.text for prompt in learned}
        chosen: list[Prompt] = []
        for category in Category:
            there = [p for p in grammar.all_prompts(Split.SEEN, category) if p.text not in seen]
            random.Random(f"{seed} {category}").shuffle(there)
            chosen += [there[number % len(there)] for number in range(TEST_IMAGES // len(Category))]
        return chosen

    def _sample(self, prompts: Sequence[Prompt], seed: int) -> list[tuple[Pixels, Prompt]]:
        sampler, batch = self._recipe.collect.sampler, self._recipe.collect.batch_size
        rows: list[tuple[Pixels, Prompt]] = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            seeds = [1_000_000 * seed + start + number for number in range(len(part))]
            images = sample_images(self._model, [prompt.text for prompt in part], seeds, sampler)
            rows += zip(images, part, strict=True)
        return rows


def keep(rows: Sequence[tuple[Pixels, Prompt]], folder: ImageFolder) -> Drawn:
    """The images in the folder, as candidates, and whether each fits its prompt."""
    candidates, truth = [], {}
    for number, (image, prompt) in enumerate(rows):
        digest = folder.put(encode_png(image))
        height, width, _ = image.shape
        kind, split = str(prompt.category), str(prompt.split)
        candidates.append(Candidate(digest, prompt.text, kind, split, number, width, height))
        truth[digest, prompt.text] = fits(read_image(image), prompt)
    return candidates, truth


def measure(
    recipe: Recipe, encoder: ClipEncoder, directory: Path, world: World, errors: Sequence[float], seed: int
) -> dict[str, Any]:
    """The test AUC by kind of labels, and how many training labels are right."""
    grammar, folder = load_grammar(recipe.grammar), ImageFolder(directory / "images")
    (candidates, truth), (tests, test_truth) = world.draw(seed, grammar, folder)
    digests = list(dict.fromkeys(c.image for c in [*candidates, *tests]))
    vectors = torch.cat(
        [
            encoder.image_features([folder.load(digest) for digest in digests[start : start + BATCH]]).cpu()
            for start in range(0, len(digests), BATCH)
        ]
    )
    rows = {digest: number for number, digest in enumerate(digests)}

    def image_features(wanted: Sequence[str]) -> torch.Tensor:
        return vectors[[rows[digest] for digest in wanted]]

    snapshots = {"clean": judge(directory / "clean", candidates, truth, [0.0], seed, "majority")}
    for name in ("majority", "weighted"):
        snapshots[name] = judge(directory / name, candidates, truth, errors, seed, name)
    found: dict[str, float] = {}
    right: dict[str, float] = {}
    for name, snapshot in snapshots.items():
        labelled = snapshot[snapshot["label"].notna()]
        keys = zip(labelled["image"], labelled["prompt"], strict=True)
        agree = [truth[key] == bool(label) for key, label in zip(keys, labelled["label"], strict=True)]
        right[name] = round(float(np.mean(agree)), 4)
        reward = learn(recipe, grammar, encoder, image_features, snapshot, seed)
        scores = reward([c.image for c in tests], [c.prompt for c in tests])
        labels = [float(test_truth[c.image, c.prompt]) for c in tests]
        found[name] = round(float(auc(scores, labels)), 4)
    good = round(float(np.mean(list(test_truth.values()))), 3)
    return {"seed": seed, "auc": found, "right_labels": right, "good": good}


def judge(
    directory: Path, candidates: list[Candidate], truth: Truth, errors: Sequence[float], seed: int, how: str
) -> pd.DataFrame:
    """A campaign in a store of its own, in which every rater judges every image; its snapshot."""
    directory.mkdir()
    url = f"sqlite:///{directory}/feedback.db"
    with FeedbackStore(url) as store, Campaigns(url) as campaigns:
        store.add_candidates(candidates)
        campaigns.create_alignment("c", "C", judgements_per_item=len(errors), images_per_task=9, seed=seed)
        for number, error in enumerate(errors):
            rng = np.random.default_rng([seed, number])
            while (task := campaigns.lease("c", f"rater {number}")) is not None:
                said = [truth[image, task.prompt] != (rng.random() < error) for image in task.images]
                verdicts = ["good" if good else "bad" for good in said]
                key = f"{number} {task.task_id}"
                campaigns.submit(task.task_id, f"rater {number}", verdicts, idempotency_key=key)
        write_snapshot(store, directory / "snapshot", inputs={}, seed=seed, aggregation=how)
    return load_snapshot(directory / "snapshot")


def learn(
    recipe: Recipe,
    grammar: Grammar,
    encoder: ClipEncoder,
    image_features: Callable[[Sequence[str]], torch.Tensor],
    snapshot: pd.DataFrame,
    seed: int,
) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    """A trained reward, as a function of image digests and prompts."""
    data = build_reward_data(
        snapshot,
        grammar,
        image_features=image_features,
        text_features=lambda texts: encoder.text_features(texts).cpu(),
        num_prompts=recipe.reward.num_prompts,
        seed=seed,
    )
    learner = RewardLearner(data, recipe.reward, seed)
    for _ in range(recipe.reward.steps):
        learner.step()
    head = learner.trained_head()

    def score(images: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(head(image_features(images), encoder.text_features(prompts).cpu()).numpy())

    return score


if __name__ == "__main__":
    main()
