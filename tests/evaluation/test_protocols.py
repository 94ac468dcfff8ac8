"""A world plugs in by shape alone: no base class, no registration."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from accord.evaluation.protocols import QUESTIONS, Evaluator, Measurement, Panel
from accord.prompts import Category, Prompt, Split


class Brightness:
    feature_name = "mean colour"

    def measure(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Measurement:
        mean_BC = images_BHWC.mean(axis=(1, 2)).astype(np.float32)
        return Measurement(mean_BC[:, 0] > 127, mean_BC.max(axis=1) > 0, mean_BC)


def test_any_object_with_the_methods_is_an_evaluator() -> None:
    evaluator: Evaluator = Brightness()
    images = np.stack([np.zeros((4, 4, 3)), np.full((4, 4, 3), 200)]).astype(np.uint8)
    found = evaluator.measure(
        images, [Prompt("red star", Category.COLOUR, Split.SEEN, "star", colour="red")] * 2
    )
    assert found.success_B.tolist() == found.readable_B.tolist() == [False, True]
    assert isinstance(evaluator, Evaluator)
    assert not isinstance(evaluator, Panel)
    assert QUESTIONS == ("alignment", "fidelity")
