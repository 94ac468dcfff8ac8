"""A move by hand that fails; those that succeed are in tests/services/test_rollout_live.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from accord.registry.gate import DIFFUSION
from accord.registry.registry import Registry
from accord.registry.runs import find_models
from accord.registry.settings import GateConfig
from services.rollout.moves import MoveError, Mover
from services.rollout.sources import Gateway
from services.rollout.user_configs import UserConfigs
from tests.registry.run import GOOD, write_run
from tests.services.rollout.test_watch import Kept


class Version(SimpleNamespace):
    """What a mover reads of a registered version."""

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


class NeverLoads:
    """A gateway whose replicas cannot load anything new; meanwhile the rollout takes the canary out."""

    def __init__(self, serving: Kept) -> None:
        self.serving, self.written = serving, list[UserConfigs]()

    def models(self, kind: str) -> dict[str, str]:
        self.written.append(self.serving.configs)
        self.serving.configs = self.serving.configs.without_canary()
        return {"base": "a" * 64}


@pytest.mark.parametrize(
    ("name", "alias"), [("m", "m-3"), ("base", f"base-3-{'d' * 12}")], ids=["new name", "name of another"]
)
def test_a_model_that_is_not_loaded_takes_nothing_back_but_itself(name: str, alias: str) -> None:
    serving = Kept()
    serving.configs = serving.configs.with_model(DIFFUSION, "base-3", "/models/of another registry")
    before = serving.configs
    version = Version(name=name, version=3, kind=DIFFUSION, digest="d" * 64, directory="/runs/r/aligned")
    registry: Any = SimpleNamespace(admit=lambda *given, **named: (version, []))
    gateway = NeverLoads(serving)
    mover = Mover(serving, cast(Gateway, gateway), cast(Registry, registry), timeout_s=0.01)
    with pytest.raises(MoveError, match="was not loaded within"):
        mover.promote(f"{name}/3", by="olga", why="a test")
    assert gateway.written[-1].table(DIFFUSION).models[alias] == "/runs/r/aligned"
    assert serving.configs == before.without_canary()


def test_rollback_to_an_alias_works_where_the_registry_has_no_champion(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'models.db'}")
    for model in find_models(write_run(tmp_path / "run", summary=GOOD)):
        registry.register("accord", model, "tiny", GateConfig())
    serving = Kept()
    gateway = SimpleNamespace(default=lambda kind: serving.configs.table(kind).default)
    mover = Mover(serving, cast(Gateway, gateway), registry, timeout_s=1.0)
    moved = mover.rollback("accord-diffusion", to="next", by="olga", why="a test")
    assert (moved.alias, moved.version) == ("next", None)
    assert serving.configs.table(DIFFUSION).default == "next"
    (event,) = registry.history("accord-diffusion")
    assert (event.action, event.version, event.by, event.why) == ("rollback", None, "olga", "a test")
