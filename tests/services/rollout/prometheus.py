"""A real Prometheus that scrapes one page."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.lanes import missing
from tests.services.deployment import eventually


@contextmanager
def prometheus(directory: Path, page: str, every_s: int = 1) -> Iterator[str]:
    """Its URL, once it answers; `page` is the http URL of what it scrapes."""
    program = shutil.which("prometheus")
    if program is None:
        missing("there is no prometheus (apt-get install prometheus)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    target = urllib.parse.urlsplit(page)
    job = {
        "job_name": "accord",
        "metrics_path": target.path,
        "static_configs": [{"targets": [target.netloc]}],
    }
    config = {
        "global": {"scrape_interval": f"{every_s}s", "scrape_timeout": f"{every_s}s"},
        "scrape_configs": [job],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        program,
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, "prometheus ended"
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    try:
        eventually(ready, "prometheus is ready")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answered(url: str, query: str) -> bool:
    """Whether the Prometheus at `url` has data for a query, now."""
    address = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(address, timeout=30) as response:
        return bool(json.load(response)["data"]["result"])
