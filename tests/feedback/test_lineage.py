from collections.abc import Callable
from pathlib import Path

import pytest

from accord.artifacts import artifact_writer, read_manifest
from accord.errors import ArtifactError
from accord.feedback import Candidate, FeedbackStore, Judgement
from accord.feedback.lineage import affected_by
from accord.feedback.snapshot import load_snapshot_judgements, load_snapshot_raters, write_snapshot

MakeCandidate = Callable[..., Candidate]
MakeJudgement = Callable[..., Judgement]


def _artifact(path: Path, kind: str, **inputs: str) -> str:
    with artifact_writer(path, kind, inputs=inputs, config={}, seed=0) as temporary:
        (temporary / "content").write_text(str(path))
    return read_manifest(path).digest


def test_from_a_rater_to_models(
    sqlite_store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    sqlite_store.add_candidates([candidate(1), candidate(2)])
    sqlite_store.submit([judgement(1, rater="ann")])
    before = write_snapshot(sqlite_store, runs / "a" / "snapshot", inputs={}, seed=0).digest
    sqlite_store.submit([judgement(1, "bad", "eve"), judgement(2, rater="eve")])
    with_eve = write_snapshot(sqlite_store, runs / "b" / "snapshot", inputs={}, seed=0).digest
    _artifact(runs / "a" / "reward", "reward_model", snapshot=before)
    # Named so that what is made of it comes first in the directory.
    reward = _artifact(runs / "b" / "z_reward", "reward_model", snapshot=with_eve, clip="c" * 64)
    _artifact(runs / "b" / "aligned", "diffusion_model", reward=reward, base="d" * 64)
    (runs / "old").mkdir()
    (runs / "old" / "manifest.json").write_text("{")
    found = affected_by("eve", runs)
    assert [(item.path.relative_to(runs).as_posix(), item.because) for item in found.affected] == [
        ("b/snapshot", "2 of its judgements are from eve"),
        ("b/z_reward", "made from its snapshot"),
        ("b/aligned", "made from its reward"),
    ]
    assert [path.name for path, _ in found.unknown] == ["old"]
    assert len(affected_by("ann", runs).affected) == 5
    assert affected_by("nobody", runs).affected == ()
    with pytest.raises(ArtifactError, match="no directory"):
        affected_by("eve", tmp_path / "nowhere")


def test_a_snapshot_of_a_version_that_did_not_note_raters(tmp_path: Path) -> None:
    _artifact(tmp_path / "snapshot", "feedback_snapshot")
    found = affected_by("eve", tmp_path)
    assert found.affected == ()
    assert found.unknown == ((tmp_path / "snapshot", "a snapshot of a version that did not note raters"),)


def test_what_a_snapshot_says_of_raters(
    sqlite_store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement, tmp_path: Path
) -> None:
    sqlite_store.add_candidates(candidate(number) for number in range(30))
    for number in range(30):
        given = [("ann", "good"), ("bob", "good"), ("eve", "bad")]
        sqlite_store.submit(judgement(number, verdict, rater) for rater, verdict in given)
    write_snapshot(sqlite_store, tmp_path / "s", inputs={}, seed=0, aggregation="weighted")
    raters = load_snapshot_raters(tmp_path / "s")
    assert raters["rater"].tolist() == ["ann", "bob", "eve"]
    assert raters["judgements"].tolist() == [30, 30, 30]
    assert raters["reliability"][2] < 0.1 < 0.9 < raters["reliability"][0]
    assert len(load_snapshot_judgements(tmp_path / "s")) == 90
    write_snapshot(sqlite_store, tmp_path / "s", inputs={}, seed=0)
    assert load_snapshot_raters(tmp_path / "s")["reliability"].isna().all()
