import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from accord.cli import app
from accord.feedback import Campaigns, Candidate, FeedbackStore

MakeCandidate = Callable[..., Candidate]


@pytest.fixture
def url(tmp_path: Path, sqlite_store: FeedbackStore, candidate: MakeCandidate) -> str:
    sqlite_store.add_candidates(candidate(number) for number in range(6))
    return f"sqlite:///{tmp_path}/feedback.db"


def run(*arguments: str, url: str = "", status: int = 0) -> Result:
    environment = {"ACCORD_DATABASE_URL": url, "COLUMNS": "200"}
    result = CliRunner().invoke(app, ["feedback", *arguments], env=environment)
    assert result.exit_code == status, result.output
    return result


def _judge(url: str, rater: str, verdict: str) -> None:
    with Campaigns(url) as campaigns:
        while (task := campaigns.lease("c", rater)) is not None:
            key = f"{rater} {task.task_id}"
            campaigns.submit(task.task_id, rater, [verdict] * len(task.images), idempotency_key=key)


def test_a_campaign_from_the_terminal(url: str, tmp_path: Path) -> None:
    made = run("campaign", "create", "c", "--title", "Red [bold]stars", "--judgements", "2", url=url)
    assert made.stdout == "c: 2 tasks, 4 answers wanted\n"
    _judge(url, "ann", "good")
    _judge(url, "eve", "bad")
    listed = run("campaign", "list", url=url).stdout
    assert "Red [bold]stars" in listed
    status = run("status", "c", url=url).stdout
    assert "4 of 4 answers by 2 raters; 2 of 2 tasks done" in status
    assert "50.0%" in status
    assert "-0.833" in status  # alpha of full disagreement
    assert json.loads(run("status", "c", "--json", url=url).stdout)["answers"] == 4
    assert "eve" in run("raters", "c", url=url).stdout
    snapshot = tmp_path / "runs" / "snapshot"
    assert str(snapshot) in run("snapshot", str(snapshot), "--aggregation", "weighted", url=url).stdout
    assert "feedback_snapshot" in run("affected", "eve", "--runs", str(tmp_path / "runs")).stdout
    assert "nothing under" in run("affected", "bob", "--runs", str(tmp_path / "runs")).stdout
    assert "2 places are free" in run("exclude", "eve", "--reason", "a robot", url=url).stdout
    assert "excluded: a robot" in run("raters", "c", url=url).stdout
    assert "2 of 4 answers" in run("status", "c", url=url).stdout
    back = run("include", "eve", "--reason", "it was not her", url=url).stdout
    assert "eve rates again; 2 answers in campaigns" in back
    assert "4 of 4 answers" in run("status", "c", url=url).stdout
    assert "eve was not excluded" in run("include", "eve", "--reason", "again", url=url).stdout


def test_gold_and_comparisons(url: str, tmp_path: Path) -> None:
    gold = tmp_path / "gold.jsonl"
    gold.write_text(json.dumps({"image": f"{1:064x}", "prompt": "red star", "verdict": "good"}) + "\n")
    made = run("campaign", "create", "g", "--title", "T", "--gold", str(gold), url=url)
    assert made.stdout == "g: 3 tasks, 6 answers wanted\n"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "red star", "first": ["a"], "second": ["b"]}) + "\n")
    made = run("campaign", "create", "p", "--title", "T", "--comparison", str(pairs), url=url)
    assert made.stdout == "p: 2 tasks, 6 answers wanted\n"
    pairs.write_text(json.dumps({"prompt": "red star", "left": ["a"]}) + "\n")
    bad = run("campaign", "create", "q", "--title", "T", "--comparison", str(pairs), url=url, status=2)
    assert "pairs.jsonl, line 1: got an unexpected keyword argument 'left'" in bad.stderr


def test_export_and_import(url: str, tmp_path: Path) -> None:
    run("campaign", "create", "c", "--title", "T", "--judgements", "1", url=url)
    _judge(url, "ann", "good")
    path = tmp_path / "judgements.csv"
    assert run("export", str(path), url=url).stdout.startswith("6 judgements in ")
    path.write_text(path.read_text() + "one,two\n")
    other = f"sqlite:///{tmp_path}/other.db"
    done = run("import", str(path), url=other, status=1)
    assert "6 new judgements, 0 known before, 1 rows refused; 6 new images" in done.stdout
    assert "judgements.csv:8: expected 11 fields" in done.stderr


def test_errors(url: str) -> None:
    assert "no campaign 'nothing'" in run("status", "nothing", url=url, status=2).stderr
    secret = run("campaign", "list", url="postgresql://u:hunter2@127.0.0.1:1/x", status=2)
    assert "hunter2" not in secret.output


def test_snapshot_and_export_replace_only_what_they_wrote_and_only_when_told(
    url: str, tmp_path: Path
) -> None:
    run("campaign", "create", "c", "--title", "x", "--judgements", "1", url=url)
    _judge(url, "ann", "good")
    snapshot, table, mine = tmp_path / "snapshot", tmp_path / "all.csv", tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for command, path in (("snapshot", snapshot), ("export", table)):
        run(command, str(path), url=url)
        assert "give --overwrite" in run(command, str(path), url=url, status=2).stderr
        run(command, str(path), "--overwrite", url=url)
    for overwrite in ([], ["--overwrite"]):
        refused = run("snapshot", str(mine), *overwrite, url=url, status=2)
        assert "holds something else than a feedback snapshot" in refused.stderr
        run("export", str(mine), *overwrite, url=url, status=2)
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
