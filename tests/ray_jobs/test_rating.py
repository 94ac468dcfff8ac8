"""Judging through the feedback service, which runs beside the job: by the panel over gRPC, by a person."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import stat
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from accord import rating
from accord.cli import PERSON
from accord.errors import AccordError, ConfigError
from accord.feedback import Campaigns, FeedbackStore
from accord.feedback.snapshot import load_snapshot_judgements, snapshot_raters
from accord.recipe import Recipe, load_recipe
from ray_jobs import collect, judge
from tests.conftest import ROOT
from tests.ray_jobs.processes import start_and_kill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMOKE = ROOT / "recipes" / "sandbox" / "smoke.yaml"
LOCAL = ["ray.local=true", "tracking.uri="]
BY_PERSON = [*LOCAL, "panel=null", "feedback.judgements_per_image=1", "feedback.rater=ann"]
WAIT_S = 120.0


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(SMOKE, LOCAL)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    """A run that has its images."""
    run_dir = tmp_path_factory.mktemp("collected") / "run"
    collect.run(recipe, run_dir)
    return run_dir


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, collected: Path) -> Path:
    """The same, judged without any interruption."""
    run_dir = shutil.copytree(collected, tmp_path_factory.mktemp("judged") / "run")
    judge.run(recipe, run_dir)
    return run_dir


def answers(run_dir: Path) -> int:
    """How many answers the run's campaign has."""
    if not (run_dir / "feedback" / "port").exists():  # written when the store has its tables
        return 0
    with Campaigns(f"sqlite:///{run_dir}/feedback.db") as campaigns:
        return sum(campaign.num_answers for campaign in campaigns.campaigns())


def started(run_dir: Path) -> list[int]:
    """Processes that were started for this run and are there still."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            output = os.readlink(path.parent / "fd" / "1")
        except OSError:
            continue
        if b"accord.children" in words and output.startswith(str(run_dir)):
            found.append(int(path.parent.name))
    return found


def wait_until_gone(run_dir: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while started(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_image_is_judged_by_each_of_three_raters(judged: Path, recipe: Recipe) -> None:
    frame = load_snapshot_judgements(judged / "snapshot")
    names = [f"{rating.TOKEN_NAME}/{name}" for name in rating.raters(recipe)]
    assert len(set(names)) == 3
    images = len(frame.drop_duplicates(["image", "prompt"]))
    assert Counter(frame["rater"]) == dict.fromkeys(names, images)
    assert not frame.duplicated(["image", "prompt", "rater"]).any()
    found = snapshot_raters(judged / "snapshot")
    assert found["count"] == 3
    assert found["alpha"] > 0.4  # they see the same, and err seldom
    assert list(found["by_rater"]) == sorted(names)
    assert not started(judged)
    kept = {path.name for path in (judged / "feedback").iterdir()}
    assert kept == {"port", "secret", "raters.log", "service.log"}  # no token


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_continued_no_judgement_is_lost_or_there_twice(
    collected: Path, judged: Path, recipe: Recipe, tmp_path: Path, by: signal.Signals
) -> None:
    run_dir = shutil.copytree(collected, tmp_path / "run")
    options = ["--recipe", str(SMOKE), "--run-dir", str(run_dir)]
    options += [part for change in LOCAL for part in ("--set", change)]
    done = start_and_kill(
        "judge", options, ROOT, lambda: answers(run_dir) > 5, by=by, preexec_fn=default_ctrl_c
    )
    assert done.returncode == (130 if by == signal.SIGINT else -signal.SIGKILL), done.stderr
    wait_until_gone(run_dir)
    judge.run(recipe, run_dir)
    pair = [load_snapshot_judgements(directory / "snapshot") for directory in (run_dir, judged)]
    assert pair[0].equals(pair[1])
    with FeedbackStore(recipe.feedback_url(run_dir)) as store:
        assert len(store.judgements(everything=True)) == len(pair[0])


def default_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Person:
    """Somebody at the keyboard: waits for the browser that `judge` opens, and judges there."""

    def __init__(self, run_dir: Path, opened: Path) -> None:
        self.run_dir, self.opened = run_dir, opened
        self.client = httpx.Client(timeout=WAIT_S)
        self.said: dict[tuple[str, str], str] = {}

    def enter(self) -> None:
        """Opens the link that was opened last, and forgets it."""
        deadline = time.monotonic() + WAIT_S
        while not self.opened.exists() or not self.opened.read_text().endswith("\n"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        link = self.opened.read_text().strip()
        self.opened.unlink()
        self.site, _, token = link.partition("/invite/")
        assert "pictures, as ann" in self.client.get(link).text
        reply = self.client.post(f"{self.site}/invite", data={"token": token}, follow_redirects=True)
        found = re.search(r'name="csrf-token" content="([^"]+)"', reply.text)
        assert found, reply.text
        self.headers = {"x-csrf-token": found[1]}

    def judge(self, most: int) -> int:
        """Answers up to so many tasks; how many there were."""
        for number in range(most):
            reply = self._call("/api/next", {"held": []})
            if (task := reply["task"]) is None:
                return number
            verdicts = ["good" if int(image[:2], 16) % 2 else "bad" for image in task["images"]]
            self.said |= {
                (image, task["prompt"]): v for image, v in zip(task["images"], verdicts, strict=True)
            }
            answer = {"idempotency_key": secrets.token_hex(8), "verdicts": verdicts}
            assert self._call(f"/api/tasks/{task['task_id']}/answer", answer)["counted"]
        return most

    def _call(self, path: str, body: object) -> Any:
        reply = self.client.post(f"{self.site}{path}", json=body, headers=self.headers)
        assert reply.status_code == 200, reply.text
        return reply.json()


def test_a_person_judges_in_the_browser_stops_and_goes_on(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, opened = shutil.copytree(collected, tmp_path / "run"), tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf "%s\\n" "$1" > "{opened}"\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    person = Person(run_dir, opened)
    options = ["--recipe", str(SMOKE), "--run-dir", str(run_dir)]
    options += [part for change in BY_PERSON for part in ("--set", change)]

    def some_are_judged() -> bool:
        if opened.exists():
            person.enter()
            assert person.judge(3) == 3
        return len(person.said) > 0

    done = start_and_kill(
        "judge", options, ROOT, some_are_judged, by=signal.SIGINT, preexec_fn=default_ctrl_c
    )
    assert done.returncode == 130, done.stderr
    assert "http://127.0.0.1:" in done.stderr
    wait_until_gone(run_dir)
    assert stat.S_IMODE((run_dir / "feedback" / "invite.txt").stat().st_mode) == 0o600

    def go_on() -> None:
        person.enter()
        person.judge(1000)

    rest = threading.Thread(target=go_on)
    rest.start()
    judge.run(load_recipe(SMOKE, BY_PERSON), run_dir)
    rest.join()
    frame = load_snapshot_judgements(run_dir / "snapshot")
    kept = {(row.image, row.prompt): row.verdict for row in frame.itertuples()}
    assert len(frame) == len(kept)
    assert kept == person.said
    assert set(frame["rater"]) == {"ann"}


def test_where_there_is_no_browser_none_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert not rating.open_browser("http://127.0.0.1:1/invite/x")


def test_a_service_that_cannot_start_says_why(collected: Path, tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(AccordError, match=r"(?s)no image folder.*service\.log"),
        rating.rating_service(recipe, tmp_path / "run", tmp_path / "file" / "images"),
    ):
        pass


def test_what_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="one person judges"):
        load_recipe(SMOKE, ["panel=null"])
    with pytest.raises(ConfigError, match="has 9 raters"):
        rating.raters(load_recipe(SMOKE, ["feedback.judgements_per_image=10"]))
    demo = load_recipe(ROOT / "recipes" / "sandbox" / "demo.yaml", PERSON)
    part = demo.collect.labelled
    assert sum(n * part.images_per_prompt[category] for category, n in part.prompts.items()) == 60
    assert demo.panel is None
    assert demo.feedback.serve
