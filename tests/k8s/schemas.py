"""Strict checks of a manifest's fields: Kubernetes' own schemas, and those of custom resources (crds/)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from tests.k8s.manifests import Manifest, where

CRDS = Path(__file__).parent / "crds"
KUBERNETES = "1.31"  # the oldest version that we say we run on


def problems(manifest: Manifest) -> list[str]:
    """What is wrong with a manifest's fields; empty when nothing is. A field that nobody knows is wrong."""
    return list(_problems(json.dumps(manifest, sort_keys=True)))  # most of them are in several builds


@functools.cache
def _problems(text: str) -> tuple[str, ...]:
    manifest = json.loads(text)
    version, kind = manifest.get("apiVersion"), manifest.get("kind")
    if not isinstance(version, str) or not isinstance(kind, str):
        return ("a manifest needs apiVersion and kind",)
    group, _, number = version.rpartition("/")
    if ("." in group and not group.endswith(".k8s.io")) or group in (
        "gateway.networking.k8s.io",
        "kueue.x-k8s.io",
    ):
        validator = _custom(f"{kind}.{group}.{number}")
        if validator is None:
            return (f"{where(manifest)}: no schema of {kind} in {version}; add it to {CRDS.name}/",)
        body = {
            key: value for key, value in manifest.items() if key not in ("apiVersion", "kind", "metadata")
        }
        errors = sorted(validator.iter_errors(body), key=lambda error: list(map(str, error.absolute_path)))
        return tuple(f"{where(manifest)} {error.json_path}: {error.message}"[:400] for error in errors)
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = ".".join(map(str, error.path))
        return (f"{where(manifest)} {path}: {error.message}"[:400],)
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
        return (f"{where(manifest)}: {error}",)
    return ()


@functools.cache
def _custom(name: str) -> jsonschema.Draft202012Validator | None:
    path = CRDS / f"{name}.json"
    if not path.exists():
        return None
    schema = json.loads(path.read_text(encoding="utf-8"))
    for key in ("apiVersion", "kind", "metadata"):
        schema["properties"].pop(key, None)
    schema["required"] = [
        key for key in schema.get("required", []) if key not in ("apiVersion", "kind", "metadata")
    ]
    return jsonschema.Draft202012Validator(_strict(schema))


def _strict(schema: Any) -> Any:
    """The schema, with every object closed that does not say that it is open."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: {name: _strict(part) for name, part in value.items()} if key == "properties" else _strict(value)
        for key, value in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        # a pod template's own metadata is `type: object` in CRDs and has no properties: it stays open
        closed.setdefault("additionalProperties", False)
    if schema.get("nullable"):
        return {"anyOf": [closed, {"type": "null"}]}
    return closed
