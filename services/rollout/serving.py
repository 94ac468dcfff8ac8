"""What serves now, and how it is changed live: the user_configs of the application."""

from __future__ import annotations

import copy
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accord.tokens import read_secret
from services.config import GATEWAY, GENERATION, CanarySettings, GatewayUserConfig, ModelTable
from services.rollout.config import ServeEndpoint
from services.rollout.sources import SourceError

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class UserConfigs:
    """The parts of an application that can be changed while it runs, as plain data."""

    generation: dict[str, Any]
    gateway: dict[str, Any]

    @property
    def champion(self) -> str:
        """The alias of the default model."""
        return ModelTable.model_validate(self.generation).default

    @property
    def canary(self) -> CanarySettings | None:
        """None also when it gets no requests."""
        canary = GatewayUserConfig.model_validate(self.gateway).canary
        return canary if canary is not None and canary.share > 0 and canary.model != self.champion else None

    def without_canary(self) -> UserConfigs:
        """Both models stay loaded: what runs on the canary ends on it."""
        return UserConfigs(self.generation, {**self.gateway, "canary": None})

    def promoted(self) -> UserConfigs:
        """With the canary as default. The old default stays in the table, to go back to."""
        canary = self.canary
        if canary is None:
            return self
        return UserConfigs({**self.generation, "default": canary.model}, {**self.gateway, "canary": None})


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
        deployments = self._application(self._call("GET"))["deployments"]
        found = [deployments[name]["deployment_config"]["user_config"] for name in (GENERATION, GATEWAY)]
        return UserConfigs(*found)

    def write(self, configs: UserConfigs) -> None:
        """Puts the whole config back with the two user_configs in it: the API takes nothing smaller."""
        details = self._call("GET")
        applications = []
        for name, one in details["applications"].items():
            config = one.get("deployed_app_config")
            if config is None:
                raise SourceError(
                    f"the application {name!r} was not deployed by a config file: none can change it"
                )
            applications.append(
                with_user_configs(config, configs) if name == self._where.application else config
            )
        whole = {
            key: details[key]
            for key in ("proxy_location", "http_options", "grpc_options")
            if details.get(key)
        }
        self._call("PUT", {**whole, "applications": applications})

    def _application(self, details: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] | None = details["applications"].get(self._where.application)
        if found is None:
            raise SourceError(f"there is no application {self._where.application!r} at {self._where.url}")
        return found

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


def with_user_configs(application: dict[str, Any], configs: UserConfigs) -> dict[str, Any]:
    """An application's config with these user_configs among its deployments' overrides."""
    changed = copy.deepcopy(application)
    overrides: list[dict[str, Any]] = changed.setdefault("deployments", [])
    for name, user_config in ((GENERATION, configs.generation), (GATEWAY, configs.gateway)):
        override = next((one for one in overrides if one["name"] == name), None)
        if override is None:
            override = {"name": name}
            overrides.append(override)
        override["user_config"] = user_config
    return changed
