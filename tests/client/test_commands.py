"""`accord generate`, `score` and `replay` against the server that plays faults."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from PIL import Image, ImageFont
from typer.testing import CliRunner

from accord import cli
from accord.cli.contact_sheet import Cell, contact_sheet, wrapped
from tests.client import server
from tests.client.certificates import Authority
from tests.client.server import ACTOR_DIED, Fault, Faulty, rich_fault
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, faulty: Faulty, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCORD_ENDPOINT", faulty.target)
    monkeypatch.setenv("ACCORD_TOKEN", server.TOKEN)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, arguments)


def test_generate_writes_images_sheet_and_manifest(faulty: Faulty, tmp_path: Path) -> None:
    faulty.faults = [Fault(grpc.StatusCode.INTERNAL, ACTOR_DIED, after=4)]
    done = invoke(
        "generate", "two red stars", "-n", "2", "--candidates", "6", "--seed", "9", "-o", "out/stars"
    )
    assert done.exit_code == 0, done.output
    out = tmp_path / "out" / "stars"
    assert sorted(path.name for path in out.iterdir()) == [
        "01.png", "02.png", "contact-sheet.png", "manifest.json",
    ]  # fmt: skip
    assert np.asarray(Image.open(out / "01.png"))[0, 0, 0] == 60
    known = json.loads((out / "manifest.json").read_text())
    assert (known["seed"], known["candidates"], known["finish_reason"]) == ("9", 6, "completed")
    assert [image["file"] for image in known["images"]] == ["01.png", "02.png"]
    assert known["images"][0]["manifest"]["candidate"] == 5
    assert re.search(r"1 +0\.857 +0\.000 +out/stars/01\.png", done.stdout)
    assert "Best 2 of 6 in 1.5 s (completed), seed 9" in done.stderr
    with Image.open(out / "contact-sheet.png") as sheet:
        assert sheet.width > 500


def test_what_is_there_is_only_replaced_when_that_is_said(faulty: Faulty, tmp_path: Path) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    assert invoke("generate", "x", "--seed", "1", "-n", "2").exit_code == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    asked = len(faulty.requests)
    assert_fails(
        2, "out/01.png (and 3 more) is there already: name another place, or give --overwrite", "-n", "2"
    )
    assert_fails(2, "out/01.png", "--format", "jpeg")  # beside it the pages would not say which is meant
    assert len(faulty.requests) == asked  # refused before anything was drawn
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    done = invoke("generate", "y", "--seed", "2", "-n", "2", "--overwrite")
    assert done.exit_code == 0, done.output
    assert json.loads(Path("out/manifest.json").read_text())["prompt"] == "y"
    assert Path("out/notes.txt").read_text() == "mine"
    assert invoke("generate", "z", "-n", "1", "--overwrite").exit_code == 0
    left = {"01.png", "contact-sheet.png", "manifest.json", "notes.txt"}
    assert {path.name for path in Path("out").iterdir()} == left  # nothing of the one before


def test_options_reach_the_server(faulty: Faulty) -> None:
    done = invoke(
        "generate", "x", "--steps", "5", "--guidance-scale", "0", "--scheduler", "unipc", "--format", "webp",
        "--width", "64", "--accept-reward", "0.5", "--time-budget", "2", "--negative-prompt", "n",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    spec = faulty.requests[0].spec
    assert (spec.steps, spec.guidance_scale, spec.scheduler, spec.image_format) == (5, 0.0, 4, 3)
    assert (spec.width, spec.height, spec.negative_prompt) == (64, 0, "n")
    assert (spec.accept_reward, spec.time_budget.seconds) == (0.5, 2)


def test_replay_takes_a_png_or_a_manifest(faulty: Faulty, tmp_path: Path) -> None:
    invoke("generate", "x", "-n", "2", "--candidates", "3", "--seed", "9")
    asked = []
    for arguments in (["out/01.png"], ["out/manifest.json"], ["out/manifest.json", "--rank", "2"]):
        done = invoke("replay", *arguments, "-o", "again.png", "--overwrite")
        assert done.exit_code == 0, done.output
        asked.append(faulty.requests[-1].manifest.candidate)
    assert asked == [2, 2, 1]
    assert "give --overwrite" in invoke("replay", "out/01.png", "-o", "again.png").stderr
    assert len(faulty.requests) == 4
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    single = json.loads(Path("out/manifest.json").read_text())["images"][0]["manifest"]
    Path("single.json").write_text(json.dumps(single))
    assert invoke("replay", "single.json", "-o", "again.webp").exit_code == 0
    assert faulty.requests[-1].image_format == 3


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (b"GIF89a", [], "neither a PNG nor JSON"),
        (b'{"images": [{"rank": 1}]}', ["--rank", "3"], "no image of rank 3; it has 1"),
        (b'{"images": [{"rank": 1}]}', [], "no manifest"),
        (b'{"a": 1}', [], "names no model_digest"),
        (b"[" * 100_000, [], "neither"),
    ],
)
def test_replay_of_something_else_says_what_was_expected(
    content: bytes, arguments: list[str], words: str
) -> None:
    Path("source").write_bytes(content)
    done = invoke("replay", "source", "-o", "again.png", *arguments)
    assert done.exit_code == 2
    assert words in done.stderr


def test_score_prints_a_table_best_first(faulty: Faulty) -> None:
    Path("a.png").write_bytes(b"1")
    invoke("generate", "a prompt of its own")
    done = invoke("score", "a.png", "out/01.png", "--prompt", "a star", "--prompt", "stars")
    assert done.exit_code == 0, done.output
    assert re.search(r"a\.png +a star +0\.500 +0\.010 +0\.250", done.stdout)
    assert re.search(r"a\.png +stars +0\.500 +0\.010 +-", done.stdout)
    assert len(done.stdout.splitlines()) == 5
    assert "a prompt of its own" in invoke("score", "out/01.png").stdout
    without = invoke("score", "a.png")
    assert without.exit_code == 2
    assert "--prompt" in without.stderr


def test_score_with_a_recipe_is_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    class Executed(Exception):  # noqa: N818 (no error: execve ends this program)
        pass

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        raise Executed(arguments)

    monkeypatch.setattr("os.execve", execve)
    for arguments in (["--recipe", "r.yaml", "--set", "a=1"], ["--recipe=r.yaml"]):
        done = invoke("score", *arguments)
        assert done.exception.args[0][1:] == ["-m", "ray_jobs.score", *arguments]


def test_failures_teach_and_have_an_exit_status_each(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faulty.faults = [rich_fault(grpc.StatusCode.NOT_FOUND, "no model [x]", "MODEL_NOT_FOUND")]
    assert_fails(2, "Error: no model [x]")
    faulty.faults = [rich_fault(grpc.StatusCode.INTERNAL, "see the log", "INTERNAL_ERROR")]
    assert_fails(1, "see the log")
    monkeypatch.setenv("ACCORD_TOKEN", "wrong")
    assert_fails(3, "does not know this token")
    monkeypatch.delenv("ACCORD_TOKEN")
    assert_fails(3, "set ACCORD_TOKEN")
    Path("file").touch()
    assert_fails(2, "file is a file", "-o", "file")
    assert_fails(2, "cannot read a token", "--token-file", "none")
    authority = Authority(tmp_path / "authority")
    assert_fails(3, "no TLS", "--ca-file", str(authority.file))
    with server.serve() as gone:
        pass
    assert_fails(4, "no server answers", "--endpoint", gone.target)
    assert not Path("out").exists()


def assert_fails(status: int, words: str, *options: str) -> None:
    done = invoke("generate", "x", *options)
    assert (done.exit_code, words in done.stderr) == (status, True), done.output
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "option", "words"),
    [
        (["-n", "0"], "--num-images", "0 is out of range; expected 1 to 64"),
        (["--candidates", "257"], "--candidates", "257 is out of range; expected 1 to 256"),
        (["--steps", "0"], "--steps", "0 is out of range; expected 1 to 150"),
        (["--guidance-scale", "nan"], "--guidance-scale", "nan is out of range; expected 0 to 30"),
        (["--seed", "-1"], "--seed", "-1 is out of range; expected 0 to 18446744073709551615"),
        (["--width", "0"], "--width", "0 is out of range; expected 1 or more"),
        (["--width", str(2**32)], "width", "is 4294967296; expected an integer from 0 to 4294967295"),
        (["--time-budget", "0"], "--time-budget", "0.0 is out of range; expected 0.01 to 3600"),
        (["--timeout", "0"], "--timeout", "0.0 is out of range; expected 0.001 or more"),
    ],
)
def test_a_number_out_of_range_is_told_with_its_option_and_its_range(
    faulty: Faulty, arguments: list[str], option: str, words: str
) -> None:
    done = invoke("generate", "x", *arguments)
    assert done.exit_code == 2
    assert option in done.stderr
    assert words in done.stderr
    assert faulty.requests == []


def test_what_the_server_finds_out_of_range_is_told_of_the_option(faulty: Faulty) -> None:
    bad = error_details_pb2.BadRequest()
    for field, wrong in (
        ("spec.num_candidates", "expected num_images (4) to 256, got 2"),
        ("spec.steps", "expected 1 to 50, got 60"),
        ("spec.image_format", "unknown"),
    ):
        bad.field_violations.add(field=field, description=wrong)
    code = grpc.StatusCode.INVALID_ARGUMENT
    faulty.faults = [rich_fault(code, "spec.num_candidates: ... (and 2 more)", "FIELD_INVALID", bad)]
    done = invoke("generate", "x")
    assert done.exit_code == 2
    assert "--candidates: expected --num-images (4) to 256, got 2" in done.stderr
    assert "--steps: expected 1 to 50, got 60" in done.stderr
    assert "--format: unknown" in done.stderr
    assert "spec." not in done.stderr


def test_ctrl_c_stops_the_server_s_work_and_writes_nothing(faulty: Faulty, tmp_path: Path) -> None:
    faulty.delay_s = 0.1
    process = subprocess.Popen(
        [sys.executable, "-m", "accord.cli", "generate", "x", "--candidates", "200"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert faulty.asked.wait(60)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Stopped." in said
    assert "Traceback" not in said
    assert faulty.cancelled.wait(60)
    assert not (tmp_path / "out").exists()


def test_captions_are_wrapped_and_end_in_an_ellipsis_where_they_are_cut() -> None:
    font = ImageFont.load_default(20)
    for text in ("two red stars on grass", "W" * 200, "a very long prompt of many words " * 30, "", "i" * 40):
        lines = wrapped(text, font, 192, 3)
        assert 1 <= len(lines) <= 3
        assert all(font.getlength(line) <= 192 for line in lines)
        whole = "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert whole != lines[-1].endswith("…")
    assert wrapped("two red stars", font, 1000, 3) == ["two red stars"]
    assert len(wrapped("word " * 40, font, 192, 2)) == 2


def test_a_contact_sheet_frames_what_was_chosen() -> None:
    red = np.full((16, 16, 3), (200, 0, 0), np.uint8)
    for count in (1, 4, 16, 50):
        cells = [Cell(red, 0.9, True), *[Cell(red, 0.1, False)] * (count - 1)]
        sheet = np.asarray(contact_sheet(cells, "a long prompt " * 20, "seed 1"))
        assert np.any(np.all(sheet == (21, 128, 61), axis=2))
        reds = int(np.all(sheet == (200, 0, 0), axis=2).sum())
        assert reds == count * 192 * 192  # none is covered by another
    wide = np.zeros((400, 800, 3), np.uint8)
    buffer = io.BytesIO()
    contact_sheet([Cell(wide, 1.5, False)], "", "").save(buffer, "PNG")
    assert buffer.tell() > 0
