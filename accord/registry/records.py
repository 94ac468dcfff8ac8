"""What the registry keeps: versions of models, and each move of an alias; as MLflow's tags hold them."""

import datetime
import json
from dataclasses import dataclass
from typing import Any

from accord.config import validate
from accord.errors import AccordError, ArtifactError
from accord.registry.gate import Check, check
from accord.registry.runs import manifest_at
from accord.registry.settings import GateConfig

CHAMPION = "champion"
CANARY = "canary"
ALIASES = (CHAMPION, CANARY)


class RegistryError(AccordError):
    """The registry does not answer, does not hold what was named, or refuses what was asked."""


@dataclass(frozen=True)
class ModelVersion:
    """A registered model. `measured` is what the gate looks at, `ancestors` the digests that it was made
    from."""

    name: str
    version: int
    kind: str
    digest: str
    directory: str
    recipe: str
    aliases: tuple[str, ...]
    measured: dict[str, float]
    ancestors: dict[str, str]
    gate: GateConfig
    code_version: str
    registered_at: datetime.datetime

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    def checks(self) -> list[Check]:
        """What the gate that it was registered with says of it."""
        return check(self.kind, self.measured, self.gate)

    def refuse_changed(self) -> None:
        """A directory that can be seen from here must hold the model that was registered.

        Raises:
            ArtifactError: it holds another one.
        """
        manifest = manifest_at(self.directory)
        if manifest is not None and manifest.digest != self.digest:
            raise ArtifactError(
                f"{self.directory} holds another model by now (digest {manifest.digest[:12]}) than was "
                f"registered as {self} ({self.digest[:12]}); register the run again"
            )


@dataclass(frozen=True)
class Event:
    """One move of an alias, or a version registered again with another gate or measurement (without alias).

    `version` is where the alias points since then, None when it was taken away.
    """

    at: str
    action: str
    alias: str
    version: int | None
    previous: int | None
    by: str
    why: str
    forced: bool = False


def read_version(entry: Any, aliases: dict[str, Any]) -> ModelVersion:
    """A version out of MLflow's entry; `aliases` are its model's."""
    tags: dict[str, str] = dict(entry.tags)
    number = int(entry.version)
    return ModelVersion(
        name=entry.name,
        version=number,
        kind=tags["accord.kind"],
        digest=tags["accord.digest"],
        directory=tags["accord.directory"],
        recipe=tags.get("accord.recipe", ""),
        aliases=tuple(sorted(alias for alias, holder in aliases.items() if int(holder) == number)),
        measured=json.loads(tags.get("accord.measured", "{}")),
        ancestors={
            key.removeprefix("lineage."): value
            for key, value in sorted(tags.items())
            if key.startswith("lineage.")
        },
        gate=validate(
            GateConfig, json.loads(tags.get("accord.gate", "{}")), f"the gate of {entry.name}/{number}"
        ),
        code_version=tags.get("accord.code_version", ""),
        registered_at=datetime.datetime.fromtimestamp(entry.creation_timestamp / 1000, datetime.UTC),
    )


def is_ours(entry: Any) -> bool:
    """Whether a version of MLflow's was registered by us."""
    return "accord.digest" in entry.tags


def champions(events: list[Event]) -> list[int]:
    """The champions that were not rolled back, the newest last; `events` are a model's, the oldest first."""
    stack: list[int] = []
    for event in events:
        if event.alias != CHAMPION:
            continue
        if event.action == "rollback":
            while stack and stack[-1] != event.version:
                stack.pop()
        if event.version is not None and (not stack or stack[-1] != event.version):
            stack.append(event.version)
    return stack


def check_request(alias: str, why: str) -> None:
    """Raises RegistryError: there is no such alias, or no reason was given."""
    if alias not in ALIASES:
        raise RegistryError(f"the alias is {alias!r}; expected one of {', '.join(ALIASES)}")
    if not why.strip():
        raise RegistryError("no reason was given; say with --why what speaks for it, it goes on record")
