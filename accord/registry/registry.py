"""Versions of models, the aliases `champion` and `canary`, and who moved them when and why.

MLflow's registry holds all of it: a version's tags say what it is, a registered model's tags are the history
of its aliases. The history is only ever added to.
"""

import contextlib
import datetime
import json
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accord.artifacts import canonical_json
from accord.config import redact_url
from accord.errors import AccordError
from accord.registry.gate import KINDS, Check
from accord.registry.records import (
    ALIASES,
    CANARY,
    CHAMPION,
    Event,
    ModelVersion,
    RegistryError,
    champions,
    check_request,
    is_ours,
    read_version,
)
from accord.registry.runs import RunModel
from accord.registry.settings import GateConfig

__all__ = ["ALIASES", "CANARY", "CHAMPION", "Event", "ModelVersion", "Registry", "RegistryError"]

_EVENT = "event."
_MAX_REASON_CHARACTERS = 1000  # the tag that holds an event has room for 5,000


class Registry:
    """Models by name: NAME/VERSION, NAME@ALIAS, or the first digits of a digest."""

    def __init__(self, uri: str) -> None:
        """Open an MLflow registry ("sqlite:////path/models.db", "http://host:5000").

        Raises:
            RegistryError: it does not answer. A password in the URI is never shown.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # A few short tries, so that an operator is told soon.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # it sets its level when it is imported
        for library in ("alembic", "mlflow"):
            logging.getLogger(library).setLevel(logging.ERROR)
        self._shown = redact_url(uri)
        with self._errors("open the registry"):
            from mlflow import MlflowClient

            if uri.startswith("sqlite:///"):
                Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            elif not uri.startswith(("http://", "https://")):
                _try_database(uri)
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self._client.search_registered_models(max_results=1)

    def register(
        self, prefix: str, model: RunModel, recipe: str, gate: GateConfig
    ) -> tuple[ModelVersion, bool]:
        """The version of a run's model, and whether it is new. The same digest is the same version: what was
        measured since, and the recipe's gate, are written anew.

        Raises:
            RegistryError: the registry does not answer.
        """
        name, digest = f"{prefix}-{model.kind}", model.manifest.digest
        tags = {
            "accord.kind": model.kind,
            "accord.digest": digest,
            "accord.directory": str(model.directory),
            "accord.recipe": recipe,
            "accord.code_version": model.manifest.code_version,
            "accord.manifest": canonical_json(model.manifest),
            "accord.gate": canonical_json(gate),
            "accord.measured": canonical_json(model.measured),
            **{f"metric.{key}": f"{value:.6g}" for key, value in model.measured.items()},
            **{f"lineage.{key}": ancestor for key, ancestor in model.ancestors.items()},
        }
        with self._errors(f"register {name}"):
            self._ensure_model(name, model.kind)
            there = [found for found in self.versions(name) if found.digest == digest]
            if there:
                version = there[0].version
                changed = [
                    what
                    for what, old, new in (
                        ("gate", there[0].gate, gate),
                        ("measurement", there[0].measured, model.measured),
                    )
                    if old != new
                ]
                if changed:  # what a gate lets pass is never changed without a record
                    why = f"another {' and '.join(changed)} than before"
                    self._record(name, _event("register", "", version, None, recipe, why))
                for key, value in tags.items():
                    self._client.set_model_version_tag(name, str(version), key, value)
            else:
                # No path: a registry that runs as a server takes none as a source.
                made = self._client.create_model_version(name, source=f"accord://models/{digest}", tags=tags)
                version = int(made.version)
        return self.get(f"{name}/{version}"), not there

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """All versions of one model, or of all, the newest first. Models of others in the same MLflow are
        left out.

        Raises:
            RegistryError: the registry does not answer.
        """
        found: list[ModelVersion] = []
        with self._errors("list models"):
            aliases = {model.name: dict(model.aliases) for model in self._registered()}
            for known in sorted(aliases) if name is None else [name]:
                token: str | None = None
                while True:
                    page = self._client.search_model_versions(f"name='{known}'", page_token=token)
                    found += [read_version(entry, aliases.get(known, {})) for entry in page if is_ours(entry)]
                    token = page.token
                    if not token:
                        break
        return sorted(found, key=lambda version: (version.name, -version.version))

    def get(self, reference: str) -> ModelVersion:
        """The version that NAME/VERSION, NAME@ALIAS or the first digits of a digest names.

        Raises:
            RegistryError: there is none, or more than one.
        """
        everything = self.versions()
        name, at, alias = reference.partition("@")
        if at:
            found = [version for version in everything if version.name == name and alias in version.aliases]
        elif "/" in reference:
            found = [version for version in everything if str(version) == reference]
        else:
            found = [version for version in everything if reference and version.digest.startswith(reference)]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(version) for version in found)
            raise RegistryError(
                f"{reference!r} is the beginning of {len(found)} digests ({names}); give more digits"
            )
        known = ", ".join(str(version) for version in everything[:8]) or "none"
        raise RegistryError(
            f"there is no model {reference!r} in {self._shown}; expected NAME/VERSION, NAME@ALIAS or the "
            "first digits of "
            f"a digest. Registered: {known}. `accord models list` shows all, `accord models register "
            "RECIPE` adds a run's"
        )

    def admit(
        self, reference: str, alias: str = CHAMPION, *, force: bool = False
    ) -> tuple[ModelVersion, list[Check]]:
        """The version that may serve under an alias, with its gate's checks; nothing is moved.

        Raises:
            RegistryError: the gate fails, or there is no such version.
            ArtifactError: its directory holds another model by now.
        """
        version = self.get(reference)
        if alias == CANARY and CHAMPION in version.aliases:
            raise RegistryError(f"{version} is the champion: it serves already, and cannot be a canary too")
        checks = version.checks()
        if not force and not all(one.passed for one in checks):
            lines = "\n  ".join(str(one) for one in checks)
            advice = (
                "Train a better one; or, if you know better than the gate, --force with the reason in --why."
                if version.measured
                else "Nothing was measured: run `accord evaluate` and `accord report`, then register the run "
                "again."
            )
            raise RegistryError(
                f"{version} does not pass its gate, so {alias} stays where it is:\n  {lines}\n{advice}"
            )
        version.refuse_changed()
        return version, checks

    def promote(
        self, reference: str, *, by: str, why: str, alias: str = CHAMPION, force: bool = False
    ) -> tuple[ModelVersion, list[Check]]:
        """Let a version serve under an alias, if its gate passes; with the gate's checks.

        `force` does it although the gate fails, and that is recorded. A version that the alias has already
        stays.

        Raises:
            RegistryError: the gate fails, no reason was given, or there is no such version.
            ArtifactError: its directory holds another model by now.
        """
        check_request(alias, why)
        version, checks = self.admit(reference, alias, force=force)
        if alias not in version.aliases:
            previous = self._holder(version.name, alias)
            forced = not all(one.passed for one in checks)
            self._move(
                version.name, _event("promote", alias, version.version, previous, by, why, forced=forced)
            )
        if alias == CHAMPION and CANARY in version.aliases:
            self._move(version.name, _event("graduate", CANARY, None, version.version, by, why))
        return self.get(str(version)), checks

    def rollback(
        self, name: str, *, by: str, why: str, alias: str = CHAMPION, to_none: bool = False
    ) -> ModelVersion | None:
        """The champion before this one serves again; a canary is taken out, and then the result is None.

        `to_none`: there is no champion of the registry any more; something that was never registered serves.
        Where there was none before, that is only recorded.

        Raises:
            RegistryError: there is nothing to go back to.
        """
        check_request(alias, why)
        if to_none and self._holder(name, alias) is None:  # it is so already; who wanted it goes on record
            with self._errors(f"record the rollback of {name}"):
                self._record(name, _event("rollback", alias, None, None, by, why))
            return None
        if alias == CANARY or to_none:
            self._move(name, _event("rollback", alias, None, self._present(name, alias), by, why))
            return None
        before = self.before(name)
        self._move(name, _event("rollback", alias, before.version, self._present(name, alias), by, why))
        return self.get(str(before))

    def before(self, name: str) -> ModelVersion:
        """The last good champion before the present one.

        Raises:
            RegistryError: there is none.
            ArtifactError: its directory holds another model by now.
        """
        current = self._present(name, CHAMPION)
        there = {version.version: version for version in self.versions(name)}
        known = champions(self.history(name))
        # What was recorded after the present champion never served: its move failed.
        if current in known:
            known = known[: len(known) - 1 - known[::-1].index(current)]
        good = [number for number in known if number != current and number in there]
        if not good:
            raise RegistryError(
                f"{name}/{current} is the first champion of {name}: there is none before it to go back to. "
                "Promote another version: `accord models list` shows all"
            )
        there[good[-1]].refuse_changed()
        return there[good[-1]]

    def history(self, name: str) -> list[Event]:
        """Every move of the model's aliases, the oldest first."""
        with self._errors(f"read the history of {name}"):
            tags = next((dict(model.tags) for model in self._registered() if model.name == name), {})
        return [Event(**json.loads(value)) for key, value in sorted(tags.items()) if key.startswith(_EVENT)]

    def _present(self, name: str, alias: str) -> int:
        current = self._holder(name, alias)
        if current is None:
            raise RegistryError(
                f"{name} has no {alias}, so there is nothing to roll back; see `accord models list`"
            )
        return current

    def _holder(self, name: str, alias: str) -> int | None:
        return next((version.version for version in self.versions(name) if alias in version.aliases), None)

    def _move(self, name: str, event: Event) -> None:
        """Records a move, then makes it: what serves is never without its record."""
        with self._errors(f"move {event.alias} of {name}"):
            self._record(name, event)
            if event.version is None:
                self._client.delete_registered_model_alias(name, event.alias)
            else:
                self._client.set_registered_model_alias(name, event.alias, str(event.version))

    def _record(self, name: str, event: Event) -> None:
        # Two operators at the same microsecond write two events: the key ends in a random part.
        key = f"{_EVENT}{event.at}.{secrets.token_hex(2)}"
        self._client.set_registered_model_tag(name, key, canonical_json(vars(event)))

    def _ensure_model(self, name: str, kind: str) -> None:
        from mlflow.exceptions import MlflowException

        if any(model.name == name for model in self._registered()):
            return
        try:
            self._client.create_registered_model(name, tags={"accord.kind": kind})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another was faster
                raise

    def _registered(self) -> Iterator[Any]:
        token: str | None = None
        while True:
            page = self._client.search_registered_models(page_token=token)
            yield from (model for model in page if dict(model.tags).get("accord.kind") in KINDS)
            token = page.token
            if not token:
                return

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """MLflow's and the network's errors, as ours."""
        try:
            yield
        except AccordError:
            raise
        except Exception as error:
            text = redact_url(str(error)).strip().splitlines()
            raise RegistryError(
                f"cannot {doing} in the registry {self._shown}: "
                f"{text[0][:300] if text else type(error).__name__}. "
                "Name another with --registry or MLFLOW_REGISTRY_URI, or see that its server runs and lets "
                "you write"
            ) from None


def _event(
    action: str,
    alias: str,
    version: int | None,
    previous: int | None,
    by: str,
    why: str,
    forced: bool = False,
) -> Event:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return Event(now, action, alias, version, previous, by, why[:_MAX_REASON_CHARACTERS], forced)


def _try_database(uri: str) -> None:
    """Connects once: MLflow would try for minutes before it says that a database is not there."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()
