from pathlib import Path

import pytest

from accord.diffusion.model import DiffusionModel, load_diffusion_model
from tests.tiny import tiny_diffusion_directory


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion_directory(tmp_path_factory.mktemp("epsilon"))


@pytest.fixture(scope="session")
def tiny_model(tiny_directory: Path) -> DiffusionModel:
    """Shared by all tests: do not change it."""
    return load_diffusion_model(tiny_directory)


@pytest.fixture(scope="session")
def tiny_v_model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    """v-prediction with zero terminal signal-to-noise ratio, as the shapes world has it."""
    directory = tmp_path_factory.mktemp("v")
    return load_diffusion_model(
        tiny_diffusion_directory(directory, prediction_type="v_prediction", zero_terminal_snr=True)
    )
