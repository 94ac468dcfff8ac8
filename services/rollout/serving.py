"""What serves now, and how it is changed live: the user_configs of the application."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Protocol

from accord.tokens import read_secret
from services.config import GATEWAY, GENERATION, REWARD
from services.rollout.config import ServeEndpoint
from services.rollout.sources import SourceError
from services.rollout.user_configs import UserConfigs, with_user_configs

TIMEOUT_S = 30.0


class Serving(Protocol):
    """A running application."""

    def read(self) -> UserConfigs:
        """Raises SourceError."""

    def write(self, configs: UserConfigs) -> None:
        """Raises SourceError."""


class ServeApi:
    """An application of Ray Serve, by the REST API of the cluster's dashboard."""

    def __init__(self, where: ServeEndpoint) -> None:
        self._where = where
        self._url = where.url.rstrip("/") + "/api/serve/applications/"

    def read(self) -> UserConfigs:
        application = self.application()
        # What was told last comes first: replicas are told of it some moments later.
        told = {
            one["name"]: one.get("user_config")
            for one in (application.get("deployed_app_config") or {}).get("deployments") or []
        }
        running = application["deployments"]
        found = [
            told.get(name) or running.get(name, {}).get("deployment_config", {}).get("user_config") or {}
            for name in (GENERATION, GATEWAY, REWARD)
        ]
        if not found[0]:
            raise SourceError(f"{self._where.application!r} at {self._where.url} is not deployed yet")
        return UserConfigs(*found)

    def write(self, configs: UserConfigs) -> None:
        """Puts the whole config back with the user_configs in it: the API takes nothing smaller."""
        details = self._call("GET")
        applications = []
        for name, one in details["applications"].items():
            config = one.get("deployed_app_config")
            if config is None:
                raise SourceError(
                    f"the application {name!r} was not deployed by a config file: none can change it "
                    "(`accord serve` deploys by one with --manage FILE)"
                )
            applications.append(
                with_user_configs(config, configs) if name == self._where.application else config
            )
        whole = {
            key: details[key]
            for key in ("proxy_location", "http_options", "grpc_options")
            if details.get(key)
        }
        self.put({**whole, "applications": applications})

    def application(self) -> dict[str, Any]:
        """Serve's own description of it. Raises SourceError: there is none."""
        found: dict[str, Any] | None = self._call("GET")["applications"].get(self._where.application)
        if found is None:
            raise SourceError(f"there is no application {self._where.application!r} at {self._where.url}")
        return found

    def put(self, config: dict[str, Any]) -> None:
        """Deploys a whole Serve config."""
        self._call("PUT", config)

    def _call(self, method: str, body: Any = None) -> dict[str, Any]:
        headers = {"content-type": "application/json"}
        if self._where.token_file:
            headers["authorization"] = f"Bearer {read_secret(Path(self._where.token_file))}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                content = response.read()
            found: dict[str, Any] = json.loads(content) if method == "GET" else {}
        except urllib.error.HTTPError as error:
            raise SourceError(f"{method} {self._url} was refused: {error.code} {error.reason}") from None
        except (OSError, ValueError) as error:
            raise SourceError(f"{method} {self._url} failed: {error}") from None
        return found


def open_serving(where: ServeEndpoint) -> Serving:
    """Raises SourceError: there is no Kubernetes cluster to ask."""
    if where.rayservice:
        from services.rollout.rayservice import RayServiceSpec  # the Kubernetes client takes a second

        return RayServiceSpec(where)
    return ServeApi(where)
