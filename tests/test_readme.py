"""Every command of the README and of its pages is run, as it stands there but on the smallest recipe."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from accord.recipe import RayConfig
from ray_jobs.cluster import ADDRESS_VARIABLE
from tests.conftest import ROOT

PAGES = ("README.md", "docs/research.md", "docs/operate.md", "docs/sandbox.md")
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    blocks = BLOCK.findall((ROOT / page).read_text())
    return [line for block in blocks for line in block.strip().splitlines()]


ALL = [(page, command) for page in PAGES for command in commands(page)]


def shrunk(command: str, directory: Path) -> list[str]:
    """The command's words: the demo's recipe made small, everything below runs/ put into `directory`."""
    words = shlex.split(command.replace("recipes/sandbox/demo.yaml", "recipes/sandbox/smoke.yaml"))
    words = [re.sub(r"^(sqlite:///)?runs/", rf"\g<1>{directory}/", word) for word in words]
    venv = Path(sys.executable).parent
    words[0] = words[0].replace(".venv/bin", str(venv))
    if "--study" in words:
        words += ["--set", f"run_dir={directory}/study"]
    if command == "make demo":
        arguments = f"--recipe recipes/sandbox/smoke.yaml --run-dir {directory}/demo"
        made = ["-o", f"{venv.parent}/.installed", f"VENV={venv.parent}"]  # this environment, as it is
        return ["make", *made, "demo", f"ARGS={arguments}"]
    if "--recipe" in words and "--run-dir" not in words:
        words += ["--run-dir", f"{directory}/demo"]
    if "softmax" in command and "--recipe" in words:  # Ray has shown itself by then
        words += ["--set", "ray.local=true"]
    if "ui" in words:  # a server that never ends: see that its store is there instead
        return [words[0], "experiments", "search"]
    return words


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        words, cwd=ROOT, env=merged, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800
    )


def test_the_pages_are_there_and_have_commands() -> None:
    assert {page for page, _ in ALL} >= {"README.md", "docs/research.md", "docs/operate.md"}
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            if not link.startswith("http"):
                assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


def test_make_help_lists_what_the_readme_names() -> None:
    listed = run(["make", "help"]).stdout
    named = re.findall(r"^make ([a-z-]+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert named == ["demo", "test"]
    assert all(target in listed for target in named)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_runs(tmp_path: Path, ray_cluster: RayConfig) -> None:
    import ray

    # One cluster for all of them, which is also what `--address auto` finds.
    address = ray.get_runtime_context().gcs_address
    store = f"sqlite:///{tmp_path}/demo/mlflow.db"
    for page, command in dict.fromkeys(ALL):
        if command == "make test":  # that is what runs this
            continue
        environment = {ADDRESS_VARIABLE: address, "MLFLOW_TRACKING_URI": store}
        done = run(shrunk(command, tmp_path), **environment)
        assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    tuned = [
        json.loads((tmp_path / name / "summary.json").read_text())["digests"]["aligned"]
        for name in ("demo", "softmax")
    ]
    assert tuned[0] != tuned[1]
