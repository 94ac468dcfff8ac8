"""The benchmark of reward learning: its planted judge can be learned, and its seconds add up."""

from pathlib import Path

import pytest

from accord.reward.settings import RewardConfig
from benchmarks.reward import PARTS, World, learn


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("features"), 1500, 64, seed=0)


def test_the_planted_judge_is_learned_but_not_beyond_its_errors(world: World, tmp_path: Path) -> None:
    config = RewardConfig(combine="adapter", learning_rate=1e-2, weight_decay=0.5, steps=60, fast=True)
    found = learn(world, config, tmp_path)
    assert world.ceiling == pytest.approx(0.9, abs=0.03)
    assert 0.7 < found["auc"] < found["auc_truth"]
    assert found["auc"] < world.ceiling + 0.05
    for kind in ("wall_s", "cpu_s"):
        parts = found[f"parts_{kind}"]
        assert sum(parts[part] for part in PARTS) == pytest.approx(found[kind])
        assert min(parts.values()) >= 0
    assert found["cpu_s"] > 0
