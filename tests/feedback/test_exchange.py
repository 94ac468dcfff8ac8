import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from accord.errors import FeedbackError
from accord.feedback import Campaigns, Candidate, FeedbackStore, Judgement
from accord.feedback.exchange import FORMATS, export_judgements, import_judgements
from accord.images import ImageFolder, encode_png

MakeCandidate = Callable[..., Candidate]

PROMPTS = ("red star", 'zwei "Sterne", ★\n=2+2')


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    return ImageFolder(tmp_path / "images")


@pytest.fixture
def judged(sqlite_store: FeedbackStore, images: ImageFolder, tmp_path: Path) -> FeedbackStore:
    """Six candidates of three images, judged in a campaign by two raters, one of whom took one back."""
    for number in range(3):
        digest = images.put(encode_png(np.full((8, 8, 3), number, dtype=np.uint8)))
        sqlite_store.add_candidates(
            Candidate(digest, prompt, "count", "seen", number, 8, 8, "c" * 64) for prompt in PROMPTS
        )
    with Campaigns(f"sqlite:///{tmp_path}/feedback.db") as campaigns:
        campaigns.create_alignment("c", "Title", judgements_per_item=2)
        for rater in ("ann", "bob"):
            while (task := campaigns.lease("c", rater)) is not None:
                verdicts = ["good", "bad", "skip"][: len(task.images)]
                campaigns.submit(task.task_id, rater, verdicts, idempotency_key=f"{rater} {task.task_id}")
        campaigns.undo("c", "bob", idempotency_key="undo")
    return sqlite_store


def _content(store: FeedbackStore) -> tuple[list[Candidate], list[Judgement]]:
    judgements = sorted(store.judgements(), key=lambda row: row.idempotency_key)
    judged = {(row.image, row.prompt) for row in judgements}
    return [c for c in store.candidates() if (c.image, c.prompt) in judged], judgements


@pytest.mark.parametrize("kind", FORMATS)
def test_round_trip(judged: FeedbackStore, images: ImageFolder, tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("folder" if kind == "imagefolder" else f"judgements.{kind}")
    assert export_judgements(judged, path, images=images) == 9  # of 12 three were taken back
    with FeedbackStore(f"sqlite:///{tmp_path}/other.db") as other:
        others = ImageFolder(tmp_path / "other-images")
        report = import_judgements(other, path, images=others)
        assert (report.new_candidates, report.new_judgements, report.rejected) == (6, 9, ())
        assert _content(other) == _content(judged)
        again = import_judgements(other, path, images=others)
        assert (again.new_candidates, again.new_judgements, again.known_judgements) == (0, 0, 9)
        second = tmp_path / f"second{path.suffix}"
        export_judgements(other, second, images=images)
        name = "metadata.jsonl" if kind == "imagefolder" else ""
        assert (second / name).read_bytes() == (path / name).read_bytes()
        if kind == "imagefolder":
            assert all(c.image in others for c in other.candidates())


def _valid(**change: object) -> dict[str, object]:
    row = {"image": "a" * 64, "prompt": "star", "rater": "ann", "verdict": "good", "width": 8, "height": 8}
    return {**row, **change}


def test_rows_that_cannot_be_imported_as_json(sqlite_store: FeedbackStore, tmp_path: Path) -> None:
    lines = [
        json.dumps(_valid()),
        "{",
        "[]",
        json.dumps(_valid(verdict="fine", rater="bob")),
        json.dumps(_valid(rater=None)),
        "",
        json.dumps(_valid(image="b" * 64, width=None)),
        json.dumps(_valid(rater="cat", width=9)),  # contradicts the first line
        json.dumps(_valid(rater="dan")),
        json.dumps(_valid(verdict="bad")),  # ann said good before
        json.dumps(_valid(rater="dan")),
    ]
    lines += [json.dumps(_valid(image=["x"])), json.dumps(_valid(category={}, rater="f"))]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"image": "\xff"}\n')
    report = import_judgements(sqlite_store, path)
    assert (report.new_candidates, report.new_judgements, report.known_judgements) == (1, 2, 1)
    found = {item.line: item.reason for item in report.rejected}
    expected = {
        2: "no JSON",
        3: "no JSON object",
        4: "unknown verdict 'fine'",
        5: "lacks rater",
        7: "lacks width",
        8: "9 x 8 pixels",
        10: "differs in verdict",
        12: "image is ['x']",
        13: "category is {}",
        14: "no JSON",
    }
    assert found.keys() == expected.keys()
    for line, part in expected.items():
        assert part in found[line]
    assert [row.rater for row in sqlite_store.judgements()] == ["ann", "dan"]


def test_rows_that_cannot_be_imported_as_csv(sqlite_store: FeedbackStore, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"\xef\xbb\xbfimage,prompt,rater,verdict,width,height,comment\n"
        + f"{'a' * 64},star,ann,good,8,8,fine\n".encode()
        + f"{'a' * 64},star,bob,good,8\n".encode()
        + f"{'a' * 64},star,cat,good,8,tall,\n".encode()
        + f"{'a' * 64},st\xffar,dan,good,8,8,\n".encode("latin-1")
        + f'{"a" * 64},"two\nlines",eve,bad,8,8,\n'.encode()
    )
    report = import_judgements(sqlite_store, path)
    assert (report.new_candidates, report.new_judgements) == (2, 2)
    assert [item.line for item in report.rejected] == [3, 4, 5]
    assert [
        next(
            text
            for text in ("expected 7 fields", "height is 'tall'", "not valid Unicode")
            if text in item.reason
        )
        for item in report.rejected
    ] == ["expected 7 fields", "height is 'tall'", "not valid Unicode"]
    path.write_text("image,prompt\n")
    with pytest.raises(FeedbackError, match=r"lacks the column\(s\) rater, verdict"):
        import_judgements(sqlite_store, path)


def test_rows_that_cannot_be_imported_as_parquet(sqlite_store: FeedbackStore, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [_valid(), _valid(rater="bob", verdict="?"), _valid(rater="", verdict="bad")]
    pq.write_table(pa.Table.from_pylist(rows), path)
    report = import_judgements(sqlite_store, path)
    assert report.new_judgements == 1
    assert [item.line for item in report.rejected] == [2, 3]
    path.write_text("no Parquet")
    with pytest.raises(FeedbackError, match="cannot be read as parquet"):
        import_judgements(sqlite_store, path)
    with pytest.raises(FeedbackError, match=r"unknown format 'xlsx'"):
        import_judgements(sqlite_store, tmp_path / "rows.xlsx")
    with pytest.raises(FeedbackError, match="cannot be read as csv"):
        import_judgements(sqlite_store, tmp_path / "nothing.csv")


def test_images_that_cannot_be_imported(judged: FeedbackStore, images: ImageFolder, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    export_judgements(judged, folder, images=images)
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[0]["file_name"] = "../secret.png"
    rows[1]["digest"] = "d" * 64
    rows[2]["judgements"] = "good"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with FeedbackStore(f"sqlite:///{tmp_path}/other.db") as other:
        report = import_judgements(other, folder, images=ImageFolder(tmp_path / "other-images"))
    assert [item.line for item in report.rejected] == [1, 2, 3]
    assert "expected a file in the folder" in report.rejected[0].reason
    assert "does not have the digest" in report.rejected[1].reason
    with pytest.raises(FeedbackError, match="not empty"):
        export_judgements(judged, folder, images=images)
    with pytest.raises(FeedbackError, match="in which folder"):
        export_judgements(judged, tmp_path / "new")
