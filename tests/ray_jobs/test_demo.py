"""What the demo does after the loop: a run's models are served, asked over gRPC, and shown in the report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from accord import demo
from accord.artifacts import artifact_writer
from accord.client import manifest_from_png
from accord.errors import AccordError
from accord.evaluation.report import replace_served
from accord.recipe import Recipe, load_recipe
from tests.client import server
from tests.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]  # `demo_run` counts

HEADING = "<h2>Served over gRPC</h2>"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """That of `demo_run`."""
    return load_recipe(ROOT / "recipes" / "sandbox" / "smoke.yaml")


def test_both_models_are_asked_and_shown(demo_run: Path, recipe: Recipe) -> None:
    content = json.loads((demo_run / "served" / "served.json").read_text())
    guidance = json.loads((demo_run / "summary.json").read_text())["guidance"]
    asked = [(answer["prompt"], answer["model"]) for answer in content["answers"]]
    assert asked == [(prompt, model) for prompt in demo.prompts(recipe) for model in ("base", "aligned")]
    for answer in content["answers"]:
        rewards = [image["reward"] for image in answer["images"]]
        assert len(rewards) == 16
        assert rewards == sorted(rewards, reverse=True)
        first = manifest_from_png((demo_run / "served" / answer["images"][0]["file"]).read_bytes())
        assert first.prompt == answer["prompt"]
        assert first.guidance_scale == guidance[answer["model"]]
        assert first.model_digest == answer["model_digest"]
    html = (demo_run / "report.html").read_text()
    assert html.count(HEADING) == 1
    assert replace_served(html, None).count("<img ") == html.count("<img ") - 16 * len(asked)
    assert not list((demo_run / "served").glob("**/*token*"))


def test_each_model_is_asked_at_its_own_guidance(
    demo_run: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The demo's models may have the same: here they have not, and a server that notes what it is asked."""
    run_dir = shutil.copytree(demo_run, tmp_path / "run")
    (run_dir / "served" / "served.json").unlink()
    guidance = {"base": 2.0, "aligned": 1.5}
    (run_dir / "summary.json").write_text(json.dumps({"guidance": guidance}))
    with server.serve() as noting:
        monkeypatch.setattr(demo, "local_server", lambda *_: nullcontext((noting.target, server.TOKEN)))
        demo.serve_run(recipe, run_dir)
    specs = [request.spec for request in noting.requests]
    assert [(spec.prompt, spec.model, spec.guidance_scale) for spec in specs] == [
        (prompt, model, scale) for prompt in demo.prompts(recipe) for model, scale in guidance.items()
    ]


def test_what_was_asked_is_kept_until_the_models_change(
    demo_run: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(demo_run, run_dir)
    monkeypatch.setattr(demo, "local_server", lambda *_: pytest.fail("the server was started again"))
    before = (run_dir / "report.html").read_bytes()
    first = demo.load_served(run_dir)
    demo.serve_run(recipe, run_dir)
    assert demo.load_served(run_dir) == first
    assert (run_dir / "report.html").read_text().count(HEADING) == 1
    assert len((run_dir / "report.html").read_bytes()) == pytest.approx(len(before), abs=500)  # another path
    shutil.rmtree(run_dir / "aligned")
    with artifact_writer(run_dir / "aligned", "diffusion_model", inputs={}, config={}, seed=1) as directory:
        (directory / "other").write_text("weights")
    assert demo.load_served(run_dir) is None


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    config, log = tmp_path / "serve.yaml", tmp_path / "serve.log"
    config.write_text("generation: {nonsense: 1}")
    with (
        pytest.raises(AccordError, match=r"(?s)the server ended.*--skip-serving") as caught,
        demo.local_server(config, log),
    ):
        pass
    assert "nonsense" in log.read_text()
    assert str(log) in str(caught.value)


def test_ctrl_c_stops_the_server_too(demo_run: Path, recipe: Recipe, tmp_path: Path) -> None:
    config, log = tmp_path / "serve.yaml", tmp_path / "serve.log"
    config.write_text(json.dumps(demo.serving_config(recipe, demo_run)))
    code = (
        "import sys; from pathlib import Path; from accord import demo\n"
        "with demo.local_server(Path(sys.argv[1]), Path(sys.argv[2])): pass\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(config), str(log)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_until(lambda: log.exists() and "Starting Ray" in log.read_text())
        children = children_of(process.pid)
        assert children
        process.send_signal(signal.SIGINT)
        assert process.wait(120) != 0
    finally:
        process.kill()
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def wait_until(true: object) -> None:
    deadline = time.monotonic() + 120
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
