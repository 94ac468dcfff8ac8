"""One set of tiny models for all tests of the jobs."""

from pathlib import Path

import pytest

from tests.ray_jobs.world import write_recipe
from tests.tiny import tiny_diffusion_directory
from tests.tiny_clip import tiny_clip_directory


@pytest.fixture(scope="session")
def model(session_dir: Path) -> Path:
    return tiny_diffusion_directory(session_dir / "model")


@pytest.fixture(scope="session")
def clip(session_dir: Path) -> Path:
    return tiny_clip_directory(session_dir / "clip")


@pytest.fixture
def recipe_path(tmp_path: Path, model: Path, clip: Path) -> Path:
    return write_recipe(tmp_path, model, clip)
