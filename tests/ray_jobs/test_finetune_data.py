"""What fine-tuning learns from: which captions the reward holds for true, and what is made once only."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from accord.captioned import read_captioned
from accord.diffusion.conditioning import encode_conditioning
from accord.diffusion.encode import encode_images
from accord.diffusion.finetune_data import FinetuneData, load_data
from accord.diffusion.model import load_diffusion_model
from accord.diffusion.rows import MappedRows
from accord.diffusion.settings import FinetuneConfig
from accord.errors import PromptError
from accord.images import decode_image, encode_png
from accord.recipe import RayConfig, Recipe, load_recipe
from accord.reward.features import ClipEncoder
from accord.reward.head import RewardHead
from accord.reward.model import RewardModel
from accord.shapes.scene import Scene, random_scene, render
from ray_jobs import finetune_data, inputs, sources
from ray_jobs.finetune_data import _Encoder, _once, _run_on_actors, prepare_data
from ray_jobs.score import score_captioned


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("recipes/sandbox/full.yaml")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    """A run whose reward has learned nothing yet: an adapter starts as the similarity of the shipped CLIP."""
    directory = tmp_path_factory.mktemp("run")
    encoder = ClipEncoder(recipe.clip)
    RewardModel(RewardHead(encoder.dim, combine="adapter"), encoder).save(
        directory / "reward", inputs={}, config={}, seed=0
    )
    return directory


def scenes(count: int) -> list[Scene]:
    rng = np.random.default_rng(0)
    return [random_scene(rng) for _ in range(count)]


def test_only_a_caption_that_beats_its_one_word_changes_keeps_its_reward(
    recipe: Recipe, run_dir: Path
) -> None:
    drawn = scenes(40)
    files = [encode_png(render(scene)) for scene in drawn]
    right = [f"{scene.colour} {scene.object}" for scene in drawn]
    wrong = [f"{'red' if scene.colour != 'red' else 'blue'} {scene.object}" for scene in drawn]
    kept = [
        np.array(score_captioned(recipe, run_dir, files, captions, favourites=True))
        for captions in (right, wrong)
    ]
    assert (kept[0] > 0).mean() >= 0.9, "CLIP names nearly all colours and objects of renders"
    assert (kept[1] > 0).mean() <= 0.1
    plain = np.array(score_captioned(recipe, run_dir, files, right, favourites=False))
    assert (plain > 0).all()
    np.testing.assert_allclose(kept[0][kept[0] > 0], plain[kept[0] > 0], atol=1e-6)


def test_favourites_need_captions_of_the_grammar(recipe: Recipe, run_dir: Path) -> None:
    file = encode_png(render(scenes(1)[0]))
    with pytest.raises(PromptError, match="mauve"):
        score_captioned(recipe, run_dir, [file], ["mauve star"], favourites=True)
    assert len(score_captioned(recipe, run_dir, [file], ["mauve star"], favourites=False)) == 1


def test_what_is_made_from_the_same_is_made_once(tmp_path: Path) -> None:
    made = []

    def make(value: float) -> torch.Tensor:
        made.append(value)
        return torch.full((2,), value)

    first = _once(tmp_path, ["a", "b"], lambda: make(1.0))
    again = _once(tmp_path, ["a", "b"], lambda: make(2.0))
    other = _once(tmp_path, ["ab"], lambda: make(3.0))
    assert made == [1.0, 3.0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


HALF = FinetuneConfig(precision="bfloat16")


@pytest.fixture
def tiny_recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path, ["pretraining.count=130"])


@pytest.fixture
def scored(tiny_recipe: Recipe, tmp_path: Path) -> pd.DataFrame:
    """Generated and pre-training images of a run in tmp_path/run."""
    sources.run(tiny_recipe, tmp_path / "run", "pretraining")
    folder, rng = inputs.image_folder(tmp_path / "run"), np.random.default_rng(0)
    digests = [folder.put(encode_png(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))) for _ in range(70)]
    prompts = [f"{('red', 'blue', 'green')[i % 3]} star" for i in range(70)]
    return pd.DataFrame({"image": digests, "prompt": prompts, "reward": rng.random(70)})


def prepared(recipe: Recipe, run_dir: Path, scored: pd.DataFrame, name: str = "data") -> FinetuneData:
    path = run_dir / "work" / f"{name}.safetensors"
    prepare_data(recipe, inputs.base_model(recipe), run_dir, scored, path, {})
    return load_data(path, held_bytes=0)


def test_images_and_prompts_are_encoded_in_pieces_that_change_no_number(
    tiny_recipe: Recipe, scored: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setattr(finetune_data, "PIECE", 64)
    data = prepared(tiny_recipe, run_dir, scored)
    assert isinstance(data.pretraining_latents_MCHW, MappedRows)
    files, captions = read_captioned(run_dir / "pretraining")
    model = load_diffusion_model(tiny_recipe.model)
    latents = encode_images(model, np.stack([decode_image(file) for file in files]))
    assert torch.equal(data.pretraining_latents_MCHW[torch.arange(130)], latents)
    images = inputs.load_images(inputs.image_folder(run_dir), list(scored["image"]))
    assert torch.equal(data.latents_NCHW[torch.arange(70)], encode_images(model, images))
    texts = list(dict.fromkeys([*scored["prompt"], *captions]))
    assert len(data.text_KTD) == len(texts), "each caption once"
    assert torch.equal(data.text_KTD[torch.arange(len(texts))], encode_conditioning(model, texts)["states"])
    assert [texts[row] for row in data.pretraining_text_index_M] == captions
    assert [texts[row] for row in data.text_index_N] == list(scored["prompt"])
    assert torch.equal(data.empty_text_TD, encode_conditioning(model, [""], negative=True)["states"][0])

    half = prepared(tiny_recipe.model_copy(update={"finetune": HALF}), run_dir, scored, "half")
    assert half.text_KTD.dtype == torch.bfloat16
    rows = torch.arange(len(texts))
    assert torch.equal(half.text_KTD[rows], data.text_KTD[rows].bfloat16())
    assert half.fingerprint() == data.fingerprint()


def test_only_the_pieces_that_are_missing_are_made(
    tiny_recipe: Recipe, scored: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setattr(finetune_data, "PIECE", 64)
    made: list[tuple[str, int]] = []
    encode = _Encoder.run

    def run(self: _Encoder, piece: finetune_data.Piece) -> int:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append((piece.kind, encode(self, piece)))
        return made[-1][1]

    monkeypatch.setattr(_Encoder, "run", run)
    with pytest.raises(KeyboardInterrupt):
        prepared(tiny_recipe, run_dir, scored)
    assert made == [("generated", 64), ("generated", 6), ("pretraining", 64), ("pretraining", 64)]
    assert not (run_dir / "work" / "data.safetensors").exists()
    made.clear()
    first = prepared(tiny_recipe, run_dir, scored)
    assert made[0] == ("pretraining", 2)
    assert {kind for kind, _ in made[1:]} == {"texts", "empty"}
    made.clear()
    assert prepared(tiny_recipe, run_dir, scored, "again").fingerprint() == first.fingerprint()
    assert made == []


@pytest.mark.cluster
def test_ray_data_makes_the_same_pieces(
    tiny_recipe: Recipe,
    scored: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_cluster: RayConfig,
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setattr(finetune_data, "PIECE", 64)
    pieces = finetune_data._pieces(tiny_recipe, "d" * 64, run_dir, list(scored["image"]), 130, ["red star"])
    flat = [piece for group in pieces.values() for piece in group]
    arguments = {"model": str(tiny_recipe.model), "run_dir": str(run_dir)}
    rows = sorted(_run_on_actors(ray_cluster, flat, arguments))
    assert rows == [1, 1, 2, 6, 64, 64, 64]
    here = _Encoder(**arguments)
    for piece in flat:
        path = run_dir / finetune_data.ENCODED / f"{piece.name}.safetensors"
        content = path.read_bytes()
        here.run(piece)
        assert path.read_bytes() == content
