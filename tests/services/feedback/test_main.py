"""The service as a process: it starts, says where it is, ends cleanly, and says what is wrong."""

import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from accord.errors import ConfigError
from services.feedback.main import read_config
from services.feedback.signing import load_secret
from tests.services.feedback.conftest import WAIT_S, make_store, make_tokens

FREE_PORTS = ("--set", "port=0", "--set", "grpc_port=0", "--set", "metrics_port=0")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    url = make_store(tmp_path)
    make_tokens(tmp_path)
    settings = {
        "images": tmp_path / "images",
        "state_dir": tmp_path / "state",
        "tokens": tmp_path / "tokens.yaml",
    }
    return [
        "--url",
        url,
        *FREE_PORTS,
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
    ]


def _run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.feedback", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=2 * WAIT_S
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for jobs in the background


@pytest.fixture
def process(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "services.feedback", *arguments]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, preexec_fn=_ignore_interrupts
    )
    with started:
        yield started
        started.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(
    process: subprocess.Popen[str], arguments: list[str], number: signal.Signals
) -> None:
    assert process.stdout is not None
    site = re.search(r"http://\S+", process.stdout.readline())
    assert site
    assert process.stdout.readline().startswith("gRPC")
    assert process.stdout.readline().startswith("Metrics")
    assert httpx.get(f"{site[0]}/health", timeout=WAIT_S).json() == {"status": "ok"}
    link = _run("invite", "shapes", "ann", *arguments, "--set", f"port={site[0].rpartition(':')[2]}").stdout
    path = link.split("\t")[1].strip()
    assert path.startswith(site[0])
    assert "Start rating" in httpx.get(path, timeout=WAIT_S).text
    process.send_signal(number)
    assert process.wait(WAIT_S) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{site[0]}/health", timeout=WAIT_S)


@pytest.mark.parametrize(
    ("key", "what"), [("port", "the page"), ("grpc_port", "gRPC"), ("metrics_port", "metrics")]
)
def test_a_port_in_use(arguments: list[str], key: str, what: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _run("serve", *arguments, "--set", f"{key}={port}", check=False)
    assert done.returncode == 2
    assert f"cannot listen for {what} on 127.0.0.1:{port}" in done.stderr
    assert key in done.stderr
    assert "Traceback" not in done.stderr


def test_the_database_away(arguments: list[str]) -> None:
    done = _run("serve", *arguments, "--url", "postgresql://accord:s3cret@127.0.0.1:1/x", check=False)
    assert done.returncode == 2
    assert "cannot" in done.stderr or "refused" in done.stderr
    assert "s3cret" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "feedback.yaml"
    path.write_text("url: sqlite:////x/feedback.db\nimages: /x/images\nstate_dir: /x/state\nport: 81\n")
    config = read_config(path, ["port=82"], url="sqlite:////y/feedback.db", images=None)
    assert (config.port, config.url, config.images) == (82, "sqlite:////y/feedback.db", Path("/x/images"))
    with pytest.raises(ConfigError, match="did you mean 'images'"):
        read_config(None, ["imagse=/x"])
    with pytest.raises(ConfigError, match="both certificate and private_key"):
        read_config(path, ["certificate=/x/tls.crt"])
    with pytest.raises(ConfigError, match="no address of a site"):
        read_config(path, ["public_url=rate.example.org"])


def test_the_secret(tmp_path: Path) -> None:
    secret = load_secret(tmp_path / "state")
    path = tmp_path / "state" / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_secret(tmp_path / "state") == secret
    assert load_secret(tmp_path / "other") != secret
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="0600"):
        load_secret(tmp_path / "state")
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(ConfigError, match="too short"):
        load_secret(tmp_path / "state")


def test_the_command_accord_becomes_the_service(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "accord.cli", "feedback", "invite", "shapes", "ann", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=2 * WAIT_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ann\thttp")
