"""Images and prompts as CLIP features, from any open_clip model on the disk, and a cache of them.

Shapes: B images or prompts, H W pixels, C = 3 channels RGB, D features, S height and width that CLIP takes.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torchvision.transforms.functional as transforms
from numpy.typing import NDArray
from open_clip.transform import center_crop_or_pad
from safetensors import safe_open
from torch import Tensor

from accord.artifacts import (
    MANIFEST_NAME,
    canonical_json,
    check_model_directory,
    content_digest,
    load_tensors,
    save_tensors,
    sha256_bytes,
    sha256_file,
    verify,
)
from accord.config import resolve_path
from accord.errors import ArtifactError, ConfigError

Pixels = NDArray[np.uint8]

logger = logging.getLogger(__name__)

KIND = "clip"
CHECKPOINT_SCHEME = "open_clip:"
HUB_SCHEME = "hub:"
HUB_VARIABLE = "ACCORD_ALLOW_HUB"
# Nothing else of a repository is asked for: above all no pickle.
_HUB_FILES = ["open_clip_config.json", "open_clip_model.safetensors", "tokenizer*", "vocab*", "merges.txt"]
_HUB_FILES += ["special_tokens_map.json"]
CONFIG_NAME = "open_clip_config.json"


class ClipEncoder:
    """A frozen open_clip model. It asks the network only for a "hub:" model, and only where that is allowed.

    Args:
        uri: a directory with open_clip_config.json, *.safetensors and, for a vocabulary of its own, the
            tokenizer's files (a path, or "pkg://..."); or
            "open_clip:ARCHITECTURE/absolute/path/of/a/checkpoint.safetensors" for one of open_clip's own
            architectures; or "hub:OWNER/NAME", or "hub:OWNER/NAME@REVISION", for such a directory on the
            Hugging Face hub, if ACCORD_ALLOW_HUB=1 is set in the environment (see `clip_path`).

    Raises:
        ArtifactError: missing, damaged, pickled or ill-fitting weights.
        ConfigError: an unknown architecture, or one whose tokenizer open_clip would have to download.
    """

    def __init__(self, uri: str | Path, device: str | torch.device = "cpu") -> None:
        self.uri = str(uri)
        self.device = torch.device(device)
        if self.uri.startswith(CHECKPOINT_SCHEME):
            self.digest, model, self._tokenize = _load_checkpoint(self.uri)
        else:
            self.digest, model, self._tokenize = _load_directory(clip_path(uri))
        self._model = model.eval().requires_grad_(False).to(self.device)
        self._preprocessing: dict[str, Any] = open_clip.get_model_preprocess_cfg(model)
        self.dim = int(self.text_features(["a"]).shape[1])

    @torch.inference_mode()
    def image_features(self, images: Tensor | Pixels | Sequence[Pixels], batch_size: int = 64) -> Tensor:
        """L2-normalised float32 features_BD of uint8 RGB images, BHWC, or a sequence of HWC of any sizes."""
        if len(images) == 0:
            return torch.zeros(0, self.dim, device=self.device)
        batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        return torch.cat([self._model.encode_image(self._pixels(b), normalize=True).float() for b in batches])

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """L2-normalised float32 features_BD of prompts."""
        if len(texts) == 0:
            return torch.zeros(0, self.dim, device=self.device)
        batches = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        tokens = [self._tokenize(batch).to(self.device) for batch in batches]
        return torch.cat([self._model.encode_text(part, normalize=True).float() for part in tokens])

    def _pixels(self, images: Tensor | Pixels | Sequence[Pixels]) -> Tensor:
        if isinstance(images, Tensor | np.ndarray):
            return preprocess(torch.as_tensor(images).to(self.device), self._preprocessing)
        if len({image.shape for image in images}) == 1:
            return preprocess(torch.as_tensor(np.stack(images)).to(self.device), self._preprocessing)
        alone = [torch.as_tensor(image).to(self.device)[None] for image in images]
        return torch.cat([preprocess(image_1HWC, self._preprocessing) for image_1HWC in alone])


class TextCache:
    """Text features of one CLIP in memory, those of the texts that were asked for last. For one thread.

    People ask about the same prompts again and again: every candidate of a best-of-N, and its wrong prompts.
    """

    def __init__(self, encoder: ClipEncoder, size: int = 16384) -> None:
        self._encoder, self._size = encoder, size
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """As `ClipEncoder.text_features`; only texts that are not known are encoded."""
        if not texts:
            return self._encoder.text_features(texts)
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        for text, row_D in zip(new, self._encoder.text_features(new), strict=True):
            self._rows[text] = row_D.clone()  # a row alone keeps its whole batch in memory
        features_BD = torch.stack([self._rows[text] for text in texts])
        for text in texts:
            self._rows.move_to_end(text)
        while len(self._rows) > self._size:
            self._rows.popitem(last=False)
        return features_BD


def preprocess(images_BHWC: Tensor, config: dict[str, Any]) -> Tensor:
    """open_clip's inference transform on a batch: uint8 BHWC -> normalised float32 BCSS, on the same device.

    `config` is open_clip's preprocess_cfg. Equal to its transform of PIL images where nothing is resized, and
    within a level or two of 255 a pixel where something is (another implementation of the same antialiased
    filter).
    """
    if images_BHWC.dtype != torch.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3:
        raise ConfigError(
            f"CLIP takes uint8 images of shape (B, H, W, 3), got {images_BHWC.dtype} "
            f"{tuple(images_BHWC.shape)}"
        )
    size = config["size"]
    target = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    images_BCHW = images_BHWC.permute(0, 3, 1, 2).contiguous()
    mode = config["resize_mode"]
    size_now = (images_BCHW.shape[-2], images_BCHW.shape[-1])
    resized = _resized(size_now, target, mode)
    if resized != size_now:
        # As open_clip does it: bilinear where asked for, but never for the short edge of a target that is no
        # square.
        bilinear = config["interpolation"] == "bilinear" and (mode != "shortest" or target[0] == target[1])
        filter_ = transforms.InterpolationMode.BILINEAR if bilinear else transforms.InterpolationMode.BICUBIC
        images_BCHW = transforms.resize(images_BCHW, list(resized), interpolation=filter_, antialias=True)
    if mode == "longest":
        images_BCHW = center_crop_or_pad(images_BCHW, list(target), fill=config["fill_color"])
    elif mode == "shortest":
        images_BCHW = transforms.center_crop(images_BCHW, list(target))
    unit_BCHW = images_BCHW.float() / 255
    normalised: Tensor = transforms.normalize(unit_BCHW, list(config["mean"]), list(config["std"]))
    return normalised


class FeatureCache:
    """Image features on the disk, by image digest, for one CLIP. Only what is missing is computed.

    Features lie in shards, each a safetensors file that names its images and is written all or nothing. So
    work that is interrupted keeps every finished shard, and several processes may write at once: the worst
    that can happen is that a feature is computed twice. A damaged shard counts as missing.
    """

    BATCH_SIZE = 64
    SHARD_SIZE = 1024

    def __init__(self, directory: str | Path, encoder: ClipEncoder) -> None:
        self.encoder = encoder
        self.directory = Path(directory) / encoder.digest
        self._rows: dict[str, Tensor] = {}

    def image_features(self, digests: Sequence[str], loader: Callable[[str], Pixels]) -> Tensor:
        """features_ND, float32 on the CPU, of the images with these digests, in this order.

        `loader` gives the uint8 HWC pixels of a digest; it is called once for each that is missing.
        """
        self._read_shards()
        missing = [digest for digest in dict.fromkeys(digests) if digest not in self._rows]
        for start in range(0, len(missing), self.SHARD_SIZE):
            self._compute(missing[start : start + self.SHARD_SIZE], loader)
        if not digests:
            return torch.zeros(0, self.encoder.dim)
        return torch.stack([self._rows[digest] for digest in digests])

    def _compute(self, digests: Sequence[str], loader: Callable[[str], Pixels]) -> None:
        parts = []
        for start in range(0, len(digests), self.BATCH_SIZE):
            images = [loader(digest) for digest in digests[start : start + self.BATCH_SIZE]]
            # Batches always have the same size: the last bits of a feature may depend on it, and they must
            # not depend on how much of the work was there already.
            padding = [images[-1]] * (self.BATCH_SIZE - len(images))
            features_BD = self.encoder.image_features(images + padding, self.BATCH_SIZE)
            parts.append(features_BD[: len(images)].cpu())
        features_BD = torch.cat(parts)
        if not bool(torch.isfinite(features_BD).all()):
            raise ArtifactError(
                f"{self.encoder.uri} gives features that are not finite: its weights are damaged"
            )
        name = sha256_bytes(canonical_json(list(digests)).encode())[:32]
        metadata = {"clip": self.encoder.digest, "images": json.dumps(list(digests))}
        save_tensors(self.directory / f"{name}.safetensors", {"features": features_BD}, metadata)
        self._rows.update(zip(digests, features_BD, strict=True))

    def _read_shards(self) -> None:
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    digests = json.loads(file.metadata()["images"])
                if all(digest in self._rows for digest in digests):
                    continue
                features_BD = load_tensors(path)["features"]
                if features_BD.shape != (len(digests), self.encoder.dim):
                    raise ArtifactError(f"{path} does not hold one row an image")
            except Exception as error:  # whatever is wrong with it: what a cache lacks is computed anew
                logger.warning("ignoring the damaged shard %s of the feature cache: %s", path, error)
                continue
            self._rows.update(zip(digests, features_BD, strict=True))


def clip_path(uri: str | Path) -> Path:
    """The directory of a CLIP: a path, pkg://..., or what the hub has under "hub:OWNER/NAME[@REVISION]",
    which is fetched unless it is here already (its config, safetensors and tokenizer, and nothing else).

    Raises:
        ConfigError: the hub is not allowed, or the name is none.
        ArtifactError: the hub does not have it, or cannot be reached.
    """
    text = str(uri)
    if not text.startswith(HUB_SCHEME):
        return resolve_path(uri)
    name, _, revision = text.removeprefix(HUB_SCHEME).partition("@")
    if name.count("/") != 1:
        raise ConfigError(f"{text!r} names no model of the hub; expected {HUB_SCHEME}OWNER/NAME[@REVISION]")
    if os.environ.get(HUB_VARIABLE) != "1":
        raise ConfigError(
            f"{text!r} would be fetched from the Hugging Face hub. Set {HUB_VARIABLE}=1 in the environment "
            "of every process to allow that, or give a local directory"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(f"{text!r} could not be had from the hub: {error}") from error


def clip_digest(directory: Path) -> str:
    """Of the content only: that of the manifest when there is one (checked against the files), else made like
    it."""
    if (directory / MANIFEST_NAME).is_file():
        return verify(directory).digest
    files = {
        path.name: sha256_file(path)
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.name.startswith(".")
    }
    return content_digest(KIND, files)


def _resized(size: tuple[int, int], target: tuple[int, int], mode: str) -> tuple[int, int]:
    """Height and width after open_clip's resize, before its crop or padding."""
    if mode == "squash":
        return target
    height, width = size
    if mode == "shortest" and target[0] == target[1]:
        # torchvision's rule for a single number: the other edge is rounded down.
        short = min(height, width)
        return (target[0] * height // short, target[0] * width // short)
    ratios = (height / target[0], width / target[1])
    ratio = min(ratios) if mode == "shortest" else max(ratios)
    return (round(height / ratio), round(width / ratio))


Loaded = tuple[str, Any, Callable[[list[str]], Tensor]]


def _load_directory(directory: Path) -> Loaded:
    check_model_directory(directory)
    path = directory / CONFIG_NAME
    try:
        text_config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    except FileNotFoundError:
        raise ArtifactError(f"{directory} is no open_clip directory: it has no {CONFIG_NAME}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: expected JSON with model_cfg.text_cfg ({error!r})") from None
    if text_config.get("hf_model_name"):
        raise ConfigError(
            f"{path} names the text tower {text_config['hf_model_name']!r} of the Hugging Face hub, which "
            "open_clip would look up in the network; give a CLIP with a text tower of open_clip's own"
        )
    if text_config.get("hf_tokenizer_name") and not (directory / "tokenizer_config.json").is_file():
        raise ArtifactError(
            f"{path} asks for a Hugging Face tokenizer, but {directory} has no tokenizer_config.json: copy "
            "the tokenizer's files there"
        )
    name = f"local-dir:{directory}"
    model = _create(name, None, str(directory))
    tokenizer = open_clip.get_tokenizer(name)
    known, wanted = text_config.get("vocab_size", 49408), len(getattr(tokenizer, "tokenizer", ()))
    if wanted > known:
        raise ArtifactError(
            f"{directory}: the tokenizer knows {wanted} words, but the text tower only {known}"
        )
    return clip_digest(directory), model, tokenizer


def _load_checkpoint(uri: str) -> Loaded:
    architecture, separator, path = uri.removeprefix(CHECKPOINT_SCHEME).partition("/")
    checkpoint = Path(separator + path)
    if not architecture or checkpoint.suffix != ".safetensors":
        raise ConfigError(
            f"{uri!r} names no checkpoint; expected {CHECKPOINT_SCHEME}ARCHITECTURE/absolute/path.safetensors"
        )
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ConfigError(
            f"{uri!r}: open_clip {open_clip.__version__} has no architecture {architecture!r}; "
            "open_clip.list_models() lists those that it has"
        )
    text = config["text_cfg"]
    if text.get("hf_tokenizer_name") or text.get("hf_model_name") or "siglip" in architecture.lower():
        raise ConfigError(
            f"{uri!r}: open_clip downloads the tokenizer of {architecture!r}; give a directory with "
            f"{CONFIG_NAME}, the weights and the tokenizer's files instead"
        )
    load_tensors(checkpoint)  # for its checks; a checkpoint is read once a process
    model = _create(architecture, str(checkpoint), uri)
    identity = {
        "architecture": sha256_bytes(canonical_json(config).encode()),
        "weights": sha256_file(checkpoint),
    }
    return content_digest(KIND, identity), model, open_clip.get_tokenizer(architecture)


def _create(name: str, pretrained: str | None, source: str) -> Any:
    try:
        # require_pretrained: without it a missing file is a log line and a random model.
        return open_clip.create_model(
            name, pretrained, precision="fp32", device="cpu", require_pretrained=True
        )
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, AssertionError) as error:
        raise ArtifactError(f"{source} could not be loaded as an open_clip model: {error}") from error


def unique(texts: Iterable[str]) -> list[str]:
    """Each text once, in the order of first appearance."""
    return list(dict.fromkeys(texts))
