"""compose.yaml: hardened containers, files that exist, and configs that their programs would read."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.client.certificates import Authority
from tests.k8s.test_rules import promtool
from tests.lanes import missing

FOLDER = Path(__file__).parents[2] / "docker"
TEXT = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
Compose = dict[str, Any]
MAY_WRITE = {("feedback", "../runs/sandbox-demo/images")}
"""Who may write to the checkout, and where: what is recorded lies beside what a run collected."""


def problems(compose: Compose) -> Iterator[str]:
    """What is not as on Kubernetes: hardened, bounded, probed, pinned, and no secret in clear."""
    for name, service in compose["services"].items():
        if service.get("read_only") is not True:
            yield f"{name}: the root file system can be written to"
        if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get(
            "security_opt", []
        ):
            yield f"{name}: keeps privileges"
        if "mem_limit" not in service or "pids_limit" not in service:
            yield f"{name}: no limit of memory or processes"
        if "healthcheck" not in service:
            yield f"{name}: no health check"
        if not re.search(r":\d|@sha256:|:v\d", service["image"].rpartition("/")[2]):
            yield f"{name}: {service['image']} names no version"
        if "build" not in service and "user" not in service:
            yield f"{name}: no user of its own"
        for key, value in service.get("environment", {}).items():
            if re.search(r"(PASSWORD|SECRET|TOKEN|_KEY)$", key) and value:
                yield f"{name}: {key} has its value in clear"
        for port in service.get("ports", []):
            if not port.startswith("127.0.0.1:") and name != "proxy":
                yield f"{name}: {port} can be reached from outside"
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith(".") and not volume.endswith(":ro") and (name, source) not in MAY_WRITE:
                yield f"{name}: can write to the checkout ({source})"
            if not source.startswith((".", "/")) and source not in compose["volumes"]:
                yield f"{name}: {source} is no volume"
        for secret in service.get("secrets", []):
            if secret not in compose["secrets"]:
                yield f"{name}: {secret} is no secret"
        for other in service.get("depends_on", {}):
            if other not in compose["services"]:
                yield f"{name}: depends on {other}, which is not there"


def _load() -> Compose:
    loaded: Compose = yaml.safe_load(TEXT)
    return loaded


def test_the_rules_are_kept() -> None:
    assert list(problems(_load())) == []


BREAKS: dict[str, Callable[[Compose], object]] = {
    "can be written to": lambda c: c["services"]["feedback"].update(read_only=False),
    "keeps privileges": lambda c: c["services"]["feedback"].pop("cap_drop"),
    "no limit of memory": lambda c: c["services"]["grafana"].pop("mem_limit"),
    "no health check": lambda c: c["services"]["mlflow"].pop("healthcheck"),
    "names no version": lambda c: c["services"]["proxy"].update(image="nginx:latest"),
    "no user of its own": lambda c: c["services"]["proxy"].pop("user"),
    "in clear": lambda c: c["services"]["postgres"]["environment"].update(POSTGRES_PASSWORD="x"),
    "can be reached from outside": lambda c: c["services"]["serve"].update(ports=["8265:8265"]),
    "can write to the checkout": lambda c: c["services"]["serve"]["volumes"].append("../runs:/runs"),
    "is no volume": lambda c: c["services"]["serve"]["volumes"].append("cache:/cache"),
    "is no secret": lambda c: c["services"]["serve"]["secrets"].append("nothing"),
    "which is not there": lambda c: c["services"]["proxy"].update(depends_on=["envoy"]),
}


@pytest.mark.parametrize("message", BREAKS)
def test_a_broken_rule_is_caught(message: str) -> None:
    compose = _load()
    BREAKS[message](compose)
    assert any(message in problem for problem in problems(compose))


def test_what_is_mounted_is_there() -> None:
    made_by_users = {"../models", "../runs", *(source for _, source in MAY_WRITE)}
    for name, service in _load()["services"].items():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith(".") and source not in made_by_users:
                assert (FOLDER / source).exists(), f"{name} mounts {source}"


def test_our_images_are_the_dockerfiles() -> None:
    from tests.docker.dockerfile import parse

    stages = parse((FOLDER / "Dockerfile").read_text(encoding="utf-8"))[1]
    for name, service in _load()["services"].items():
        if "build" in service:
            assert service["build"]["target"] in stages, name
            assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).exists()


def test_secrets_are_not_in_git() -> None:
    ignored = (FOLDER.parent / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "/docker/secrets/" in ignored
    for secret in _load()["secrets"].values():
        assert secret["file"].startswith("secrets/")


def test_serve_reads_its_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((FOLDER / "compose" / "serve.yaml").read_text(encoding="utf-8"))
    read = ServeDeploySchema.model_validate(config)
    grace = int(_load()["services"]["serve"]["stop_grace_period"].removesuffix("s"))
    assert read.grpc_options.request_timeout_s < grace
    arguments = config["applications"][0]["args"]
    assert arguments["generation"]["num_gpus"] + arguments["reward"]["num_gpus"] <= 1


def test_the_services_read_their_configs() -> None:
    from accord.config import load_yaml, validate
    from services.config import ServeConfig
    from services.feedback.config import FeedbackServiceConfig
    from services.rollout.config import RolloutConfig

    config = yaml.safe_load((FOLDER / "compose" / "serve.yaml").read_text(encoding="utf-8"))
    validate(ServeConfig, config["applications"][0]["args"], "compose/serve.yaml")
    load_yaml(FeedbackServiceConfig, FOLDER / "compose" / "feedback.yaml")
    rollout = load_yaml(RolloutConfig, FOLDER / "compose" / "rollout.yaml")
    assert rollout.serve.url.endswith(":8265")
    assert rollout.feedback is not None  # what is recorded is judged: people speak for and against a canary
    for endpoint in (rollout.gateway, rollout.feedback, rollout.serve):
        assert _is_secret_of(endpoint.token_file, "rollout")


def test_what_is_served_is_recorded() -> None:
    from accord.config import load_yaml, validate
    from services.config import ServeConfig
    from services.feedback.config import FeedbackServiceConfig

    config = yaml.safe_load((FOLDER / "compose" / "serve.yaml").read_text(encoding="utf-8"))
    record = validate(
        ServeConfig, config["applications"][0]["args"], "compose/serve.yaml"
    ).gateway.user_config.record
    assert record is not None
    assert record.share > 0
    feedback = load_yaml(FeedbackServiceConfig, FOLDER / "compose" / "feedback.yaml")
    assert record.url == f"feedback:{feedback.grpc_port}"
    assert _is_secret_of(record.token_file, "serve")
    services = _load()["services"]
    assert set(services["serve"]["networks"]) & set(services["feedback"]["networks"])
    assert f"../runs/sandbox-demo/images:{feedback.images}" in services["feedback"]["volumes"]  # not :ro


def _is_secret_of(path: str, service: str) -> bool:
    """Whether a config's path is where Docker puts one of the container's secrets."""
    compose = _load()
    file = Path(path)
    return str(file.parent) == "/run/secrets" and file.name in compose["services"][service]["secrets"]


def test_each_secret_is_made_by_the_documentation() -> None:
    page = (FOLDER.parent / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    _, _, steps = page.partition("## One box without Kubernetes")
    for secret in _load()["secrets"].values():
        name = Path(secret["file"]).name
        made = rf"(> |--file |\bcp .* )(\S*/)?{re.escape(name)}\b"
        assert re.search(made, steps.partition("docker compose")[0]), name


def test_the_proxy_leads_to_services_ports() -> None:
    text = (FOLDER / "compose" / "nginx.conf").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:http|grpc)://(\w+):(\d+)", text))
    feedback = yaml.safe_load((FOLDER / "compose" / "feedback.yaml").read_text(encoding="utf-8"))
    serve = yaml.safe_load((FOLDER / "compose" / "serve.yaml").read_text(encoding="utf-8"))
    assert targets == {
        ("feedback", str(feedback["port"])),
        ("feedback", str(feedback["grpc_port"])),
        ("serve", str(serve["grpc_options"]["port"])),
    }


@pytest.mark.nginx
def test_nginx_reads_its_config(tmp_path: Path) -> None:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        missing("there is no nginx")
    signed = Authority(tmp_path).sign("server")
    text = (FOLDER / "compose" / "nginx.conf").read_text(encoding="utf-8")
    changes = {
        "/tmp/": f"{tmp_path}/",  # first: the others lie there
        "/run/secrets/tls_certificate": str(signed.certificate),
        "/run/secrets/tls_key": str(signed.key),
        "/dev/stderr": f"{tmp_path}/log",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    config = tmp_path / "nginx.conf"
    config.write_text(text, encoding="utf-8")
    done = subprocess.run([program, "-t", "-c", config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.prometheus
def test_prometheus_reads_its_config(tmp_path: Path) -> None:
    text = (FOLDER / "compose" / "prometheus.yaml").read_text(encoding="utf-8")
    rules = FOLDER.parent / "k8s" / "components" / "monitoring" / "prometheus-rules.yaml"
    config = tmp_path / "prometheus.yaml"
    config.write_text(text.replace("/etc/prometheus/rules.yaml", str(rules)), encoding="utf-8")
    done = subprocess.run(
        [promtool(), "check", "config", config], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
