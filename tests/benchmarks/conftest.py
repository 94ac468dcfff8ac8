from pathlib import Path

import pytest

from tests.tiny import tiny_diffusion_directory


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion_directory(tmp_path_factory.mktemp("benchmarks"))
