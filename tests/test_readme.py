"""Every command of the README and of its pages is run, as it stands there but on the smallest recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from accord.recipe import RayConfig
from ray_jobs.cluster import ADDRESS_VARIABLE
from tests.pages import ALL, PAGES, ROOT, run, shrunk


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
def test_every_command_runs(demo_run: Path, ray_cluster: RayConfig) -> None:
    """The README's first, `make demo`, is run by `demo_run`."""
    import ray

    directory = demo_run.parent

    # One cluster for all of them, which is also what `--address auto` finds.
    address = ray.get_runtime_context().gcs_address
    store = f"sqlite:///{demo_run}/mlflow.db"
    for page, command in dict.fromkeys(ALL):
        if command in ("make demo", "make test"):  # the second is what runs this
            continue
        environment = {ADDRESS_VARIABLE: address, "MLFLOW_TRACKING_URI": store}
        done = run(shrunk(command, directory), **environment)
        assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert (demo_run / "report.html").stat().st_size > 10_000
    tuned = [
        json.loads((directory / name / "summary.json").read_text())["digests"]["aligned"]
        for name in ("demo", "softmax")
    ]
    assert tuned[0] != tuned[1]
