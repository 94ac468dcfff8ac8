"""A run directory of small artifacts, as the stages leave it: votes, snapshot, reward, scores, model,
summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accord.artifacts import artifact_writer, read_manifest
from accord.feedback.snapshot import write_snapshot
from accord.feedback.store import FeedbackStore
from accord.feedback.tables import Candidate, Judgement

RATERS = ("ann", "bob")
GOOD = {
    "net_win": {"alignment": {"seen": {"value": 0.4, "low": 0.2, "high": 0.6, "n": 9}}},
    "fidelity": {"base": {"frechet": 200.0}, "aligned": {"frechet": 190.0}},
    "readable": {"base": {"value": 0.9}, "aligned": {"value": 0.9}},
    "diversity": {"base": {"value": 30.0}, "aligned": {"value": 27.0}},
    "change": {"aligned": {"second_reward": {"value": 0.02, "low": 0.01, "high": 0.03, "n": 9}}},
    "latency": {"base": {"seconds_per_image": 0.5}, "aligned": {"seconds_per_image": 0.55}},
    "reward": {"seen": {"auc": {"value": 0.75, "low": 0.6, "high": 0.9, "n": 50}}},
}


def write(directory: Path, kind: str, content: str, **inputs: str) -> str:
    """The digest of an artifact that holds one file."""
    with artifact_writer(directory, kind, inputs=inputs, config={}, seed=0) as temporary:
        (temporary / "content.txt").write_text(content)
    return read_manifest(directory).digest


def write_run(directory: Path, content: str = "weights", summary: dict[str, Any] | None = None) -> Path:
    """Two candidates, judged by two raters, and the models that were made of it."""
    candidates = write(directory / "candidates", "candidates", "images", model="b" * 64)
    with FeedbackStore(f"sqlite:///{directory / 'feedback.db'}") as store:
        images = {"ann": "1" * 64, "bob": "2" * 64}
        store.add_candidates(
            Candidate(image, "a red star", "colour", "seen", 0, 64, 64) for image in images.values()
        )
        for number, (image, rater) in enumerate((("ann", "ann"), ("ann", "bob"), ("bob", "bob"))):
            store.submit([Judgement(f"key {number}", images[image], "a red star", rater, "good")])
        snapshot = write_snapshot(
            store, directory / "snapshot", inputs={"candidates": candidates}, seed=0
        ).digest
    reward = write(directory / "reward", "reward_model", content, snapshot=snapshot, clip="c" * 64)
    scores = write(directory / "scores", "scores", "scores", candidates=candidates, reward=reward)
    aligned = write(directory / "aligned", "diffusion_model", content, model="b" * 64, scores=scores)
    if summary is not None:
        summary = {**summary, "digests": {"aligned": aligned, "reward": reward}}
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory
