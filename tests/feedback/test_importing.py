"""Public files of feedback with stated columns."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from accord.cli.feedback import app
from accord.errors import ConfigError, FeedbackError
from accord.feedback import Campaigns, FeedbackStore
from accord.feedback.import_images import ImageSource
from accord.feedback.importing import ImportColumns, import_columns
from accord.feedback.preferences import compared_pairs
from accord.images import ImageFolder


def picture(value: int, kind: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 0)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    return ImageFolder(tmp_path / "images")


@pytest.fixture
def source(folder: ImageFolder, tmp_path: Path) -> ImageSource:
    (tmp_path / "data").mkdir()
    for n in range(4):
        (tmp_path / "data" / f"{n}.jpg").write_bytes(picture(60 * n))
    return ImageSource(folder, tmp_path / "data", 8)


PICK_A_PIC = ImportColumns(
    prompt="caption", image_0="jpg_0", image_1="jpg_1", label_0="label_0", label_1="label_1", rater="user_id"
)


def pick_a_pic() -> list[dict[str, object]]:
    def row(**change: object) -> dict[str, object]:
        values = {"caption": "a cat", "jpg_0": picture(0), "jpg_1": picture(90), "user_id": 7, "model_0": "x"}
        return {**values, "label_0": 1.0, "label_1": 0.0, **change}

    return [
        row(),
        row(user_id=8, label_0=0.0, label_1=1.0),
        row(user_id=9, label_0=0.5, label_1=0.5),
        row(caption="a dog", jpg_1=picture(200), label_0=0.0, label_1=1.0),
        row(jpg_0=b"no image"),
        row(caption=None),
        row(caption="a hen", jpg_1=picture(0)),
        row(label_0=0.0, label_1=1.0),  # user 7 again on the same images
        row(jpg_0=picture(90), jpg_1=picture(0)),  # ... and from the other side
        row(caption="a cow", label_0=float("nan")),
    ]


def test_preferences_with_images_as_bytes_become_comparisons(
    sqlite_store: FeedbackStore, source: ImageSource, folder: ImageFolder, tmp_path: Path
) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(pick_a_pic()), path)
    report, campaign = import_columns(sqlite_store, path, PICK_A_PIC, source)
    assert (report.new_judgements, report.known_judgements) == (4, 0)
    reasons = {item.line: item.reason for item in report.rejected}
    expected = {
        5: "no image that we know",
        6: "lacks caption",
        7: "are the same image",
        8: "'7' compared these images of this prompt before, in 1",
        9: "'7' compared these images of this prompt before, in 1",
        10: "this row has no label",
    }
    assert reasons.keys() == expected.keys()
    for line, part in expected.items():
        assert part in reasons[line]
    found = sqlite_store.compared()
    assert sorted(i.answer for i in found if i.prompt == "a cat") == ["first", "second", "tie"]
    pairs = compared_pairs(found)
    assert [prompt for prompt, _, _ in pairs] == ["a dog"], "of the cat raters are undecided"
    chosen, rejected = (folder.load(digest) for digest in pairs[0][1:])
    assert chosen.shape == rejected.shape == (8, 8, 3)
    assert abs(int(chosen[4, 4, 0]) - 200) < 10 > int(rejected[4, 4, 0])
    # Again: nothing is new, and it is the same campaign.
    again, same = import_columns(sqlite_store, path, PICK_A_PIC, source)
    assert (again.new_judgements, again.known_judgements, same) == (0, 4, campaign)
    again, same = import_columns(sqlite_store, path.rename(tmp_path / "b.parquet"), PICK_A_PIC, source)
    assert (again.new_judgements, same) == (0, campaign)
    with Campaigns(f"sqlite:///{tmp_path}/feedback.db") as campaigns:
        assert [c.campaign_id for c in campaigns.campaigns()] == [campaign]


def test_columns_of_lists_and_images_as_paths(
    sqlite_store: FeedbackStore, source: ImageSource, tmp_path: Path
) -> None:
    """As HPD's files have it: one JSON array, both images in one column, both labels in another."""
    columns = ImportColumns(
        prompt="prompt",
        image_0="image_path.0",
        image_1="image_path.1",
        label_0="human_preference.0",
        label_1="human_preference.1",
        question="fidelity",
    )
    rows = [
        {"prompt": "a cat", "image_path": ["0.jpg", "1.jpg"], "human_preference": [0, 1]},
        {"prompt": "a dog", "image_path": ["2.jpg"], "human_preference": [1, 0]},
        {"prompt": "a hen", "image_path": ["2.jpg", "../secret.jpg"], "human_preference": [1, 0]},
        {"prompt": "a cow", "image_path": ["2.jpg", "9.jpg"], "human_preference": [1, 0]},
        {"prompt": "a pig", "image_path": ["2.jpg", "https://x.test/1.jpg"], "human_preference": [1, 0]},
        "a string",
    ]
    (tmp_path / "secret.jpg").write_bytes(picture(9))
    (tmp_path / "train.json").write_text(json.dumps(rows))
    report, _ = import_columns(sqlite_store, tmp_path / "train.json", columns, source)
    assert report.new_judgements == 1
    parts = (
        "lacks image_path.1",
        "lies outside",
        "there is no image '9.jpg'",
        "download it",
        "no JSON object",
    )
    assert [item.line for item in report.rejected] == [2, 3, 4, 5, 6]
    for item, part in zip(report.rejected, parts, strict=True):
        assert part in item.reason
    (item,) = sqlite_store.compared()
    assert (item.answer, item.question, item.rater) == ("second", "fidelity", "imported")


def test_ranks_become_comparisons_within_their_group(
    sqlite_store: FeedbackStore, source: ImageSource, tmp_path: Path
) -> None:
    """As ImageReward's files have it: a row an image, ranked among those of its prompt."""
    columns = ImportColumns(prompt="prompt", image="image_path", rank="rank", group="prompt_id")
    lines = ["prompt_id,prompt,image_path,rank,comment"]
    lines += [f"p1,a cat,{n}.jpg,{rank}," for n, rank in ((0, 2), (1, 1), (2, 2))]
    lines += ["p2,a cat,3.jpg,1,", "p3,a dog,0.jpg,first,", "p3,a dog,1.jpg,1"]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    report, _ = import_columns(sqlite_store, tmp_path / "rows.csv", columns, source)
    assert report.new_judgements == 3
    assert [(item.line, item.reason.split(":")[0]) for item in report.rejected] == [
        (5, "the only image of its group"),
        (6, "rank is 'first'; expected a number"),
        (7, "expected 5 fields"),
    ]
    found = sqlite_store.compared()
    assert sorted(item.answer for item in found) == ["first", "second", "tie"]
    best = source.take("1.jpg").digest
    assert {pair[1] for pair in compared_pairs(found)} == {best}


def test_verdicts_become_judgements(
    sqlite_store: FeedbackStore, source: ImageSource, folder: ImageFolder, tmp_path: Path
) -> None:
    columns = ImportColumns(
        prompt="text", image="file", verdict="liked", rater="who", category="kind", skip=("unsure",)
    )
    known = source.take("3.jpg")
    rows = [
        {"text": "a cat", "file": "0.jpg", "liked": True, "who": "ann", "kind": "animals"},
        {"text": "a cat", "file": {"path": "1.jpg", "bytes": None}, "liked": 0, "who": 12},
        {"text": "a cat", "file": known.digest, "liked": "Unsure", "who": "ann", "kind": "animals"},
        {"text": "a cat", "file": "0.jpg", "liked": "perhaps", "who": "ann", "kind": "animals"},
        {"text": "a cat", "file": "0.jpg", "liked": False, "who": "ann", "kind": "animals"},
        {"text": "a cat", "file": 3, "liked": False, "who": "bob", "kind": "animals"},
        {"text": "a cat", "file": "0.jpg", "liked": True, "who": "bob", "kind": "beasts"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, campaign = import_columns(sqlite_store, path, columns, source)
    assert campaign == ""
    assert (report.new_candidates, report.new_judgements) == (3, 3)
    parts = ("verdict is 'perhaps'; expected one of good, 1", "verdict", "the image is int", "category")
    assert [item.line for item in report.rejected] == [4, 5, 6, 7]
    for item, part in zip(report.rejected, parts, strict=True):
        assert part in item.reason
    said = {(row.rater, row.verdict) for row in sqlite_store.judgements()}
    assert said == {("ann", "good"), ("12", "bad"), ("ann", "skip")}
    for candidate in sqlite_store.candidates():
        assert (candidate.width, candidate.height) == (8, 8)
        assert candidate.image in folder
    again, _ = import_columns(sqlite_store, path, columns, source)
    assert (again.new_candidates, again.new_judgements, again.known_judgements) == (0, 0, 3)


def test_columns_that_do_not_go_together_or_are_not_there(
    sqlite_store: FeedbackStore, source: ImageSource, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="stated are none"):
        ImportColumns(prompt="p", image="i")
    with pytest.raises(ValueError, match="stated are verdict, rank"):
        ImportColumns(prompt="p", image="i", verdict="v", rank="r")
    with pytest.raises(ValueError, match="label_0 needs the column\\(s\\) image_1"):
        ImportColumns(prompt="p", image_0="i", label_0="l")
    with pytest.raises(ValueError, match="it needs rank"):
        ImportColumns(prompt="p", image="i", verdict="v", group="g")
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"caption": ["a cat"], "jpg_0": [picture(0)]}), path)
    with pytest.raises(FeedbackError, match=r"lacks the column\(s\) user_id.*it has caption, jpg_0"):
        import_columns(sqlite_store, path, PICK_A_PIC, source)
    with pytest.raises(FeedbackError, match="unknown format 'arrow'"):
        import_columns(sqlite_store, tmp_path / "rows.arrow", PICK_A_PIC, source)
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(FeedbackError, match="no array of rows"):
        import_columns(sqlite_store, tmp_path / "rows.json", PICK_A_PIC, source)


def test_a_csv_whose_head_cannot_be_read(
    sqlite_store: FeedbackStore, source: ImageSource, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text('"prompt"x,image,rank\n')
    with pytest.raises(FeedbackError, match=r"rows\.csv cannot be read as csv"):
        import_columns(
            sqlite_store,
            tmp_path / "rows.csv",
            ImportColumns(prompt="prompt", image="image", rank="rank"),
            source,
        )


def test_from_the_command_line(source: ImageSource, folder: ImageFolder, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/cli.db"
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(pick_a_pic()[:5]), path)
    (tmp_path / "columns.yaml").write_text(
        "prompt: caption\nimage_0: jpg_0\nimage_1: jpg_1\nlabel_0: label_0\n"
    )
    command = ["import", str(path), "--url", url, "--columns", str(tmp_path / "columns.yaml")]
    command += [
        "--column",
        "rater=user_id",
        "--images",
        str(folder.root),
        "--campaign",
        "pick",
        "--size",
        "8",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "4 new comparisons, 0 known before, 1 rows refused; campaign pick" in done.stdout
    assert f"{path}:5: the file is no image that we know" in done.stderr
    with FeedbackStore(url) as store:
        assert {item.rater for item in store.compared()} == {"7", "8", "9"}
    lacking = CliRunner().invoke(app, [*command[:4], "--column", "prompt=caption"])
    assert lacking.exit_code == 2
    assert "state exactly one of verdict, rank and label_0" in lacking.stderr
    wrong = CliRunner().invoke(app, [*command, "--column", "rater"])
    assert wrong.exit_code == 2
    assert "expected WHAT=COLUMN" in wrong.stderr
    nowhere = CliRunner().invoke(app, command[:6])
    assert nowhere.exit_code == 2
    assert "in which folder the images are to be kept" in nowhere.stderr


def test_an_unknown_column_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    from accord.cli.public_feedback import read_columns

    with pytest.raises(ConfigError, match=r"promt.*prompt"):
        read_columns(None, ["promt=caption"])
    stated = read_columns(None, ["prompt=p", "image=i", "verdict=v", "good=yes,ja", "bad=no,nein"])
    assert (stated.good, stated.bad) == (("yes", "ja"), ("no", "nein"))


def test_images_are_cropped_about_their_middle(folder: ImageFolder, tmp_path: Path) -> None:
    pixels = np.zeros((16, 48, 3), dtype=np.uint8)
    pixels[:, 16:32] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    kept = ImageSource(folder, tmp_path, 16).take(buffer.getvalue())
    assert (kept.width, kept.height) == (16, 16)
    assert (folder.load(kept.digest) == 255).all()
    whole = ImageSource(folder, tmp_path).take(buffer.getvalue())
    assert (whole.width, whole.height) == (48, 16)
