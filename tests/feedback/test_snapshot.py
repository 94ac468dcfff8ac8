import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from accord.artifacts import read_manifest, sha256_file
from accord.errors import ArtifactError, FeedbackError
from accord.feedback import Candidate, FeedbackStore, Judgement
from accord.feedback.snapshot import load_snapshot, snapshot_distribution, snapshot_raters, write_snapshot

MakeCandidate = Callable[..., Candidate]
MakeJudgement = Callable[..., Judgement]


def _judge(store: FeedbackStore, judgement: MakeJudgement) -> None:
    store.submit(
        [
            judgement(1, "good", "ann"),
            judgement(1, "good", "bob"),
            judgement(1, "bad", "cat"),
            judgement(2, "good", "ann"),
            judgement(2, "bad", "bob"),
            judgement(2, "skip", "cat"),
            judgement(3, "skip", "ann"),
            judgement(4, "bad", "ann"),
            judgement(1, "bad", "ann", "two stars"),
        ]
    )


@pytest.fixture
def judged(sqlite_store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement) -> FeedbackStore:
    new = [candidate(number) for number in (5, 4, 3, 2, 1)]
    sqlite_store.add_candidates([*new, candidate(1, "two stars", "count")])
    _judge(sqlite_store, judgement)
    return sqlite_store


def test_snapshot(judged: FeedbackStore, tmp_path: Path) -> None:
    manifest = write_snapshot(judged, tmp_path / "snapshot", inputs={"candidates": "c" * 64}, seed=7)
    assert (manifest.kind, manifest.inputs, manifest.seed) == (
        "feedback_snapshot",
        {"candidates": "c" * 64},
        7,
    )
    assert manifest.config == {"aggregation": "majority"}
    frame = load_snapshot(tmp_path / "snapshot")
    assert list(frame.columns) == [
        "image", "prompt", "category", "split", "good", "bad", "skip", "label", "weight",
    ]  # fmt: skip
    rows = [
        (int(str(image), 16), prompt, category, good, bad, skip, str(label), weight)
        for image, prompt, category, _, good, bad, skip, label, weight in frame.itertuples(index=False)
    ]
    assert rows == [
        (1, "red star", "colour", 2, 1, 0, "1.0", 1.0),
        (1, "two stars", "count", 0, 1, 0, "0.0", 1.0),
        (2, "red star", "colour", 1, 1, 1, "nan", 0.0),  # a tie
        (3, "red star", "colour", 0, 0, 1, "nan", 0.0),  # skipped by all
        (4, "red star", "colour", 0, 1, 0, "0.0", 1.0),
    ]  # and not 5, which nobody judged
    assert snapshot_distribution(frame) == judged.distribution()


def test_who_judged_and_how_much_they_agree(judged: FeedbackStore, tmp_path: Path) -> None:
    write_snapshot(judged, tmp_path / "snapshot", inputs={}, seed=7)
    found = snapshot_raters(tmp_path / "snapshot")
    # By hand: good, good, bad and good, bad are comparable. D_o = 4 / 5, D_e = 12 / (5 * 4).
    assert found.pop("alpha") == pytest.approx(1 - (4 / 5) / (12 / 20))
    assert found == {
        "count": 3,
        "items": 2,
        "by_rater": {
            "ann": {"judgements": 5, "good": 0.4, "bad": 0.4, "skip": 0.2},
            "bob": {"judgements": 2, "good": 0.5, "bad": 0.5, "skip": 0.0},
            "cat": {"judgements": 2, "good": 0.0, "bad": 0.5, "skip": 0.5},
        },
    }


def test_the_same_judgements_have_the_same_digest(judged: FeedbackStore, url: str, tmp_path: Path) -> None:
    """Whatever the order of arrival, the batches and the database."""
    first = write_snapshot(judged, tmp_path / "first", inputs={}, seed=0)
    shuffled, candidates = judged.judgements(), judged.candidates()
    random.Random(1).shuffle(shuffled)
    with FeedbackStore(url) if "postgres" in url else FeedbackStore(f"sqlite:///{tmp_path}/2.db") as other:
        other.add_candidates(reversed(candidates))
        for judgement in shuffled:
            other.submit([judgement])
        assert other.judgements() != judged.judgements()
        second = write_snapshot(other, tmp_path / "second", inputs={"else": "e" * 64}, seed=1)
        assert second.digest == first.digest
        paths = [tmp_path / name / "snapshot.parquet" for name in ("first", "second")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        other.submit([Judgement("one more", f"{4:064x}", "red star", "dan", "good")])
        third = write_snapshot(other, tmp_path / "second", inputs={}, seed=0)
    assert third.digest != first.digest
    assert load_snapshot(tmp_path / "second")["label"].isna().sum() == 3


def test_empty_store(sqlite_store: FeedbackStore, candidate: MakeCandidate, tmp_path: Path) -> None:
    sqlite_store.add_candidates([candidate(1)])
    with pytest.raises(FeedbackError, match="holds no judgements"):
        write_snapshot(sqlite_store, tmp_path / "snapshot", inputs={}, seed=0)
    with pytest.raises(FeedbackError, match="unknown aggregation 'median'"):
        write_snapshot(sqlite_store, tmp_path / "snapshot", inputs={}, seed=0, aggregation="median")
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("feedback.db")] == []


def test_tampered_snapshot(judged: FeedbackStore, tmp_path: Path) -> None:
    directory = tmp_path / "snapshot"
    write_snapshot(judged, directory, inputs={}, seed=0)
    path = directory / "snapshot.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(ArtifactError, match=r"snapshot\.parquet was changed or damaged"):
        load_snapshot(directory)
    path.write_bytes(data[:-10])
    with pytest.raises(ArtifactError, match=r"snapshot\.parquet was changed or damaged"):
        load_snapshot(directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["snapshot.parquet"] = sha256_file(path)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="its digest is not that of the files"):
        load_snapshot(directory)
    path.unlink()
    (directory / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="is no artifact"):
        load_snapshot(directory)


def test_an_artifact_that_is_no_snapshot(judged: FeedbackStore, tmp_path: Path) -> None:
    from accord.artifacts import artifact_writer

    with artifact_writer(tmp_path / "other", "scores", inputs={}, config={}, seed=0) as temporary:
        (temporary / "snapshot.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="is a 'scores'; expected a 'feedback_snapshot'"):
        load_snapshot(tmp_path / "other")
    with artifact_writer(tmp_path / "other", "feedback_snapshot", inputs={}, config={}, seed=0) as temporary:
        (temporary / "snapshot.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="is no Parquet file"):
        load_snapshot(tmp_path / "other")
    assert read_manifest(tmp_path / "other").kind == "feedback_snapshot"


def test_a_snapshot_is_of_the_candidates_that_it_cites(judged: FeedbackStore, tmp_path: Path) -> None:
    """Another run's images and votes in the same store are not in it."""
    [wanted, *_] = [key for key in judged.judged() if key[1] == "two stars"]
    write_snapshot(judged, tmp_path / "snapshot", inputs={}, seed=0, only={wanted})
    frame = load_snapshot(tmp_path / "snapshot")
    assert list(zip(frame["image"], frame["prompt"], strict=True)) == [wanted]
    assert list(snapshot_raters(tmp_path / "snapshot")["by_rater"]) == ["ann"]
