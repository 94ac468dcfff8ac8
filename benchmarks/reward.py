"""How long a reward takes to learn from judgements whose CLIP features are cached, and where the time goes.

python -m benchmarks.reward --images 100000

The judgements are made up, but as many and as wide as real ones: prompts of the grammar `paper`, features of
ViT-L/14's 768 numbers, and a planted judge. An image shows its prompt or one that differs from it in a word;
the judge says good where it shows its own, and errs in a tenth of the cases, so that no reward has an AUC
above the ceiling that is printed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from accord.artifacts import save_tensors, sha256_bytes
from accord.cpu import use_cpu
from accord.evaluation.statistics import auc
from accord.prompts import Category, Grammar, PromptPlan, Split, load_grammar
from accord.reward.data import RewardData, build_reward_data
from accord.reward.features import ClipEncoder, FeatureCache
from accord.reward.learn import RewardLearner
from accord.reward.settings import RewardConfig
from benchmarks.tables import describe, table, write_json

NUM_PROMPTS = 10
HEADS: dict[str, dict[str, Any]] = {
    "adapter": {"combine": "adapter", "learning_rate": 1e-2, "weight_decay": 0.5},
    "paper": {"combine": "concat"},
}
PROMPTS = dict(zip(Category, (108, 58, 80, 2528), strict=True))
"""Prompts that are judged, as many as in the paper."""
PARTS = ("read", "perturb", "start", "draw", "products", "update", "measure", "save")


class Clock:
    """Seconds by part, of the wall and of all CPUs."""

    def __init__(self) -> None:
        self.wall_s, self.cpu_s = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str, within: str | None = None) -> Iterator[None]:
        """`within`: another part that runs meanwhile, of which this is not to count."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        yield
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        self.wall_s[name] += wall_s
        self.cpu_s[name] += cpu_s
        if within is not None:
            self.wall_s[within] -= wall_s
            self.cpu_s[within] -= cpu_s

    @property
    def total_s(self) -> float:
        return sum(self.wall_s.values())


class World:
    """A snapshot, its features as a cache on the disk, and the truth that the judge errs about."""

    def __init__(self, directory: Path, num_images: int, dim: int, seed: int) -> None:
        self.grammar: Grammar = load_grammar("paper")
        random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        prompts = self.grammar.sample(PromptPlan(split=Split.SEEN, per_category=PROMPTS), seed)
        asked = random.choice(len(prompts), num_images)
        fits = random.random(num_images) < 0.5
        wrong = {p.text: [o.text for o in self.grammar.perturb(p, NUM_PROMPTS - 1, seed)] for p in prompts}
        shown = [
            prompts[a].text if fit else wrong[prompts[a].text][random.integers(NUM_PROMPTS - 1)]
            for a, fit in zip(asked, fits, strict=True)
        ]
        everything = [prompt.text for prompt in self.grammar.all_prompts(Split.SEEN)]
        self._texts = {text: row for row, text in enumerate(everything)}
        self._text_KD = _text_features(everything, dim, generator)
        shown_ND = self.text_features(shown)
        noise_ND = torch.randn(num_images, dim, generator=generator) / dim**0.5
        self.image_ND = F.normalize(shown_ND + 1.5 * noise_ND, dim=1)
        self.fits_N = torch.from_numpy(fits)
        label_N = np.where(random.random(num_images) < 0.1, ~fits, fits).astype(float)
        self.ceiling = auc(fits.astype(float), label_N)
        digests = [sha256_bytes(str(number).encode()) for number in range(num_images)]
        self.snapshot = pd.DataFrame(
            {
                "image": digests,
                "prompt": [prompts[a].text for a in asked],
                "category": [str(prompts[a].category) for a in asked],
                "label": label_N,
                "weight": 1.0,
            }
        )
        self.encoder = cast("ClipEncoder", SimpleNamespace(digest="0" * 64, dim=dim, uri="planted"))
        self.directory = directory
        for start in range(0, num_images, FeatureCache.SHARD_SIZE):
            part = digests[start : start + FeatureCache.SHARD_SIZE]
            metadata = {"clip": self.encoder.digest, "images": str(part).replace("'", '"')}
            features = self.image_ND[start : start + len(part)].contiguous()
            path = directory / self.encoder.digest / f"{start:08d}.safetensors"
            save_tensors(path, {"features": features}, metadata)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """features_BD of prompts, made beforehand."""
        return self._text_KD[[self._texts[text] for text in texts]]

    def data(self, clock: Clock) -> RewardData:
        """As learn_reward prepares it."""
        cache = FeatureCache(self.directory, self.encoder)
        read: list[Tensor] = []

        def unread(_: str) -> Any:
            raise SystemExit("the cache lacks an image")

        with clock.part("read"):
            read.append(cache.image_features(list(self.snapshot["image"]), unread))
        with clock.part("perturb"):
            return build_reward_data(
                self.snapshot,
                self.grammar,
                image_features=lambda _: read[0],
                text_features=self.text_features,
                num_prompts=NUM_PROMPTS,
                seed=0,
            )


def _text_features(texts: Sequence[str], dim: int, generator: torch.Generator) -> Tensor:
    """The sum of a random vector for each word, so that prompts that share words are near each other."""
    words = {word: row for row, word in enumerate(dict.fromkeys(w for text in texts for w in text.split()))}
    vectors_WD = torch.randn(len(words), dim, generator=generator)
    counts_KW = torch.zeros(len(texts), len(words))
    for row, text in enumerate(texts):
        counts_KW[row, [words[word] for word in text.split()]] += 1
    return F.normalize(counts_KW @ vectors_WD, dim=1)


def learn(world: World, config: RewardConfig, directory: Path) -> dict[str, Any]:
    """One reward, from the snapshot to its last checkpoint; seconds by part, and how good it is."""
    clock = Clock()
    data = world.data(clock)
    with clock.part("start"):
        learner = RewardLearner(data, config, seed=0)
    draw = learner._draw

    def timed_draw(step: int) -> Any:
        with clock.part("draw", within="products"):
            return draw(step)

    learner._draw = timed_draw  # type: ignore[method-assign]
    for step in range(config.steps):
        with clock.part("products"):
            learner.backward()
        with clock.part("update"):
            learner.update()
        if (step + 1) % max(config.steps // 10, 1) == 0:
            print(f"{step + 1} of {config.steps} steps, {clock.total_s:.1f} s", file=sys.stderr)
    with clock.part("measure"):
        validation = learner.validate()
        report = learner.calibration_report()
    with clock.part("save"):
        learner.save(directory / "checkpoint")
    held_out = learner.validation_indices
    scores = learner._validation_scores()
    assert scores is not None
    assert report is not None
    truth = world.fits_N[held_out].double().numpy()
    return {
        "wall_s": clock.total_s,
        "cpu_s": sum(clock.cpu_s.values()),
        "parts_wall_s": clock.wall_s,
        "parts_cpu_s": clock.cpu_s,
        "auc": float(auc(scores[0].astype(float), scores[1].astype(float))),
        "auc_truth": float(auc(scores[0].astype(float), truth)),
        "ece": report["ece"],
        "ece_calibrated": report["ece_calibrated"],
        **validation,
    }


def main(
    images: Annotated[int, typer.Option(help="Judged images.")] = 100_000,
    dim: Annotated[int, typer.Option(help="Numbers in a feature; 768 of ViT-L/14.")] = 768,
    heads: Annotated[
        str, typer.Option(help=f"Of {', '.join(HEADS)}; several with commas.")
    ] = "adapter,paper",
    ensemble: Annotated[int, typer.Option(help="Heads that are learned together.")] = 1,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 256,
    variants: Annotated[
        str, typer.Option(help="Of plain, fast (reward.fast) and bfloat16 (with reward.precision too).")
    ] = "fast,bfloat16",
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
    json: Annotated[Path | None, typer.Option(help="Where to write all numbers.")] = None,
) -> None:
    """Prints a Markdown table: seconds, their share by part, and the AUC on judged images kept from
    training."""
    use_cpu(threads)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        world = World(Path(temporary) / "features", images, dim, seed=0)
        for name in heads.split(","):
            for variant in variants.split(","):
                settings = {
                    **HEADS[name],
                    "fast": variant != "plain",
                    "precision": "bfloat16" if variant == "bfloat16" else "float32",
                }
                config = RewardConfig(
                    **settings, steps=steps, batch_size=batch, num_prompts=NUM_PROMPTS, ensemble=ensemble
                )
                results[f"{name}, {variant}"] = learn(world, config, Path(temporary))
    print(f"\n{describe('cpu')}; {images} judged images of {dim} numbers, {steps} steps of {batch}")
    print(f"The planted judge's own AUC, a ceiling: {world.ceiling:.3f}\n")
    rows = [
        [
            name,
            found["wall_s"],
            found["cpu_s"],
            *(f"{100 * found['parts_cpu_s'][part] / found['cpu_s']:.0f}%" for part in PARTS),
            f"{found['auc']:.3f}",
            f"{found['auc_truth']:.3f}",
        ]
        for name, found in results.items()
    ]
    print(table(["head", "wall s", "CPU s", *PARTS, "AUC", "AUC of the truth"], rows))
    write_json(json, "cpu", {"images": images, "dim": dim, "steps": steps, "batch": batch}, results)


if __name__ == "__main__":
    typer.run(main)
