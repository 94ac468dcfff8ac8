"""From a snapshot to what preference objectives learn from: pairs of images of which one is better. Pure
functions.
"""

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterable

import pandas as pd

from accord.feedback.comparisons import Compared

Pair = tuple[str, str, str]
"""A prompt, the digest of the better image, and that of the worse."""


def compared_pairs(answers: Iterable[Compared], question: str = "alignment") -> list[Pair]:
    """What more raters preferred than not, in order; ties are left out.

    Each rater has one voice on a comparison, however often he answered it and on whichever side its images
    were. Of sets of images every image of the better set is paired with every one of the other.
    """
    said: dict[tuple[str, tuple[str, ...], tuple[str, ...]], dict[str, int]] = defaultdict(Counter)
    for item in answers:
        if item.question != question:
            continue
        sign = {"first": 1, "second": -1, "tie": 0}[item.answer]
        if item.first <= item.second:
            said[item.prompt, item.first, item.second][item.rater] += sign
        else:
            said[item.prompt, item.second, item.first][item.rater] -= sign
    pairs: set[Pair] = set()
    for (prompt, first, second), by_rater in said.items():
        total = sum((sum_ > 0) - (sum_ < 0) for sum_ in by_rater.values())
        better, worse = (first, second) if total > 0 else (second, first)
        if total:
            pairs |= {(prompt, a, b) for a, b in itertools.product(better, worse) if a != b}
    return sorted(pairs)


def judged_pairs(snapshot: pd.DataFrame, seed: int) -> list[Pair]:
    """Images called good, each with one called bad of the same prompt, in order.

    `snapshot` is as load_snapshot gives it. As many pairs a prompt as the more frequent verdict has images
    (none when all have the same), the rarer ones taken in turn, in an order drawn by `seed`: so every image
    is in a pair, and a prompt counts by its images and not by their square.
    """
    decided = snapshot[snapshot["label"].notna() & (snapshot["weight"] > 0)]
    pairs: list[Pair] = []
    for prompt, rows in sorted(decided.groupby("prompt"), key=lambda item: str(item[0])):
        draw = random.Random(f"pairs {seed} {prompt}")
        good, bad = (sorted(rows.loc[rows["label"] == label, "image"]) for label in (1.0, 0.0))
        draw.shuffle(good)
        draw.shuffle(bad)
        if good and bad:
            size = max(len(good), len(bad))
            pairs += [(str(prompt), good[i % len(good)], bad[i % len(bad)]) for i in range(size)]
    return sorted(pairs)
