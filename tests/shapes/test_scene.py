"""The renderer: what is drawn is what was asked for, always the same, and never touching."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from accord.prompts import load_grammar
from accord.shapes.scene import BACKGROUNDS, COLOURS, COUNTS, OBJECTS, Scene, inside, random_scene, render


def test_the_same_scene_is_the_same_image() -> None:
    scene = Scene("star", "red", 3, "on grass", 11)
    first, second = render(scene), render(scene)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert not np.array_equal(first, render(Scene("star", "red", 3, "on grass", 12)))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_objects_do_not_touch(count: int) -> None:
    for seed in range(20):
        image = render(Scene("square", "red", count, "in the snow", seed)).astype(int)
        red = (image[..., 0] - image[..., 2]) > 60
        assert ndimage.label(red, structure=np.ones((3, 3)))[1] == count


def test_a_square_covers_its_share_of_the_bounding_box() -> None:
    axis = np.linspace(-1, 1, 401, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    assert inside("square", u, v).mean() == pytest.approx(0.84**2, abs=0.01)
    assert inside("circle", u, v).mean() == pytest.approx(np.pi * 0.92 / 4, abs=0.01)


def test_an_unknown_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        inside("blob", np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))


def test_the_grammar_names_what_can_be_drawn() -> None:
    grammar = load_grammar("shapes")
    assert tuple(grammar.objects) == OBJECTS
    assert grammar.colours == tuple(COLOURS)
    assert tuple(grammar.counts) == COUNTS
    assert grammar.backgrounds == tuple(BACKGROUNDS)


def test_random_scenes_use_every_value() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(400)]
    assert {s.object for s in scenes} == set(OBJECTS)
    assert {s.colour for s in scenes} == set(COLOURS)
    assert {s.count for s in scenes} == {1, 2, 3, 4}
    assert {s.background for s in scenes} == set(BACKGROUNDS)
