"""A Kubernetes API of a few paths, for the real client: it checks every body against the real CRD's
schema."""

from __future__ import annotations

import base64
import http.server
import json
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

SCHEMA = Path(__file__).parents[2] / "k8s" / "crds" / "RayJob.ray.io.v1.json"
RAY_JOBS = re.compile(r"^/apis/ray\.io/v1/namespaces/([^/]+)/(rayjobs|rayservices)(?:/([^/?]+))?$")
CONFIG_MAPS = re.compile(r"^/api/v1/namespaces/([^/]+)/configmaps$")
SECRETS = re.compile(r"^/api/v1/namespaces/([^/]+)/secrets/([^/]+)$")
LOGS = re.compile(r"^/api/v1/namespaces/([^/]+)/services/([^/]+)-head-svc:8265/proxy/api/jobs/([^/]+)/logs$")
RAY_TOKEN = "token-of-ray"
TOKEN = "token-of-kubernetes"


class KubernetesServer:
    """Its state is open to the tests: `jobs` and `services` by name, `logs` by Ray cluster, `fail` by
    verb."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.services: dict[str, dict[str, Any]] = {}
        self.config_maps: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.fail: dict[str, tuple[int, str, str]] = {}
        """ "POST rayjobs" -> (status, message, kind); the kind "" is an answer that is not of the API's
        form"""
        self.has_crd = True
        handler = type("Handler", (_Handler,), {"state": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def write_kubeconfig(self, path: Path) -> Path:
        """A kubeconfig with two contexts: this server, and one where nobody answers."""
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [
                {"name": "here", "cluster": {"server": self.url}},
                {"name": "gone", "cluster": {"server": "http://127.0.0.1:9"}},
            ],
            "users": [{"name": "olga", "user": {"token": TOKEN}}],
            "contexts": [
                {"name": name, "context": {"cluster": name, "user": "olga"}} for name in ("here", "gone")
            ],
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def set_status(self, name: str, **status: Any) -> None:
        """What the operator would write."""
        self.jobs[name]["status"] = status


class _Handler(http.server.BaseHTTPRequestHandler):
    state: KubernetesServer

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if match := RAY_JOBS.match(path):
            self._ray_jobs(match[2], match[3], query)
        elif match := SECRETS.match(path):
            secret = {"auth_token": base64.b64encode(RAY_TOKEN.encode()).decode()}
            self._answer(200, {"kind": "Secret", "metadata": {"name": match[2]}, "data": secret})
        elif match := LOGS.match(path):
            if match[2] not in self.state.logs:
                self._status(503, "no endpoints available for service", "services")
            elif self.headers.get("x-ray-authorization") != f"Bearer {RAY_TOKEN}":
                self._status(401, "Unauthorized", "services")
            else:
                self._answer(200, {"logs": self.state.logs[match[2]]})
        else:
            self._status(404, f"unknown path {path}", "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        store, kind = self.state.config_maps, "configmaps"
        if RAY_JOBS.match(self.path.partition("?")[0]):
            store, kind = self.state.jobs, "rayjobs"
        elif CONFIG_MAPS.match(self.path.partition("?")[0]) is None:
            self._status(404, f"unknown path {self.path}", "")
            return
        if self._failed(f"POST {kind}"):
            return
        name = body["metadata"]["name"]
        wrong = problems(body)
        if wrong:
            self._status(422, f'RayJob.ray.io "{name}" is invalid: {wrong[0]}', kind)
        elif name in store:
            self._status(409, f'{kind} "{name}" already exists', kind)
        else:
            body["metadata"].update(
                uid=f"uid-of-{name}", creationTimestamp=f"2026-11-26T10:00:{len(store):02}Z"
            )
            store[name] = body
            self._answer(201, body)

    def do_DELETE(self) -> None:
        match = RAY_JOBS.match(self.path.partition("?")[0])
        if self._failed("DELETE rayjobs"):
            return
        assert match is not None
        del self.state.jobs[match[3]]
        self._answer(200, {"kind": "Status", "status": "Success"})

    def _ray_jobs(self, plural: str, name: str | None, query: str) -> None:
        if not self.state.has_crd:
            self._answer(404, "404 page not found")
        elif self._failed(f"GET {plural}"):
            return
        elif name is None:
            store = self.state.jobs if plural == "rayjobs" else self.state.services
            assert plural != "rayjobs" or "labelSelector=app.kubernetes.io" in query
            self._answer(200, {"kind": "List", "items": list(store.values())})
        elif name in self.state.jobs:
            self._answer(200, self.state.jobs[name])
        else:
            self._status(404, f'rayjobs.ray.io "{name}" not found', "rayjobs")

    def _failed(self, what: str) -> bool:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._status(401, "Unauthorized", "")
            return True
        if what not in self.state.fail:
            return False
        self._status(*self.state.fail[what])
        return True

    def _status(self, code: int, message: str, kind: str) -> None:
        status = {
            "kind": "Status",
            "status": "Failure",
            "code": code,
            "message": message,
            "details": {"kind": kind},
        }
        self._answer(code, status)

    def _answer(self, code: int, body: Any) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json" if not isinstance(body, str) else "text/plain")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def problems(body: dict[str, Any]) -> list[str]:
    """What the API server would refuse; a field that the schema does not know too (kubectl's strict
    check)."""
    if body["kind"] != "RayJob":
        try:
            kubernetes_validate.validate(body, "1.31", strict=True)
        except kubernetes_validate.ValidationError as error:
            return [error.message]
        return []
    schema = json.loads(SCHEMA.read_text())
    for key in ("apiVersion", "kind", "metadata"):
        schema["properties"].pop(key, None)
    spec = {key: value for key, value in body.items() if key not in ("apiVersion", "kind", "metadata")}
    found = jsonschema.Draft202012Validator(_closed(schema)).iter_errors(spec)
    wrong = [f"{error.json_path}: {error.message}"[:300] for error in found]
    name = body["metadata"]["name"]
    if len(name) > 47 or not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        wrong.append(f"the name {name!r} is none for a RayJob")
    return wrong


def _closed(schema: Any) -> Any:
    """The schema with every object closed that names its fields."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: {name: _closed(part) for name, part in value.items()} if key == "properties" else _closed(value)
        for key, value in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
