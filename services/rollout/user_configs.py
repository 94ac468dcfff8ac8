"""What of an application can be changed while it runs, as plain data: its deployments' user_configs."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace
from typing import Any

from accord.registry.gate import DIFFUSION
from services.config import GATEWAY, GENERATION, REWARD, CanarySettings, GatewayUserConfig, ModelTable


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
