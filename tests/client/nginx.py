"""A real nginx with docs/nginx.conf in front of a gRPC server."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.client.certificates import Signed
from tests.conftest import ROOT
from tests.lanes import missing

CONFIG = ROOT / "docs" / "nginx.conf"


@contextlib.contextmanager
def terminating_tls(
    directory: Path, signed: Signed, upstream_port: int, *, clients: Path | None = None
) -> Iterator[int]:
    """Yields the port of localhost where nginx speaks TLS; `clients` is the authority of mTLS.

    Only addresses, files and the number of workers are changed in the documented config.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        missing("there is no nginx")
    directory.mkdir(parents=True, exist_ok=True)
    text = CONFIG.read_text()
    port = _free_port()
    changes = {
        "worker_processes auto": "worker_processes 1",
        "pid /run/nginx.pid": f"pid {directory}/nginx.pid",
        "server 127.0.0.1:9000;": f"server 127.0.0.1:{upstream_port};",
        "listen 443 ssl http2": f"listen 127.0.0.1:{port} ssl http2",
        "/etc/nginx/tls/server.crt": str(signed.certificate),
        "/etc/nginx/tls/server.key": str(signed.key),
    }
    if clients is not None:
        changes |= {
            "# ssl_client_certificate /etc/nginx/tls/clients.pem": f"ssl_client_certificate {clients}",
            "# ssl_verify_client on": "ssl_verify_client on",
        }
    for old, new in changes.items():
        assert text.count(old) == 1, f"docs/nginx.conf no longer says {old!r} once"
        text = text.replace(old, new)
    # Where a package would have put what nginx keeps on the disk; and it must end with this process.
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {directory}/{kind};\n" for kind in kinds)
    text = text.replace("http {\n", "http {\n" + paths, 1)
    config = directory / "nginx.conf"
    config.write_text(text)
    log = directory / "nginx.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [program, "-c", str(config), "-p", str(directory), "-g", "daemon off;"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            _wait(port, process, log)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
            return
        time.sleep(0.02)
    raise AssertionError(f"nginx does not listen: {log.read_text()}")
