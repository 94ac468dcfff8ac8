"""What the sandbox's evaluator can say of a model while it is fine-tuned: plugs of the guards.

Shapes: B images, H W pixels, C = 3 channels RGB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from accord.guards.measures import Judge
from accord.images import Pixels
from accord.prompts import load_grammar
from accord.shapes.evaluator import ShapesEvaluator
from accord.shapes.scene import COUNTS


def too_many_objects() -> Judge:
    """1 for an image with more objects than its prompt asks for, else 0; NaN where it asks for no number, or
    none can be counted."""
    evaluator, grammar = ShapesEvaluator(), load_grammar("shapes")

    def judge(images_BHWC: Pixels, prompts: Sequence[str]) -> NDArray[np.float64]:
        _, names = evaluator.read(images_BHWC)
        found = np.full(len(prompts), np.nan)
        for i, (text, read) in enumerate(zip(prompts, names["count"], strict=True)):
            asked = grammar.parse(text).count
            if asked is not None and read is not None:
                found[i] = COUNTS.index(read) > COUNTS.index(asked)
        return found

    return judge
