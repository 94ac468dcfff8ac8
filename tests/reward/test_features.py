"""CLIP features: the same preprocessing as open_clip's, refused inputs, and the cache."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file

from accord.artifacts import artifact_writer
from accord.errors import ArtifactError, ConfigError, StorageError
from accord.reward import features
from accord.reward.features import ClipEncoder, FeatureCache, Pixels, TextCache, clip_digest, preprocess
from tests.tiny_clip import tiny_clip_directory


@pytest.fixture(scope="module")
def clip_directory(session_dir: Path) -> Path:
    return tiny_clip_directory(session_dir / "clip of features")


@pytest.fixture(scope="module")
def encoder(clip_directory: Path) -> ClipEncoder:
    return ClipEncoder(clip_directory)


def pictures(count: int, height: int = 64, width: int = 64) -> Pixels:
    """Smooth pictures with a sharp edge, which is what resizing filters disagree on."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    large = [Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in small]
    stacked = np.stack([np.asarray(image) for image in large])
    stacked[:, : height // 3] = 255 - stacked[:, : height // 3]
    return stacked


def by_open_clip(images: Pixels, config: dict[str, object]) -> torch.Tensor:
    transform = image_transform_v2(PreprocessCfg(**config), is_train=False)  # type: ignore[arg-type]
    return torch.stack([transform(Image.fromarray(image)) for image in images])


CONFIG = {
    "size": 64,
    "mode": "RGB",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.25),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_images_of_the_models_size_are_preprocessed_exactly_as_by_open_clip(resize_mode: str) -> None:
    images, config = pictures(3), CONFIG | {"resize_mode": resize_mode}
    assert torch.equal(preprocess(torch.from_numpy(images), config), by_open_clip(images, config))


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width"), [(96, 96), (100, 75), (40, 51), (128, 64)])
@pytest.mark.parametrize("size", [64, (64, 48)])
def test_other_sizes_are_preprocessed_nearly_as_by_open_clip(
    height: int, width: int, size: int | tuple[int, int], interpolation: str, resize_mode: str
) -> None:
    images = pictures(2, height, width)
    config = CONFIG | {"size": size, "interpolation": interpolation, "resize_mode": resize_mode}
    ours, theirs = preprocess(torch.from_numpy(images), config), by_open_clip(images, config)
    assert ours.shape == theirs.shape
    levels = (ours - theirs).abs() * torch.tensor(CONFIG["std"])[:, None, None] * 255
    assert levels.max() <= 2.01
    assert levels.mean() < 0.4  # PIL rounds to whole levels between its two passes, torch does not


def test_features_are_those_of_open_clip(clip_directory: Path, encoder: ClipEncoder) -> None:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_directory}")
    model.eval()
    images, texts = pictures(5), ["two red stars", "star on grass"]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_directory}")
    with torch.no_grad():
        pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
        image_BD = model.encode_image(pixels, normalize=True)
        text_BD = model.encode_text(tokenizer(texts), normalize=True)
    assert torch.allclose(encoder.image_features(images, batch_size=2), image_BD, atol=1e-6)
    assert torch.allclose(encoder.text_features(texts), text_BD, atol=1e-6)


def test_features_are_unit_vectors_that_differ(encoder: ClipEncoder) -> None:
    image_BD, text_BD = encoder.image_features(pictures(3)), encoder.text_features(["red star", "blue star"])
    assert image_BD.shape == (3, encoder.dim)
    assert image_BD.dtype == torch.float32
    assert torch.allclose(image_BD.norm(dim=1), torch.ones(3))
    assert (image_BD[0] - image_BD[1]).abs().max() > 1e-3
    assert (text_BD[0] - text_BD[1]).abs().max() > 1e-3
    assert not image_BD.requires_grad


def test_images_of_different_sizes_and_none_at_all(encoder: ClipEncoder) -> None:
    mixed = [pictures(1)[0], pictures(1, 80, 100)[0]]
    alone = torch.cat([encoder.image_features(image[None]) for image in mixed])
    assert torch.allclose(encoder.image_features(mixed), alone, atol=1e-6)
    assert encoder.image_features([]).shape == (0, encoder.dim)
    assert encoder.text_features([]).shape == (0, encoder.dim)


def test_images_must_be_uint8_rgb(encoder: ClipEncoder) -> None:
    with pytest.raises(ConfigError, match=r"uint8 images of shape \(B, H, W, 3\), got torch.float32"):
        encoder.image_features(torch.zeros(1, 64, 64, 3))


def test_digest_is_of_the_content(clip_directory: Path, tmp_path: Path, encoder: ClipEncoder) -> None:
    same, other = tiny_clip_directory(tmp_path / "same"), tiny_clip_directory(tmp_path / "other", seed=1)
    assert clip_digest(same) == clip_digest(clip_directory) == encoder.digest
    assert clip_digest(other) != encoder.digest
    with artifact_writer(tmp_path / "artifact", "clip", inputs={}, config={}, seed=0) as directory:
        tiny_clip_directory(directory)
    assert clip_digest(tmp_path / "artifact") == encoder.digest


def test_convolutional_clip_is_loaded_in_eval_mode(tmp_path: Path) -> None:
    directory = tiny_clip_directory(tmp_path / "clip", resnet=True)
    assert sum(path.stat().st_size for path in directory.iterdir()) < 2_000_000
    encoder = ClipEncoder(directory)
    images = pictures(4)
    # Batch norm in training mode would make a feature depend on the rest of the batch.
    assert torch.allclose(encoder.image_features(images[:1]), encoder.image_features(images)[:1], atol=1e-6)


def test_checkpoint_of_a_built_in_architecture(
    clip_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = open_clip.get_model_config(f"local-dir:{clip_directory}")
    config["text_cfg"] |= {
        "hf_tokenizer_name": "",
        "vocab_size": 49408,
    }  # open_clip's own vocabulary, shipped with it
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-16", config)
    torch.manual_seed(0)
    model = open_clip.create_model("Tiny-16")
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    encoder = ClipEncoder(f"open_clip:Tiny-16{tmp_path}/tiny.safetensors")
    tokens = open_clip.get_tokenizer("Tiny-16")(["a dog"])
    with torch.no_grad():
        expected = model.eval().encode_text(tokens, normalize=True)
    # The text tower reads 16 tokens, open_clip's tokenizer pads to as many.
    assert torch.allclose(encoder.text_features(["a dog"]), expected, atol=1e-6)
    assert len(encoder.digest) == 64


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("open_clip:ViT-L-14", "names no checkpoint"),
        ("open_clip:ViT-L-14/model.bin", "names no checkpoint"),
        ("open_clip:ViT-L-15/x.safetensors", "no architecture 'ViT-L-15'"),
        ("open_clip:ViT-B-16-SigLIP/x.safetensors", "downloads the tokenizer"),
        ("open_clip:roberta-ViT-B-32/x.safetensors", "downloads the tokenizer"),
    ],
)
def test_uris_that_name_no_offline_model(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClipEncoder(uri)


def test_directories_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no model directory"):
        ClipEncoder(tmp_path / "absent")
    directory = tiny_clip_directory(tmp_path / "clip")
    weights = directory / "open_clip_model.safetensors"
    tensors = load_file(weights)

    save_file({**tensors, "logit_scale": torch.tensor(float("nan"))}, weights)
    with pytest.raises(ArtifactError, match="NaN"):
        ClipEncoder(directory)
    save_file({key: value for key, value in tensors.items() if key != "visual.proj"}, weights)
    with pytest.raises(ArtifactError, match=r"visual.proj"):
        ClipEncoder(directory)
    save_file(tensors, weights)
    (directory / "tokenizer_config.json").rename(tmp_path / "away.json")
    with pytest.raises(ArtifactError, match=r"has no tokenizer_config.json"):
        ClipEncoder(directory)
    (tmp_path / "away.json").rename(directory / "tokenizer_config.json")
    (directory / "model.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match="pickle"):
        ClipEncoder(directory)
    (directory / "model.bin").unlink()
    (directory / "open_clip_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="expected JSON with model_cfg"):
        ClipEncoder(directory)


class Loader:
    """Images by name, and how often each was asked for."""

    def __init__(self, count: int) -> None:
        self.images = {f"image{i}": image for i, image in enumerate(pictures(count))}
        self.calls: Counter[str] = Counter()

    def __call__(self, digest: str) -> Pixels:
        self.calls[digest] += 1
        return self.images[digest]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureCache, "BATCH_SIZE", 2)
    monkeypatch.setattr(FeatureCache, "SHARD_SIZE", 4)


@pytest.mark.usefixtures("small_batches")
class TestFeatureCache:
    def test_only_what_is_missing_is_computed(self, encoder: ClipEncoder, tmp_path: Path) -> None:
        loader = Loader(7)
        names = list(loader.images)
        first = FeatureCache(tmp_path, encoder).image_features(names[:3], loader)
        assert loader.calls == dict.fromkeys(names[:3], 1)
        again = FeatureCache(tmp_path, encoder).image_features([*names[:3], names[0]], loader)
        assert loader.calls == dict.fromkeys(names[:3], 1)
        assert torch.equal(again, torch.cat([first, first[:1]]))
        everything = FeatureCache(tmp_path, encoder).image_features(names, loader)
        assert loader.calls == dict.fromkeys(names, 1)
        assert torch.allclose(everything, encoder.image_features(list(loader.images.values())), atol=1e-6)

    def test_order_is_that_of_the_question(self, encoder: ClipEncoder, tmp_path: Path) -> None:
        loader, cache = Loader(4), FeatureCache(tmp_path, encoder)
        names = list(loader.images)
        forward = cache.image_features(names, loader)
        assert torch.equal(cache.image_features(names[::-1], loader), forward.flip(0))
        assert cache.image_features([], loader).shape == (0, encoder.dim)

    def test_interruption_keeps_finished_shards_and_changes_no_bit(
        self, encoder: ClipEncoder, tmp_path: Path
    ) -> None:
        loader = Loader(9)
        names = list(loader.images)
        whole = FeatureCache(tmp_path / "whole", encoder).image_features(names, loader)
        loader.calls.clear()

        def interrupted(digest: str) -> Pixels:
            if loader.calls.total() == 6:
                raise KeyboardInterrupt
            return loader(digest)

        with pytest.raises(KeyboardInterrupt):
            FeatureCache(tmp_path / "parts", encoder).image_features(names, interrupted)
        resumed = FeatureCache(tmp_path / "parts", encoder).image_features(names, loader)
        assert [loader.calls[name] for name in names] == [1, 1, 1, 1, 2, 2, 1, 1, 1]
        assert torch.equal(resumed, whole)

    def test_interrupted_and_damaged_files_are_computed_anew(
        self, encoder: ClipEncoder, tmp_path: Path
    ) -> None:
        loader = Loader(6)
        names = list(loader.images)
        before = FeatureCache(tmp_path, encoder).image_features(names, loader)
        shards = sorted((tmp_path / encoder.digest).glob("*.safetensors"))
        assert len(shards) == 2
        for shard in shards:
            shard.write_bytes(shard.read_bytes()[:-5])
        (shards[0].parent / ".x.safetensors.partial-1").write_bytes(b"half")
        after = FeatureCache(tmp_path, encoder).image_features(names, loader)
        assert torch.equal(after, before)
        assert set(loader.calls.values()) == {2}
        FeatureCache(tmp_path, encoder).image_features(names, loader)
        assert set(loader.calls.values()) == {2}

    def test_a_full_disk_leaves_no_partial_shard(
        self, encoder: ClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise StorageError("no room")

        loader = Loader(3)
        monkeypatch.setattr(features, "save_tensors", full)
        with pytest.raises(StorageError):
            FeatureCache(tmp_path, encoder).image_features(list(loader.images), loader)
        assert not list(tmp_path.rglob("*.safetensors"))

    def test_another_clip_shares_nothing(self, encoder: ClipEncoder, tmp_path: Path) -> None:
        loader = Loader(2)
        names = list(loader.images)
        other = ClipEncoder(tiny_clip_directory(tmp_path / "clip", seed=5))
        first = FeatureCache(tmp_path / "cache", encoder).image_features(names, loader)
        second = FeatureCache(tmp_path / "cache", other).image_features(names, loader)
        assert set(loader.calls.values()) == {2}
        assert not torch.allclose(first, second)

    def test_batches_always_have_the_same_size(
        self, encoder: ClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes: list[int] = []
        real = encoder.image_features

        def recorded(images: Sequence[Pixels], batch_size: int) -> torch.Tensor:
            sizes.append(len(images))
            return real(images, batch_size)

        monkeypatch.setattr(encoder, "image_features", recorded)
        loader = Loader(3)
        assert len(FeatureCache(tmp_path, encoder).image_features(list(loader.images), loader)) == 3
        assert sizes == [2, 2]


def test_the_hub_is_asked_only_where_that_is_allowed(
    clip_directory: Path, encoder: ClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache, as it would have been filled, and no network."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(clip_directory, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("ACCORD_ALLOW_HUB", raising=False)
    with pytest.raises(ConfigError, match="ACCORD_ALLOW_HUB=1"):
        ClipEncoder("hub:someone/tiny")
    monkeypatch.setenv("ACCORD_ALLOW_HUB", "1")
    assert ClipEncoder("hub:someone/tiny").digest == encoder.digest
    assert ClipEncoder(f"hub:someone/tiny@{revision}").digest == encoder.digest
    with pytest.raises(ArtifactError, match="could not be had from the hub"):
        ClipEncoder("hub:someone/other")
    with pytest.raises(ConfigError, match="names no model of the hub"):
        ClipEncoder("hub:tiny")


def test_texts_are_kept_and_the_oldest_forgotten(
    encoder: ClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, encoded = encoder.text_features, []

    def counted(texts: Sequence[str]) -> torch.Tensor:
        encoded.extend(texts)
        return encode(texts)

    monkeypatch.setattr(encoder, "text_features", counted)
    cache = TextCache(encoder, size=2)
    torch.testing.assert_close(cache.text_features(["a", "b", "a"]), encode(["a", "b", "a"]))
    assert encoded == ["a", "b"]
    cache.text_features(["a"])
    cache.text_features(["c"])  # b was asked for longest ago
    torch.testing.assert_close(cache.text_features(["c", "a"]), encode(["c", "a"]))
    assert encoded == ["a", "b", "c"]
    cache.text_features(["b"])
    assert encoded == ["a", "b", "c", "b"]
    assert cache.text_features([]).shape == (0, encoder.dim)
    assert cache.text_features(["d", "e", "f"]).shape == (3, encoder.dim)  # more than it keeps
