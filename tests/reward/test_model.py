"""The reward model as an artifact."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from accord.artifacts import load_tensors, read_manifest
from accord.errors import ArtifactError
from accord.reward.calibration import Platt
from accord.reward.features import ClipEncoder
from accord.reward.head import RewardHead
from accord.reward.model import RewardModel, open_reward
from tests.tiny_clip import tiny_clip_directory

PROMPTS = ["two red stars", "star on grass", "two red stars"]


@pytest.fixture(scope="module")
def clip_directory(session_dir: Path) -> Path:
    return tiny_clip_directory(session_dir / "clip of models")


@pytest.fixture(scope="module")
def model(clip_directory: Path) -> RewardModel:
    encoder = ClipEncoder(clip_directory)
    head = RewardHead(encoder.dim, 8, 2, "concat_product", torch.Generator().manual_seed(0))
    return RewardModel(head, encoder, temperature=1.5, calibration=Platt(0.5, 0.25))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


def save(model: RewardModel, directory: Path) -> Path:
    model.save(directory, inputs={"snapshot": "0" * 64}, config={"steps": 3}, seed=7)
    return directory


def test_round_trip_gives_the_same_scores(model: RewardModel, images: np.ndarray, tmp_path: Path) -> None:
    loaded = RewardModel.load(save(model, tmp_path / "reward"))
    assert torch.equal(loaded.score(images, PROMPTS), model.score(images, PROMPTS))
    assert (loaded.temperature, loaded.calibration) == (1.5, Platt(0.5, 0.25))
    assert loaded.digest == model.digest == read_manifest(tmp_path / "reward").digest


def test_model_without_calibration_round_trips_too(model: RewardModel, tmp_path: Path) -> None:
    plain = RewardModel(model.head, model.encoder)
    loaded = RewardModel.load(save(plain, tmp_path / "reward"), clip=model.encoder)
    assert loaded.calibration is None
    assert loaded.encoder is model.encoder
    assert loaded.calibrated(torch.tensor([0.3])).tolist() == pytest.approx([0.3])


def test_manifest_says_what_it_was_made_from(model: RewardModel, tmp_path: Path) -> None:
    manifest = read_manifest(save(model, tmp_path / "reward"))
    assert manifest.kind == "reward_model"
    assert manifest.inputs == {"snapshot": "0" * 64, "clip": model.encoder.digest}
    assert manifest.config == {"steps": 3, "clip": model.encoder.uri}
    assert sorted(manifest.files) == ["config.json", "head.safetensors"]


def test_another_clip_is_refused(model: RewardModel, tmp_path: Path) -> None:
    directory = save(model, tmp_path / "reward")
    other = tiny_clip_directory(tmp_path / "other clip", seed=1)
    with pytest.raises(ArtifactError, match="scores would mean nothing"):
        RewardModel.load(directory, clip=other)


def test_the_same_clip_elsewhere_is_welcome_and_changes_no_digest(
    model: RewardModel, clip_directory: Path, images: np.ndarray, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(clip_directory, moved)
    loaded = RewardModel.load(save(model, tmp_path / "a"), clip=moved)
    assert torch.equal(loaded.score(images, PROMPTS), model.score(images, PROMPTS))
    assert read_manifest(save(loaded, tmp_path / "b")).digest == model.digest


def test_changed_or_damaged_models_are_refused(model: RewardModel, tmp_path: Path) -> None:
    directory = save(model, tmp_path / "reward")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"temperature": 9.0}))
    with pytest.raises(ArtifactError, match="changed or damaged"):
        RewardModel.load(directory)
    with pytest.raises(ArtifactError, match="no artifact"):
        RewardModel.load(tmp_path / "absent")


def test_head_and_clip_must_fit(model: RewardModel) -> None:
    with pytest.raises(ArtifactError, match=f"features of 5 numbers, but .* gives {model.encoder.dim}"):
        RewardModel(RewardHead(5, 8), model.encoder)


def test_score_is_the_head_on_the_features_of_each_pair(model: RewardModel, images: np.ndarray) -> None:
    image_BD = model.encoder.image_features(images)
    for i, prompt in enumerate(PROMPTS):
        alone = model.head(image_BD[i : i + 1], model.encoder.text_features([prompt]))
        assert model.score(images, PROMPTS)[i].item() == pytest.approx(alone.item(), rel=1e-5)
    assert model.score(images[:0], []).shape == (0,)


def test_score_needs_a_prompt_for_each_image(model: RewardModel, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="3 images, but 1 prompts"):
        model.score(images, ["red star"])


def test_large_sets_are_scored_in_chunks(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    image_BD, text_BD = torch.randn(2, 10, model.encoder.dim, generator=generator)
    whole = model.score_features(image_BD, text_BD)
    monkeypatch.setattr("accord.reward.model._CHUNK", 3)
    assert torch.allclose(model.score_features(image_BD, text_BD), whole)


def test_classify_is_equation_1_over_the_prompts_of_each_image(
    model: RewardModel, images: np.ndarray
) -> None:
    image_BD = model.encoder.image_features(images[:2])
    text_BND = model.encoder.text_features(
        ["red star", "blue star", "circle", "cross", "star", "square"]
    ).reshape(2, 3, -1)
    probability_BN = model.classify(image_BD, text_BND)
    for b in range(2):
        rewards = [float(model.head(image_BD[b], text_BND[b, n])) for n in range(3)]
        terms = [math.exp(reward / 1.5) for reward in rewards]
        assert probability_BN[b].tolist() == pytest.approx([term / sum(terms) for term in terms], rel=1e-5)


def test_calibrated_applies_the_scaling(model: RewardModel) -> None:
    reward_B = torch.tensor([0.2, 0.8])
    assert model.calibrated(reward_B).tolist() == pytest.approx(
        Platt(0.5, 0.25)([0.2, 0.8]).tolist(), rel=1e-5
    )
    assert model.calibrated(reward_B).dtype == reward_B.dtype


def test_weights_are_safetensors(model: RewardModel, tmp_path: Path) -> None:
    tensors = load_tensors(save(model, tmp_path / "reward") / "head.safetensors")
    assert set(tensors) == set(model.head.state_dict())


def test_a_directory_is_opened_as_the_reward_or_the_clip_that_it_holds(
    model: RewardModel, clip_directory: Path, images: np.ndarray, tmp_path: Path
) -> None:
    taught = open_reward(save(model, tmp_path / "reward"))
    assert taught.learned
    assert torch.equal(taught.score(images, PROMPTS), model.score(images, PROMPTS))
    alone = open_reward(clip_directory)
    assert not alone.learned
    similarity_B = (alone.encoder.image_features(images) * alone.encoder.text_features(PROMPTS)).sum(-1)
    assert alone.score(images, PROMPTS).argsort().tolist() == similarity_B.argsort().tolist()
    assert alone.digest == open_reward(clip_directory).digest != taught.digest
    with pytest.raises(ArtifactError, match=r"holds neither a reward model .* nor a CLIP"):
        open_reward(tmp_path)
