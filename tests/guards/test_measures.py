"""Measures of images whose values can be worked out by hand."""

import numpy as np
import torch

from accord.guards import measures


def flat(*colour: int) -> np.ndarray:
    return np.full((8, 8, 3), colour, dtype=np.uint8)


def test_saturation_of_grey_and_of_pure_colours() -> None:
    images = np.stack([flat(128, 128, 128), flat(0, 0, 0), flat(255, 0, 0), flat(100, 50, 50)])
    np.testing.assert_allclose(measures.saturation(images), [0.0, 0.0, 1.0, 0.5])


def test_edges_of_a_flat_a_halved_and_a_chequered_image() -> None:
    half, chequered = flat(0, 0, 0), flat(0, 0, 0)
    half[:, 4:] = 255
    chequered[::2, ::2] = chequered[1::2, 1::2] = 255
    np.testing.assert_allclose(
        measures.edge_density(np.stack([flat(9, 9, 9), half, chequered])), [0.0, 1 / 7, 1.0]
    )


def test_diversity_is_within_a_prompt() -> None:
    features = [[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [9.0, 9.0]]
    found = measures.diversity(features, ["a", "a", "b", "b", "c"])
    np.testing.assert_allclose(found, [5.0, 5.0, 0.0, 0.0, np.nan])


def test_prediction_distance_is_relative() -> None:
    reference = torch.ones(2, 1, 2, 2)
    other = torch.stack([reference[0], 3 * reference[1]])
    torch.testing.assert_close(measures.prediction_distance(other, reference), torch.tensor([0.0, 4.0]))


def test_means_by_prompt_leave_out_what_does_not_apply() -> None:
    found = measures.by_prompt([1.0, 3.0, np.nan, 5.0, np.nan, np.nan], 2)
    np.testing.assert_allclose(found, [2.0, 5.0, np.nan])
