"""Answers to comparisons in snapshots, and the pairs that are made of them and of judgements."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from accord.errors import FeedbackError
from accord.feedback import Campaigns, Candidate, ComparisonItem, FeedbackStore, Judgement
from accord.feedback.comparisons import Compared
from accord.feedback.lineage import affected_by
from accord.feedback.preferences import compared_pairs, judged_pairs
from accord.feedback.snapshot import (
    COMPARISONS_NAME,
    load_snapshot,
    load_snapshot_comparisons,
    write_snapshot,
)

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
MakeCandidate = Callable[..., Candidate]
MakeJudgement = Callable[..., Judgement]


def said(rater: str, answer: str, first: str = A, second: str = B, **change: str) -> Compared:
    values = {"prompt": "red star", "category": "colour", "question": "alignment", **change}
    return Compared(**values, first=(first,), second=(second,), rater=rater, answer=answer)


def test_answers_of_a_campaign_come_back_with_their_sides_put_right(url: str) -> None:
    """Each rater prefers the image with the smaller digest, on whichever side he is shown it."""
    items = [ComparisonItem("red star", [A], [B], "colour"), ComparisonItem("two hearts", [D], [C], "count")]
    with Campaigns(url) as campaigns:
        campaigns.create_comparison("pairs", "Title", items, judgements_per_item=2, seed=3)
        for rater in ("ann", "bob", "eve"):
            while (task := campaigns.lease("pairs", rater)) is not None:
                answer = "left" if task.images < task.right_images else "right"
                if rater == "bob" and task.prompt == "two hearts":
                    answer = "tie"
                campaigns.submit(task.task_id, rater, answer, idempotency_key=f"{rater} {task.task_id}")
        before = len(FeedbackStore(url).compared())
        campaigns.exclude("eve", "test")
    with FeedbackStore(url) as store:
        found = store.compared()
        assert {item.rater for item in found} == {"ann", "bob"}
        assert before == 8
        assert {(item.first, item.second) for item in found} == {((A,), (B,)), ((D,), (C,))}
        assert {(i.prompt, i.rater, i.answer) for i in found if i.question == "alignment"} == {
            ("red star", "ann", "first"),
            ("red star", "bob", "first"),
            ("two hearts", "ann", "second"),
            ("two hearts", "bob", "tie"),
        }
        assert compared_pairs(found) == [("red star", A, B), ("two hearts", C, D)]


def test_stored_answers_are_a_complete_campaign_and_are_stored_once(url: str) -> None:
    items = [
        said("ann", "first"),
        said("bob", "second"),
        said("ann", "tie", C, D),
        said("ann", "first", A, C),
    ]
    with FeedbackStore(url) as store:
        assert store.add_compared("imported", "Imported", items) == 4
        assert store.add_compared("imported", "Imported", items[::-1]) == 0
        assert store.compared() == sorted(items)
        with pytest.raises(FeedbackError, match="choose another id"):
            store.add_compared("imported", "Imported", items[:2])
        with pytest.raises(FeedbackError, match=r"'ann' answered the comparison of .* twice"):
            store.add_compared("twice", "Imported", [said("ann", "first"), said("ann", "second")])
        with pytest.raises(FeedbackError, match="answer is 'left'"):
            store.add_compared("wrong", "Imported", [said("ann", "left")])
    with Campaigns(url) as campaigns:
        (campaign,) = campaigns.campaigns()
        assert (campaign.num_tasks, campaign.num_answers, campaign.complete) == (3, 4, True)
        assert campaigns.lease("imported", "cat") is None, "nothing is left to answer"
        progress = campaigns.progress("imported")
        assert progress.preferences == {"alignment": {"first": 2, "second": 1, "tie": 1}}
        campaigns.exclude("bob", "test")
    with FeedbackStore(url) as store:
        assert {item.rater for item in store.compared()} == {"ann"}


def test_a_snapshot_holds_comparisons_of_its_images_and_of_named_campaigns(
    sqlite_store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement, tmp_path: Path
) -> None:
    sqlite_store.add_candidates(candidate(n) for n in range(2))
    sqlite_store.submit([judgement(0), judgement(1, "bad")])
    own = [candidate(n).image for n in range(2)]
    only = {(image, "red star") for image in own}
    plain = write_snapshot(sqlite_store, tmp_path / "plain", inputs={}, seed=0, only=only)
    assert COMPARISONS_NAME not in plain.files
    assert load_snapshot_comparisons(tmp_path / "plain") == []
    sqlite_store.add_compared("own", "Own", [said("ann", "first", *own)])
    sqlite_store.add_compared("public", "Public", [said("eve", "second")])

    def written(name: str, **changes: object) -> list[Compared]:
        write_snapshot(sqlite_store, tmp_path / name, inputs={}, seed=0, **changes)  # type: ignore[arg-type]
        return load_snapshot_comparisons(tmp_path / name)

    assert written("own", only=only) == [said("ann", "first", *own)]
    both = written("both", only=only, campaigns=["public"])
    assert both == [said("ann", "first", *own), said("eve", "second")]
    assert written("all") == both
    first = write_snapshot(
        sqlite_store, tmp_path / "again", inputs={}, seed=0, only=only, campaigns=["public"]
    )
    assert first.digest == write_snapshot(sqlite_store, tmp_path / "all", inputs={}, seed=0).digest
    with pytest.raises(FeedbackError, match=r"no campaign of comparisons 'other'.*: own, public"):
        written("wrong", campaigns=["other"])
    # A rater can be followed to what his comparisons went into.
    assert {item.path.name for item in affected_by("eve", tmp_path).affected} == {"both", "all", "again"}


def test_a_snapshot_of_comparisons_alone(sqlite_store: FeedbackStore, tmp_path: Path) -> None:
    with pytest.raises(FeedbackError, match="holds no judgements"):
        write_snapshot(sqlite_store, tmp_path / "s", inputs={}, seed=0)
    sqlite_store.add_compared("public", "Public", [said("eve", "second")])
    write_snapshot(sqlite_store, tmp_path / "s", inputs={}, seed=0)
    assert load_snapshot(tmp_path / "s").empty
    assert load_snapshot_comparisons(tmp_path / "s") == [said("eve", "second")]


def test_compared_pairs_by_hand() -> None:
    answers = [
        said("ann", "first"),  # A > B: two raters of three, one of whom said it from the other side
        said("bob", "second", B, A),
        said("cat", "second"),
        said("ann", "first", A, C),  # A and C: undecided
        said("bob", "second", A, C),
        said("ann", "second", C, D),  # D > C: ann answered twice, but has one voice
        said("ann", "first", D, C),
        said("bob", "tie", C, D),
        said("ann", "second", question="fidelity", prompt="x"),
    ]
    assert compared_pairs(answers) == [("red star", A, B), ("red star", D, C)]
    assert compared_pairs(answers, "fidelity") == [("x", B, A)]
    # ann three times against one each of two others: one voice against two
    loud = [said("ann", "first"), said("ann", "second", B, A), said("bob", "second"), said("cat", "second")]
    assert compared_pairs(loud) == [("red star", B, A)]


def test_sets_of_images_are_paired_each_with_each() -> None:
    item = Compared("star", "x", "alignment", (A, B), (C, D), "ann", "second")
    assert compared_pairs([item]) == [("star", C, A), ("star", C, B), ("star", D, A), ("star", D, B)]


def snapshot(rows: list[tuple[str, str, float | None, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["image", "prompt", "label", "weight"])


def test_judged_pairs_use_every_decided_image_and_no_other() -> None:
    rows = [(f"good {n}", "star", 1.0, 1.0) for n in range(2)] + [
        (f"bad {n}", "star", 0.0, 0.4) for n in range(5)
    ]
    rows += [("unsure", "star", 1.0, 0.0), ("none", "star", None, 0.0)]  # type: ignore[list-item]
    rows += [("alone", "heart", 1.0, 1.0), ("alike", "heart", 1.0, 1.0)]
    pairs = judged_pairs(snapshot(rows), seed=0)  # type: ignore[arg-type]
    assert len(pairs) == 5
    assert {pair[0] for pair in pairs} == {"star"}
    assert sorted(pair[2] for pair in pairs) == [f"bad {n}" for n in range(5)]
    assert {pair[1] for pair in pairs} == {"good 0", "good 1"}
    assert judged_pairs(snapshot(rows[::-1]), seed=0) == pairs  # type: ignore[arg-type]
    assert judged_pairs(snapshot(rows), seed=1) != pairs  # type: ignore[arg-type]
