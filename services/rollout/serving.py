"""What serves now, and how it is changed live: the user_configs of the application."""

from __future__ import annotations

import copy
import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from accord.registry.gate import DIFFUSION
from accord.tokens import read_secret
from services.config import GATEWAY, GENERATION, REWARD, CanarySettings, GatewayUserConfig, ModelTable
from services.rollout.config import ServeEndpoint
from services.rollout.sources import SourceError

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class UserConfigs:
    """The parts of an application that can be changed while it runs, as plain data."""

    generation: dict[str, Any]
    gateway: dict[str, Any]
    reward: dict[str, Any] = field(default_factory=dict)

    @property
    def champion(self) -> str:
        """The alias of the default model."""
        return self.table(DIFFUSION).default

    @property
    def canary(self) -> CanarySettings | None:
        """None also when it gets no requests."""
        canary = GatewayUserConfig.model_validate(self.gateway).canary
        return canary if canary is not None and canary.share > 0 and canary.model != self.champion else None

    def table(self, kind: str) -> ModelTable:
        """The models of a kind (accord.registry.gate)."""
        return ModelTable.model_validate(self.generation if kind == DIFFUSION else self.reward)

    def without_canary(self) -> UserConfigs:
        """Both models stay loaded: what runs on the canary ends on it."""
        return replace(self, gateway={**self.gateway, "canary": None})

    def promoted(self) -> UserConfigs:
        """With the canary as default. The old default stays in the table, to go back to."""
        canary = self.canary
        return self if canary is None else self.with_default(DIFFUSION, canary.model)

    def with_canary(self, alias: str, share: float) -> UserConfigs:
        return replace(self, gateway={**self.gateway, "canary": {"model": alias, "share": share}})

    def with_default(self, kind: str, alias: str) -> UserConfigs:
        """With another model of the table as default; a canary that becomes it is none any more."""
        changed = self._with_table(kind, self.table(kind).model_copy(update={"default": alias}))
        canary = GatewayUserConfig.model_validate(self.gateway).canary
        over = kind == DIFFUSION and canary is not None and canary.model == alias
        return changed.without_canary() if over else changed

    def with_model(self, kind: str, alias: str, directory: str) -> UserConfigs:
        """With one more model in the table."""
        table = self.table(kind)
        return self._with_table(kind, table.model_copy(update={"models": {**table.models, alias: directory}}))

    def without_model(self, kind: str, alias: str) -> UserConfigs:
        """Without one model of the table, unless it is the default."""
        table = self.table(kind)
        models = {name: place for name, place in table.models.items() if name != alias}
        if alias == table.default:
            return self
        return self._with_table(kind, table.model_copy(update={"models": models}))

    def without_old(self, kind: str, name: str, keep: set[str]) -> UserConfigs:
        """Without earlier versions of the registered model `name` that neither serve nor are in `keep`."""
        table = self.table(kind)
        canary = GatewayUserConfig.model_validate(self.gateway).canary
        kept = keep | {table.default} | ({canary.model} if canary else set())
        old = {
            one for one in table.models if re.fullmatch(rf"{re.escape(name)}-\d+(-[0-9a-f]{{12}})?", one)
        } - kept
        models = {alias: place for alias, place in table.models.items() if alias not in old}
        return self._with_table(kind, table.model_copy(update={"models": models}))

    def _with_table(self, kind: str, table: ModelTable) -> UserConfigs:
        plain = table.model_dump(mode="json")
        return replace(self, generation=plain) if kind == DIFFUSION else replace(self, reward=plain)


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


def with_user_configs(application: dict[str, Any], configs: UserConfigs) -> dict[str, Any]:
    """An application's config with these user_configs among its deployments' overrides."""
    changed = copy.deepcopy(application)
    overrides: list[dict[str, Any]] = changed.setdefault("deployments", [])
    for name, user_config in (
        (GENERATION, configs.generation),
        (GATEWAY, configs.gateway),
        (REWARD, configs.reward),
    ):
        if not user_config:
            continue
        override = next((one for one in overrides if one["name"] == name), None)
        if override is None:
            override = {"name": name}
            overrides.append(override)
        override["user_config"] = user_config
    return changed


def open_serving(where: ServeEndpoint) -> Serving:
    """Raises SourceError: there is no Kubernetes cluster to ask."""
    if where.rayservice:
        from services.rollout.rayservice import RayServiceSpec  # the Kubernetes client takes a second

        return RayServiceSpec(where)
    return ServeApi(where)
