"""Walks over run directories, and the commands that show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from accord.artifacts import read_manifest
from accord.errors import ArtifactError
from accord.registry.commands import app
from accord.registry.lineage import Lineage, image_models, judgements_by_rater
from tests.ray_jobs.world import write_recipe
from tests.registry.run import GOOD, write_run


def digest(run: Path, name: str) -> str:
    return read_manifest(run / name).digest


def test_a_model_is_walked_back_to_its_snapshot_and_votes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "a")
    steps = Lineage.scan([tmp_path / "runs"]).back(digest(run, "aligned"))
    names = [step.name for step in steps]
    assert names[0] == "aligned"
    assert set(names) == {"aligned", "model", "scores", "candidates", "reward", "snapshot", "clip"}
    depth = {step.name: step.depth for step in steps}
    assert depth["scores"] < depth["reward"] < depth["snapshot"]
    assert sorted(step.name for step in steps if step.manifest is None) == ["clip", "model"]
    counts = judgements_by_rater(run / "snapshot")
    assert counts == {"ann": 1, "bob": 2}


def test_a_snapshot_is_walked_forward_to_all_models(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name, name) for name in ("one", "two"))
    lineage = Lineage.scan([tmp_path])
    assert digest(first, "snapshot") == digest(second, "snapshot")  # the same votes
    made = {step.digest for step in lineage.forward(digest(first, "snapshot"))}
    assert {digest(run, name) for run in (first, second) for name in ("reward", "aligned")} < made
    assert digest(first, "candidates") not in made
    assert {step.name for step in lineage.forward("c" * 64)} == {"clip", "reward", "scores", "aligned"}


def test_digests_are_found_by_their_beginning(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lineage = Lineage.scan([tmp_path])
    assert lineage.find(digest(run, "reward")[:10]) == digest(run, "reward")
    with pytest.raises(ArtifactError, match="--runs"):
        lineage.find("0123456789")
    with pytest.raises(ArtifactError, match="--runs"):
        lineage.find("")
    with pytest.raises(ArtifactError, match="no directory"):
        Lineage.scan([tmp_path / "nowhere"])
    (run / "reward" / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match="damaged"):
        Lineage.scan([tmp_path])


def test_links_between_the_arms_of_a_study_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "arm").mkdir()
    (tmp_path / "arm" / "candidates").symlink_to(run / "candidates")
    (run / "loop").symlink_to(tmp_path)
    assert len(Lineage.scan([tmp_path]).artifacts) == 5


def test_a_served_image_names_its_models(tmp_path: Path) -> None:
    manifest = {"model_digest": "a" * 64, "reward_model_digest": "b" * 64, "prompt": "a star"}
    (tmp_path / "snake.json").write_text(json.dumps(manifest))
    (tmp_path / "camel.json").write_text(
        json.dumps({"manifest": {"modelDigest": "a" * 64, "rewardModelDigest": "b" * 64}})
    )
    info = PngInfo()
    info.add_text("accord", json.dumps(manifest))
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png", pnginfo=info)
    for name in ("snake.json", "camel.json", "image.png"):
        assert image_models(tmp_path / name) == {"model": "a" * 64, "reward": "b" * 64}
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "list.json").write_text("[]")
    for name in ("plain.png", "list.json", "absent.json"):
        with pytest.raises(ArtifactError, match="no manifest of a served image"):
            image_models(tmp_path / name)


def test_the_commands_from_registration_to_a_served_image_and_back(
    tmp_path: Path, empty_store: bytes
) -> None:
    (tmp_path / "models.db").write_bytes(empty_store)
    run = write_run(tmp_path / "run", summary=GOOD)
    recipe = write_recipe(tmp_path, tmp_path, tmp_path)
    store = ["--registry", f"sqlite:///{tmp_path / 'models.db'}"]

    def accord(*arguments: str, code: int = 0) -> str:
        result: Any = CliRunner().invoke(app, [*arguments, *store])
        assert result.exit_code == code, result.output + repr(result.exception)
        return str(result.output)

    assert "No models" in accord("list")
    assert "passes its gate" in accord(
        "register", str(recipe), "--set", "registry.gate.max_frechet_ratio=1.05"
    )
    accord("promote", "accord-diffusion/1", "--why", "won", "--by", "olga")
    listed = json.loads(accord("list", "--json"))
    assert [(model["name"], model["aliases"]) for model in listed] == [
        ("accord-diffusion", ["champion"]),
        ("accord-reward", []),
    ]
    assert "champion" in accord("list")
    shown = accord("show", "accord-diffusion@champion")
    assert "champion is version 1, by olga: won" in shown
    assert "required <= 1.05" in shown
    (tmp_path / "image.json").write_text(
        json.dumps({"model_digest": digest(run, "aligned"), "reward_model_digest": digest(run, "reward")})
    )
    back = accord("lineage", str(tmp_path / "image.json"), "--runs", str(tmp_path))
    assert "accord-diffusion/1 champion" in back
    assert "3 judgements by 2 raters" in back
    forward = accord("lineage", digest(run, "snapshot")[:12], "--runs", str(tmp_path), "--forward")
    assert "accord-diffusion/1 champion" in forward
    touched = accord("lineage", "ann", "--rater", "--runs", str(tmp_path))
    assert "1 of its judgements are from ann" in touched
    assert "accord-diffusion/1 champion" in touched
    assert "'zoe' judged nothing" in accord("lineage", "zoe", "--rater", "--runs", str(tmp_path))
    assert "Error: there is no model" in accord("show", "accord-diffusion/9", code=2)
    assert "none before it" in accord("rollback", "accord-diffusion", "--why", "bad", code=2)
    assert "cannot read the config" in accord("register", str(tmp_path / "absent.yaml"), code=2)
