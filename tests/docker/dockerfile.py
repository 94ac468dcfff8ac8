"""A Dockerfile's stages and instructions, and what we ask of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

IMAGES = ("serve", "train", "feedback")
USER = "10001:10001"


@dataclass
class Stage:
    """One FROM, with its instructions as (keyword, rest) and without its parents'."""

    name: str
    parent: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [rest for key, rest in self.steps if key == keyword]


def parse(text: str) -> tuple[list[str], dict[str, Stage]]:
    """The arguments before the first FROM, and the stages by name."""
    arguments: list[str] = []
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for instruction in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        keyword, _, rest = instruction.strip().partition(" ")
        if keyword == "FROM":
            parent, _, name = rest.partition(" AS ")
            current = stages[name or parent] = Stage(name or parent, parent)
        elif current is None:
            arguments.append(rest)
        else:
            current.steps.append((keyword, rest))
    return arguments, stages


def lineage(stages: dict[str, Stage], name: str) -> list[Stage]:
    """The stage and what it is FROM, the stage itself last."""
    chain: list[Stage] = []
    while name in stages:
        chain.insert(0, stages[name])
        name = stages[name].parent
    return chain


def problems(text: str, root: Path) -> Iterator[str]:
    """What breaks the promises of docs/kubernetes.md, "Images"; `root` is the build's context."""
    arguments, stages = parse(text)
    if not any(argument.startswith("BASE=") for argument in arguments):
        yield "the base image is no build argument"
    for name in IMAGES:
        if name not in stages:
            yield f"there is no stage {name}"
            continue
        chain = lineage(stages, name)
        yield from _image_problems(name, chain)
    for stage in stages.values():
        yield from _stage_problems(stage, stages, root)


def _image_problems(name: str, chain: list[Stage]) -> Iterator[str]:
    users = [user for stage in chain for user in stage.all("USER")]
    if not users or users[-1] != USER or (chain[-1].steps[-1][0] == "USER" and users[-1] != USER):
        yield f"{name}: its user is {users[-1:] or 'root'}, not {USER}"
    labels = " ".join(rest for stage in chain for rest in stage.all("LABEL"))
    for label in ("title", "description", "version", "revision"):
        if f"org.opencontainers.image.{label}=" not in labels:
            yield f"{name}: no OCI label {label}"
    run = " ".join(rest for stage in chain for rest in stage.all("RUN"))
    for program in ("bash", "wget", "ca-certificates"):
        if not re.search(rf"apt-get install [^&]*\b{program}\b", run):
            yield f"{name}: no {program}, which KubeRay's probes and start commands need"
    environment = " ".join(rest for stage in chain for rest in stage.all("ENV"))
    if "HOME=/tmp" not in environment:
        yield f"{name}: HOME is not where a read-only root lets one write"
    if not any(stage.all("CMD") for stage in chain):
        yield f"{name}: no CMD"


def _stage_problems(stage: Stage, stages: dict[str, Stage], root: Path) -> Iterator[str]:
    for rest in stage.all("ARG") + stage.all("ENV"):
        if re.search(r"(PASSWORD|SECRET|TOKEN|_KEY)\b", rest):
            yield f"{stage.name}: a secret by {rest.split('=')[0]} would stay in the image's history"
    for rest in stage.all("RUN"):
        for command in rest.split("&&"):
            if "pip install" in command and not ("-c constraints.txt" in command or "--no-deps" in command):
                yield f"{stage.name}: pip installs what constraints.txt does not pin: {command.strip()}"
            if "apt-get install" in command and "/var/lib/apt/lists" not in rest:
                yield f"{stage.name}: apt's lists stay in the image"
    for rest in stage.all("COPY"):
        parts = rest.split()
        if parts[0].startswith("--from="):
            if parts[0].removeprefix("--from=") not in stages:
                yield f"{stage.name}: copies from {parts[0]}, which is no stage"
            continue
        for source in parts[:-1]:
            if not (root / source).exists():
                yield f"{stage.name}: copies {source}, which is not there"
            elif not let_in(source, (root / ".dockerignore").read_text(encoding="utf-8")):
                yield f"{stage.name}: copies {source}, which .dockerignore keeps out"


def let_in(path: str, ignore: str) -> bool:
    """Whether a .dockerignore of our form (everything out, single paths in) lets a path through."""
    rules = [line.strip() for line in ignore.splitlines() if line.strip() and not line.startswith("#")]
    if rules[0] != "*":
        raise AssertionError(".dockerignore must begin with *, so that nothing gets in by accident")
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    return any(path == rule or path.startswith(f"{rule}/") for rule in allowed)
