"""A random-weight CLIP in open_clip's directory format, small enough for unit tests, from a fixed seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = (
    "one two three four circle circles square squares triangle triangles star stars heart hearts "
    "cross crosses red green blue yellow purple orange in the sky on grass desert at night snow"
).split()


def write_tokenizer(directory: Path, words: Sequence[str] = WORDS, context_length: int = 16) -> int:
    """A word-level tokenizer; returns the size of its vocabulary.

    open_clip takes the text's features at the HIGHEST token id, so that the end token has to be the last one.
    """
    tokens = ["<pad>", "<unk>", "<start>", *words, "<end>"]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(token, ids[token]) for token in ("<start>", "<end>")]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "model_max_length": context_length}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)


def tiny_clip_directory(
    directory: Path, *, seed: int = 0, image_size: int = 64, resnet: bool = False, embed_dim: int = 16
) -> Path:
    """Writes the directory (0.1 MB; 0.7 MB with `resnet`) and returns it. Features are random, but they
    differ."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(directory)
    patches = {"image_size": image_size, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    blocks = {"image_size": image_size, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
    config = {
        "model_cfg": {
            "embed_dim": embed_dim,
            "vision_cfg": blocks if resnet else patches,
            "text_cfg": {
                "context_length": 16,
                "vocab_size": vocabulary,
                "width": 32,
                "heads": 2,
                "layers": 2,
                "hf_tokenizer_name": "in this directory",
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.45, 0.4],
            "std": [0.25, 0.25, 0.3],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{directory}", load_weights=False)
    tensors = {
        key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()
    }
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, directory / "open_clip_model.safetensors"
    )
    return directory
