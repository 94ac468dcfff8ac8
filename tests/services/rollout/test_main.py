"""The process itself: how it begins and ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml


def start(root: Path, directory: Path, *arguments: str, **changed: Any) -> subprocess.Popen[str]:
    (directory / "token").write_text("a-token")
    config = {
        "prometheus": "http://127.0.0.1:1",
        "gateway": {"url": "127.0.0.1:1", "token_file": str(directory / "token")},
        "serve": {"url": "http://127.0.0.1:1"},
        "every_s": 0.1,
        **changed,
    }
    (directory / "rollout.yaml").write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [sys.executable, "-m", "services.rollout", "--config", str(directory / "rollout.yaml"), *arguments],
        cwd=root,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "changed", "message"),
    [
        (("--once",), {}, "GET http://127.0.0.1:1/api/serve/applications/ failed"),
        ((), {"serve": {"url": "ray-head:8265"}}, "serve.url"),
        ((), {"policy": {"patience": 3}}, "patience"),
        ((), {"prometheus": ""}, "prometheus is missing"),
        ((), {"serve": {"url": "http://h:1", "rayservice": "accord"}}, "one of the two"),
        ((), {"metrics_port": 9, "metrics_host": "198.51.100.1"}, "metrics_port 9"),
        ((), {"gateway": {"url": "x:1", "token_file": "/nowhere/token"}}, "cannot read a token"),
    ],
)
def test_what_an_operator_can_mend_is_one_message(
    root: Path, tmp_path: Path, arguments: tuple[str, ...], changed: dict[str, Any], message: str
) -> None:
    process = start(root, tmp_path, *arguments, **changed)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert message in told
    assert "Traceback" not in told


def test_it_goes_on_while_nothing_answers_and_ends_on_sigterm(root: Path, tmp_path: Path) -> None:
    process = start(root, tmp_path)
    assert process.stderr is not None
    first = process.stderr.readline()
    assert "nothing was decided: GET" in first
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
