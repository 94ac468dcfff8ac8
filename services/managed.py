"""`accord serve --manage FILE`: the application by a Serve config, which Serve's own REST API can change.

That is how it is deployed on a cluster, too; so `accord models promote --serve FILE` and `services.rollout`
work on one machine as they do there. Ray's dashboard runs for it, on the loopback interface, with a token of
its own.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from accord.artifacts import write_file
from accord.errors import AccordError
from services.config import APP_NAME, ServeConfig
from services.rollout.config import ServeEndpoint
from services.rollout.serving import ServeApi
from services.rollout.sources import SourceError

POLL_S = 0.5
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def make_ray_token(manage: Path) -> Path:
    """A new token for this Ray alone, beside FILE. Before Ray is imported, which reads the environment."""
    path = manage.with_name(manage.name + ".ray_token")
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)})
    return path


def deploy(config: ServeConfig, where: ServeEndpoint, options: dict[str, Any], timeout_s: float) -> None:
    """Deploys as `serve deploy` does, and waits until all runs. `options` are http_options and grpc_options.

    Raises:
        AccordError: it could not be deployed; the message says why.
    """
    api = ServeApi(where)
    application = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": "services.app:build",
        "args": config.model_dump(mode="json"),
    }
    deadline = time.monotonic() + timeout_s
    _put(api, {"proxy_location": "HeadOnly", **options, "applications": [application]}, deadline)
    while True:
        try:
            found = api.application()
        except SourceError:
            found = {"status": "DEPLOYING"}
        if found["status"] == "RUNNING":
            return
        if found["status"] in FAILED or time.monotonic() > deadline:
            texts = [one.get("message", "") for one in found.get("deployments", {}).values()]
            told = str(found.get("message") or found["status"])
            raise AccordError(f"the application could not be started: {cause([*texts, told], told)}")
        time.sleep(POLL_S)


def write_manage_file(path: Path, where: ServeEndpoint, address: str, token_file: str) -> None:
    """What `--serve FILE` reads (services.rollout.config.RolloutConfig)."""
    content = {
        "serve": {"url": where.url, "token_file": where.token_file},
        "gateway": {"url": address, "token_file": token_file},
    }
    head = "# While `accord serve` runs: accord models promote MODEL --why REASON --serve THIS_FILE\n"
    write_file(path, head + yaml.safe_dump(content, sort_keys=False))


def _put(api: ServeApi, config: dict[str, Any], deadline: float) -> None:
    """The dashboard answers some seconds after Ray does."""
    while True:
        try:
            api.put(config)
            return
        except SourceError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def cause(texts: Iterable[str], otherwise: str) -> str:
    """The reason why a deployment failed, out of the many lines that Serve makes of it."""
    for text in texts:
        lines = [line.strip() for line in text.splitlines() if "Error: " in line]
        if lines:
            return lines[-1]
    return otherwise.strip().splitlines()[-1] if otherwise.strip() else "no reason was given"
