"""`accord serve` as a user starts and stops it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from accord.tokens import read_secret
from accord.v1 import generation_pb2 as pb
from accord.v1 import generation_pb2_grpc
from tests.listening import elsewhere, listening
from tests.services.deployment import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_serve_starts_answers_and_stops_by_sigint_that_its_parent_ignored(tmp_path: Path, root: Path) -> None:
    endpoint_file = tmp_path / "endpoint.json"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "accord.cli",
                "serve",
                "--port",
                "0",
                "--endpoint-file",
                str(endpoint_file),
            ],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "ACCORD_HOME": str(tmp_path / "home")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        try:
            eventually(
                lambda: endpoint_file.exists() or process.poll() is not None, "it is ready", timeout_s=240
            )
            assert endpoint_file.exists(), (tmp_path / "log").read_text()
            endpoint = json.loads(endpoint_file.read_text())
            assert stat.S_IMODE(Path(endpoint["secret_path"]).stat().st_mode) == 0o600
            token = read_secret(endpoint["secret_path"])
            with grpc.insecure_channel(endpoint["address"]) as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                answer = stub.GenerateImages(
                    pb.GenerateImagesRequest(spec=pb.GenerationSpec(prompt="a red star", steps=2)),
                    metadata=[("authorization", f"Bearer {token}")],
                    timeout=120,
                )
            assert len(answer.images) == 1
            port = int(endpoint["address"].rpartition(":")[2])
            assert port in dict(listening(process.pid))
            assert elsewhere(process.pid) == set()  # nor does anything of Ray
            shown = _status(tmp_path, root)
            assert f"accord serve at {endpoint['address']}: RUNNING (process {process.pid}" in shown
            assert "diffusion base: loaded, default" in shown
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 0
        finally:
            process.kill()
            process.wait()
    text = (tmp_path / "log").read_text()
    assert endpoint["address"] in text
    assert endpoint["secret_path"] in text
    assert token not in text
    assert "accord generate" in text
    assert text.rstrip().endswith("Stopped.")
    assert "Traceback" not in text


def _status(tmp_path: Path, root: Path) -> str:
    """What `accord status` says."""
    done = subprocess.run(
        [sys.executable, "-m", "accord.cli", "status", "--registry", f"sqlite:///{tmp_path / 'none.db'}"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "ACCORD_HOME": str(tmp_path / "home")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout
