"""What all tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch and Ray are imported: tests are tiny, and threads that wait for one another slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# On a busy machine Ray's workers shall not be last in the queue (its default niceness is 15), may take
# minutes to start, and are not ended because others have filled the memory or the disk.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_worker_register_timeout_seconds", "300")
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process a training, for clouds only
os.environ.setdefault("RAY_local_fs_capacity_threshold", "0.999")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

from accord.recipe import RayConfig
from ray_jobs import cluster
from tests.lanes import missing
from tests.pages import ALL, ROOT, run, shrunk

torch.set_num_threads(1)

# The same examples in every run, and as long for each as a busy machine takes.
hypothesis.settings.register_profile(
    "accord",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("accord")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        missing("there is no CUDA device", lane="gpu")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def session_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for what is costly to make and is made once a session."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="session")
def empty_store(session_dir: Path) -> bytes:
    """A registry's database without models: MLflow takes seconds to make one."""
    from accord.registry.registry import Registry

    path = session_dir / "empty.db"
    Registry(f"sqlite:///{path}")
    return path.read_bytes()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayConfig]:
    """A local cluster of two CPUs, which all tests that need Ray share."""
    config = RayConfig(num_cpus=2)
    with cluster.connect():
        cluster.ensure(config)
        yield config


@pytest.fixture(scope="session")
def demo_run(session_dir: Path) -> Path:
    """The run directory of `make demo`, the README's first command, on the smallest recipe."""
    assert ("README.md", "make demo") in ALL
    directory = session_dir / "pages"
    done = run(shrunk("make demo", directory), ACCORD_HOME=str(session_dir / "home"))
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return directory / "demo"
