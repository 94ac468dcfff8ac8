"""A CLIP tokenizer whose words are the grammar's, in the files of any Stable Diffusion tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers

from accord.prompts import Grammar

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 12
"""Tokens of a prompt, with start and end: the longest of the grammar has six words."""


def grammar_words(grammar: Grammar) -> list[str]:
    """Every word that a prompt of the grammar can contain, in a fixed order."""
    return sorted({word for prompt in grammar.all_prompts() for word in prompt.text.lower().split()})


def _merges(words: Sequence[str], letters: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) that make each word one token; the last letter carries </w>.

    Of equally frequent pairs the one with the lower token ids is merged first. (The trainer of `tokenizers`
    does so too, but numbers the letters in hash order, so that no two of its runs agree.)
    """
    ids = {letter: index for index, letter in enumerate(letters)}
    splits = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(split) > 1 for split in splits):
        pairs = Counter(pair for split in splits for pair in pairwise(split))
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids.setdefault("".join(best), len(ids))
        for split in splits:
            at = 0
            while at < len(split) - 1:
                if (split[at], split[at + 1]) == best:
                    split[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def write_tokenizer(directory: Path, grammar: Grammar) -> int:
    """Write vocab.json, merges.txt and tokenizer_config.json for `transformers.CLIPTokenizer`.

    Each word of the grammar is one token; anything else falls into bytes, so any text can be tokenised. The
    end token has the highest id: CLIP's text tower pools there, in transformers and in open_clip.

    Returns:
        The size of the vocabulary.
    """
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # printable letters that stand for the 256 bytes
    letters = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    merges = _merges(grammar_words(grammar), letters)
    tokens = [*letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return len(vocabulary)
