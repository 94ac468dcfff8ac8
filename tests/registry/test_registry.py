"""Registering, promoting and rolling back, on a real MLflow registry in SQLite."""

from __future__ import annotations

import json
import urllib.parse
from pathlib import Path

import pytest

from accord.errors import ArtifactError
from accord.registry.registry import CANARY, Registry, RegistryError
from accord.registry.runs import find_models
from accord.registry.settings import GateConfig
from tests.registry.run import GOOD, write, write_run

NAME = "accord-diffusion"
WHO = {"by": "olga", "why": "won the votes"}


@pytest.fixture
def registry(tmp_path: Path, empty_store: bytes) -> Registry:
    (tmp_path / "models.db").write_bytes(empty_store)
    return Registry(f"sqlite:///{tmp_path / 'models.db'}")


def add(registry: Registry, directory: Path, content: str, *, good: bool = True) -> str:
    """NAME/VERSION of the diffusion model of a new run."""
    bad = {**GOOD, "readable": {"base": {"value": 0.9}, "aligned": {"value": 0.1}}}
    run = write_run(directory / content, content, GOOD if good else bad)
    versions = [registry.register("accord", model, "tiny", GateConfig())[0] for model in find_models(run)]
    return next(str(version) for version in versions if version.kind == "diffusion")


def champion(registry: Registry) -> int:
    return registry.get(f"{NAME}@champion").version


def test_a_registered_model_says_what_it_is_and_what_it_is_from(registry: Registry, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", summary=GOOD)
    for model in find_models(run):
        version, new = registry.register("accord", model, "tiny", GateConfig(max_frechet_ratio=2.0))
        assert new
        assert registry.get(version.digest[:12]) == registry.get(str(version)) == version
        assert version.directory == str(model.directory)
        assert version.gate.max_frechet_ratio == 2.0
        assert (
            version.ancestors["snapshot"]
            == json.loads((run / "snapshot" / "manifest.json").read_text())["digest"]
        )
    assert set(registry.get(NAME + "/1").ancestors) == {
        "model",
        "scores",
        "candidates",
        "reward",
        "snapshot",
        "clip",
    }
    assert registry.get(NAME + "/1").measured["frechet_ratio"] == pytest.approx(0.95)
    assert registry.get("accord-reward/1").measured["reward_auc.low"] == 0.6


def test_the_same_model_is_one_version_and_takes_later_numbers(registry: Registry, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = [registry.register("accord", model, "tiny", GateConfig()) for model in find_models(run)]
    assert [version.measured for version, _ in first] == [{}, {}]
    with pytest.raises(RegistryError, match=r"not measured(.|\n)*accord evaluate"):
        registry.promote(NAME + "/1", **WHO)
    write_run(tmp_path / "run", summary=GOOD)
    again = [registry.register("accord", model, "tiny", GateConfig()) for model in find_models(run)]
    assert [(str(version), new) for version, new in again] == [
        ("accord-diffusion/1", False),
        ("accord-reward/1", False),
    ]
    registry.promote(NAME + "/1", **WHO)
    assert champion(registry) == 1
    # A registry that runs as a server takes neither a local path nor a URI without an absolute one.
    source = urllib.parse.urlparse(registry._client.get_model_version(NAME, "1").source)
    assert (source.scheme, source.path[:1]) == ("accord", "/")


def test_a_model_that_fails_its_gate_serves_only_by_force_and_on_record(
    registry: Registry, tmp_path: Path
) -> None:
    bad = add(registry, tmp_path, "bad", good=False)
    for alias in ("champion", "canary"):
        with pytest.raises(RegistryError, match=r"FAIL  readable_ratio: 0\.1111, required >= 0\.95"):
            registry.promote(bad, alias=alias, **WHO)
    assert registry.history(NAME) == []
    registry.promote(bad, force=True, **WHO)
    (event,) = registry.history(NAME)
    assert event.forced
    assert (event.action, event.version, event.by, event.why) == ("promote", 1, "olga", "won the votes")
    with pytest.raises(RegistryError, match="--why"):
        registry.promote(bad, by="olga", why=" ", force=True)


def test_rollback_returns_to_the_last_good_one_and_not_to_what_was_rolled_back(
    registry: Registry, tmp_path: Path
) -> None:
    one, two, three = (add(registry, tmp_path, content) for content in ("one", "two", "three"))
    for version in (one, two, two):  # twice is once
        registry.promote(version, **WHO)
    registry.rollback(NAME, **WHO)
    assert champion(registry) == 1
    registry.promote(three, **WHO)
    returned = registry.rollback(NAME, by="rollout", why="errors")
    assert returned is not None
    assert (returned.version, champion(registry)) == (1, 1)  # 2 was taken out before: it is not good
    with pytest.raises(RegistryError, match="none before it"):
        registry.rollback(NAME, **WHO)
    moves = [(event.action, event.version, event.previous) for event in registry.history(NAME)]
    assert moves == [
        ("promote", 1, None),
        ("promote", 2, 1),
        ("rollback", 1, 2),
        ("promote", 3, 1),
        ("rollback", 1, 3),
    ]


def test_what_was_never_registered_can_serve_again(registry: Registry, tmp_path: Path) -> None:
    one, two = add(registry, tmp_path, "one"), add(registry, tmp_path, "two")
    registry.promote(one, **WHO)
    assert registry.rollback(NAME, to_none=True, **WHO) is None
    assert registry.get(one).aliases == ()
    with pytest.raises(RegistryError, match="has no champion"):
        registry.rollback(NAME, **WHO)
    assert registry.rollback(NAME, to_none=True, **WHO) is None  # once more, as after an interruption
    moves = [(event.action, event.version, event.previous) for event in registry.history(NAME)]
    assert moves == [("promote", 1, None), ("rollback", None, 1), ("rollback", None, None)]
    registry.promote(two, **WHO)
    with pytest.raises(RegistryError, match="none before it"):  # one was found wanting
        registry.rollback(NAME, **WHO)


def test_rollback_never_goes_to_what_was_recorded_but_never_served(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry fails between the record of a promotion and its move."""
    first, second, third = (add(registry, tmp_path, content) for content in ("a", "b", "c"))
    registry.promote(first, **WHO)
    registry.promote(second, **WHO)
    with monkeypatch.context() as broken:
        broken.setattr(registry._client, "set_registered_model_alias", lambda *_: 1 / 0)
        with pytest.raises(RegistryError):
            registry.promote(third, **WHO)
    assert str(registry.rollback(NAME, **WHO)) == first


def test_another_gate_for_a_registered_model_is_on_record(registry: Registry, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", summary=GOOD)
    for gate in (GateConfig(), GateConfig(), GateConfig(max_frechet_ratio=99.0)):
        for model in find_models(run):
            registry.register("accord", model, "tiny", gate)
    assert [(event.action, event.version, event.why) for event in registry.history(NAME)] == [
        ("register", 1, "another gate than before")
    ]


def test_a_canary_is_taken_out_or_becomes_champion(registry: Registry, tmp_path: Path) -> None:
    one, two = add(registry, tmp_path, "one"), add(registry, tmp_path, "two")
    registry.promote(one, **WHO)
    registry.promote(two, alias=CANARY, **WHO)
    assert (champion(registry), registry.get(f"{NAME}@canary").version) == (1, 2)
    with pytest.raises(RegistryError, match="is the champion"):
        registry.promote(one, alias=CANARY, **WHO)
    assert registry.rollback(NAME, alias=CANARY, **WHO) is None
    with pytest.raises(RegistryError, match="has no canary"):
        registry.rollback(NAME, alias=CANARY, **WHO)
    assert champion(registry) == 1
    registry.promote(two, alias=CANARY, **WHO)
    registry.promote(two, **WHO)
    assert registry.get(two).aliases == ("champion",)
    registry.rollback(NAME, **WHO)
    assert champion(registry) == 1


def test_a_directory_that_holds_another_model_by_now_is_refused(registry: Registry, tmp_path: Path) -> None:
    one = add(registry, tmp_path, "one")
    write(tmp_path / "one" / "aligned", "diffusion_model", "trained anew")
    with pytest.raises(ArtifactError, match="holds another model"):
        registry.promote(one, **WHO)
    with pytest.raises(ArtifactError, match=r"measured on another model.*accord evaluate"):
        find_models(tmp_path / "one")
    (tmp_path / "one" / "reward" / "content.txt").write_text("damaged")
    (tmp_path / "one" / "summary.json").unlink()
    with pytest.raises(ArtifactError, match="changed or damaged"):
        find_models(tmp_path / "one")


def test_models_of_others_in_the_same_mlflow_are_left_alone(registry: Registry, tmp_path: Path) -> None:
    registry._client.create_registered_model("someone-elses")
    registry._client.create_model_version("someone-elses", source="s3://bucket/model")
    one = add(registry, tmp_path, "one")
    assert {version.name for version in registry.versions()} == {"accord-diffusion", "accord-reward"}
    assert str(registry.get(one)) == one


def test_errors_say_what_there_is_and_hide_passwords(registry: Registry, tmp_path: Path) -> None:
    add(registry, tmp_path, "one")
    for wrong in ("accord-diffusion/7", "accord-diffusion@champion", "ffff", ""):
        with pytest.raises(RegistryError, match=r"there is no model(.|\n)*accord-diffusion/1"):
            registry.get(wrong)
    with pytest.raises(RegistryError, match="expected one of champion, canary"):
        registry.promote("accord-diffusion/1", alias="best", **WHO)
    with pytest.raises(ArtifactError, match="accord loop"):
        find_models(tmp_path)
    for uri in ("postgresql://user:s3cret@127.0.0.1:1/models", "http://user:s3cret@127.0.0.1:1"):
        with pytest.raises(RegistryError, match="--registry") as caught:
            Registry(uri)
        assert "s3cret" not in str(caught.value)
