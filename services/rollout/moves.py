"""One move, by hand: what serves and the registry's alias together. `accord models promote --serve FILE`.

Weights are loaded beside what serves; then the registry's record is made, and then the traffic moves. A way
back goes the other way round: harm ends first. A move that was interrupted is ended by the same command.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from accord.errors import AccordError
from accord.registry.gate import DIFFUSION, Check
from accord.registry.records import CANARY, CHAMPION, ModelVersion
from accord.registry.registry import Registry, RegistryError
from services.rollout.serving import Serving
from services.rollout.sources import Gateway
from services.rollout.user_configs import UserConfigs

POLL_S = 0.2


class MoveError(AccordError):
    """A model could not be made to serve."""


@dataclass(frozen=True)
class Moved:
    """What serves now under `alias` of the model table, and the seconds that it took.

    `switch_s` is from the change of the config to the gateway's saying so; `load_s` is 0 for a model that was
    loaded already. `version` is None where something that was never registered serves.
    """

    alias: str
    version: ModelVersion | None
    load_s: float
    switch_s: float
    checks: tuple[Check, ...] = ()


class Mover:
    """Moves what one application serves, and the registry's aliases with it."""

    def __init__(
        self,
        serving: Serving,
        gateway: Gateway,
        registry: Registry,
        *,
        timeout_s: float = 600.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`say` is told of each step."""
        self._serving, self._gateway, self._registry = serving, gateway, registry
        self._timeout_s, self._say = timeout_s, say

    def promote(
        self, reference: str, *, by: str, why: str, share: float | None = None, force: bool = False
    ) -> Moved:
        """A registered version becomes the default, or with `share` the canary, if its gate passes.

        Raises:
            AccordError: the gate fails, it cannot be loaded, or something does not answer.
        """
        alias = CHAMPION if share is None else CANARY
        version, checks = self._registry.admit(reference, alias, force=force)
        if share is not None and version.kind != DIFFUSION:
            raise MoveError(f"{version} is a {version.kind} model: only a diffusion model can be a canary")
        place, load_s = self._loaded(version)
        self._registry.promote(str(version), by=by, why=why, alias=alias, force=force)
        configs = self._serving.read()
        if share is None:
            before = configs.table(version.kind).default
            wanted = configs.with_default(version.kind, place).without_old(
                version.kind, version.name, {before}
            )
        else:
            wanted = configs.with_canary(place, share)
        switch_s = self._switch(configs, wanted, version.kind)
        return Moved(place, self._registry.get(str(version)), load_s, switch_s, tuple(checks))

    def rollback(self, name: str, *, by: str, why: str, to: str | None = None) -> Moved:
        """The last good champion becomes the default again; `to` names another alias of the table instead.

        Raises:
            AccordError: there is none, it cannot be loaded, or something does not answer.
        """
        if not why.strip():
            raise RegistryError("no reason was given; say with --why what speaks for it, it goes on record")
        if to is None:
            version = self._registry.before(name)
            kind, (place, load_s) = version.kind, self._loaded(version)
        else:
            kind, place, load_s = self._kind(name), to, 0.0
            known = self._serving.read().table(kind).models
            if to not in known:
                raise MoveError(f"{to!r} is none of the models that are served: {', '.join(known)}")
        configs = self._serving.read()
        switch_s = self._switch(configs, configs.with_default(kind, place), kind)
        try:
            moved = self._registry.rollback(name, by=by, why=why, to_none=to is not None)
        except AccordError as error:
            raise MoveError(
                f"{place} serves again, but the registry was not told: {error}. Give the same command again"
            ) from None
        return Moved(place, moved, load_s, switch_s)

    def take_out_canary(self, name: str, *, by: str, why: str) -> Moved:
        """The canary gets no more requests.

        Raises:
            AccordError: something does not answer.
        """
        configs = self._serving.read()
        switch_s = self._switch(configs, configs.without_canary(), DIFFUSION)
        if any(CANARY in one.aliases for one in self._registry.versions(name)):
            self._registry.rollback(name, by=by, why=why, alias=CANARY)
        return Moved(configs.champion, None, 0.0, switch_s)

    def _loaded(self, version: ModelVersion) -> tuple[str, float]:
        """The alias under which a version is loaded, and the seconds of loading; loads it if need be."""
        begun = time.monotonic()
        configs = self._serving.read()
        table = configs.table(version.kind)
        loaded = self._gateway.models(version.kind)
        for alias, digest in loaded.items():
            if digest == version.digest and alias in table.models:
                return alias, 0.0
        alias = f"{version.name}-{version.version}"
        if table.models.get(alias, version.directory) != version.directory:
            # Of another registry, or a directory that has moved: what this name serves stays what it is.
            alias = f"{alias}-{version.digest[:12]}"
        self._say(f"Loading {version} from {version.directory}")
        self._serving.write(configs.with_model(version.kind, alias, version.directory))
        while self._gateway.models(version.kind).get(alias) != version.digest:
            if time.monotonic() - begun > self._timeout_s:
                # What serves may have been changed meanwhile: only this model is taken out again.
                if alias not in table.models:
                    self._serving.write(self._serving.read().without_model(version.kind, alias))
                raise MoveError(
                    f"{version} was not loaded within {self._timeout_s:.0f} s, and what serves is as it was. "
                    f"Is {version.directory} there on the nodes that load models, with digest "
                    f"{version.digest[:12]}? The log of the replicas says why"
                )
            time.sleep(POLL_S)
        return alias, time.monotonic() - begun

    def _switch(self, configs: UserConfigs, wanted: UserConfigs, kind: str) -> float:
        """Writes, and waits until the gateway has the new default; the seconds."""
        begun = time.monotonic()
        if wanted != configs:
            self._serving.write(wanted)
        default = wanted.table(kind).default
        while self._gateway.default(kind) != default:
            if time.monotonic() - begun > self._timeout_s:
                raise MoveError(
                    f"{default} was made the default, and the gateway does not say so after "
                    f"{self._timeout_s:.0f} s; see `accord status`, and give the same command again"
                )
            time.sleep(POLL_S)
        return time.monotonic() - begun

    def _kind(self, name: str) -> str:
        versions = self._registry.versions(name)
        if not versions:
            raise RegistryError(f"there is no model {name!r}; `accord models list` shows all")
        return versions[0].kind
