"""The serving config, the table of models, the catalogue of errors and the port: without Ray."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from accord.config import load_yaml, validate
from accord.errors import AccordError, ConfigError
from services.config import ModelTable, ServeConfig
from services.gateway.errors import CODES, Reason, RequestError, Violation, invalid, rich_status
from services.local import ENVIRONMENTS, check_models, environment
from services.models import Shelf


def test_every_shipped_environment_is_valid() -> None:
    files = sorted(ENVIRONMENTS.glob("*.yaml"))
    assert "local" in [file.stem for file in files]
    for file in files:
        load_yaml(ServeConfig, file)


def test_a_default_that_is_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="the default 'c' is none of the models: a, b"):
        validate(ModelTable, {"models": {"a": "x", "b": "y"}, "default": "c"}, "here")


def test_a_gateway_that_serve_would_cut_off_first_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be below gateway\.max_ongoing_requests"):
        environment(None, ["gateway.max_ongoing_requests=100"])


def test_the_command_lines_models_become_the_defaults(tmp_path: Path) -> None:
    config = environment(None, [], model=str(tmp_path), reward_model="pkg://accord.shapes/weights/clip")
    assert config.generation.user_config.default == "model"
    assert config.generation.user_config.models["model"] == str(tmp_path)
    assert config.reward.user_config.models["reward"] == "pkg://accord.shapes/weights/clip"


def test_a_port_in_use_is_told(tmp_path: Path, root: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "services.local",
                "--port",
                str(port),
                "--tokens",
                str(tmp_path / "t.yaml"),
            ],
            cwd=root,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    assert done.returncode == 2
    assert f"port {port} cannot be used" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "t.yaml").exists()


def test_every_reason_has_a_code_and_is_documented(root: Path) -> None:
    assert set(CODES) == set(Reason)
    text = (root / "docs" / "serve.md").read_text()
    for reason in Reason:
        assert f"`{reason.value}`" in text, reason


def test_a_status_stays_short_enough_for_its_trailer() -> None:
    violations = [Violation(f"pairs[{n}].prompt" * 20, "ä" * 5000) for n in range(256)]
    status = rich_status(invalid(violations), "i" * 128)
    assert len(status.details) == 2
    # As sent: details in base64, the message with every byte escaped.
    assert status.ByteSize() * 4 / 3 + 3 * len(status.message.encode()) < 8192 - 1000
    assert rich_status(RequestError(Reason.RATE_LIMITED, "x", retry_after_s=1.5), "id").details


class _Models:
    """Loads names of a dictionary; notes what is open."""

    def __init__(self) -> None:
        self.content = {"a": "A1", "b": "B1"}
        self.open: list[str] = []

    def load(self, directory: str) -> str:
        if directory not in self.content:
            raise AccordError(f"there is no {directory}")
        return self.content[directory]

    def shelf(self, retire_after_s: float = 0.0) -> Shelf[str]:
        return Shelf(
            self.load,
            lambda model: f"digest {model}",
            ThreadPoolExecutor(1),
            retire_after_s,
            opened=self.open.append,
            closed=self.open.remove,
        )


def _table(default: str, **models: str) -> ModelTable:
    return ModelTable(models=models, default=default)


def _run(test: Callable[[_Models], Any]) -> None:
    asyncio.run(test(_Models()))


def test_a_model_in_use_outlives_its_place_in_the_table() -> None:
    async def test(models: _Models) -> None:
        shelf = models.shelf()
        await shelf.apply(_table("x", x="a"))
        with shelf.use("digest A1") as model:
            assert model == "A1"
            await shelf.apply(_table("x", x="b"))
            await shelf.settled()
            assert [one.digest for one in shelf.catalogue().models] == ["digest B1"]
            await shelf.sweep()
            assert sorted(models.open) == ["A1", "B1"]
        await shelf.sweep()
        assert models.open == ["B1"]
        with shelf.use("digest A1") as model:
            assert model is None

    _run(test)


def test_a_failed_load_keeps_the_old_table_and_the_first_one_raises() -> None:
    async def test(models: _Models) -> None:
        shelf = models.shelf()
        with pytest.raises(AccordError, match="there is no z"):
            await shelf.apply(_table("x", x="z"))
        await shelf.apply(_table("x", x="a"))
        await shelf.apply(_table("y", y="z"))
        await shelf.settled()
        assert shelf.catalogue().default == "x"
        assert shelf.failures == 1

    _run(test)


def test_two_aliases_of_one_model_load_it_once_and_a_retired_one_can_return() -> None:
    async def test(models: _Models) -> None:
        shelf = models.shelf(retire_after_s=3600)
        await shelf.apply(_table("x", x="a", y="a"))
        assert models.open == ["A1"]
        await shelf.apply(_table("x", x="b"))
        await shelf.settled()
        await shelf.sweep()
        assert models.open == ["A1", "B1"]
        await shelf.apply(_table("x", x="a"))
        await shelf.settled()
        assert models.open == ["A1", "B1"]
        assert shelf.catalogue().find("") == shelf.catalogue().find("digest A1")

    _run(test)


@pytest.mark.parametrize("which", ["model", "reward_model"])
def test_a_model_that_is_not_there_is_told_before_anything_starts(tmp_path: Path, which: str) -> None:
    check_models(environment(None, []))
    with pytest.raises(ConfigError, match=r"there is no directory .*/nowhere"):
        check_models(environment(None, [], **{which: str(tmp_path / "nowhere")}))
