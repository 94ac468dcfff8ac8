"""A rule-based judge: reads object, colour, count and background off an image, with no learned part.

It plays the people of the method (stage 1). What it says about the images of a model is checked against an
independent reader, the CNN of `evaluator.py`, which in turn never labels anything.

Legend: B batch, H W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from accord.prompts import Prompt
from accord.shapes.scene import BACKGROUNDS, COLOURS, COUNTS, OBJECTS, inside

MIN_AREA_PX = 40
"""Smaller blobs are specks, not objects: the smallest object that is drawn covers about 150 pixels."""
MIN_OVERLAP = 0.70
"""Least intersection over union with a template for a blob to count as that shape."""
TEMPLATE_PX = 24
SOFTNESS = (0.0, 0.12, 0.2)
"""Blur of the templates (standard deviation), in half sides of an object."""
MAX_NOISE_SHARE = 0.5
"""Largest share of object pixels that may lie in specks before the image counts as unreadable."""


@dataclass(frozen=True)
class Reading:
    """What the judge sees in one image. `None`: not recognisable."""

    object: str | None
    colour: str | None
    count: int
    background: str | None

    @property
    def readable(self) -> bool:
        """One recognisable kind of object in one colour, one to four times."""
        return self.object is not None and self.colour is not None and 1 <= self.count <= len(COUNTS)

    @property
    def words(self) -> dict[str, str | None]:
        """What was read in the grammar's words, by attribute."""
        count = COUNTS[self.count - 1] if 1 <= self.count <= len(COUNTS) else None
        return {"object": self.object, "colour": self.colour, "count": count, "background": self.background}


@cache
def _palette() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    colours = np.array(list(COLOURS.values()), dtype=np.float32)
    backgrounds = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
    return colours, backgrounds


@cache
def _templates() -> NDArray[np.bool_]:
    """Each shape cropped to its own bounding box and resampled to one size, shape (6, S, T, T).

    Once sharp and S - 1 times with its corners rounded, as an autoencoder draws it.
    """
    axis = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    soft = [
        [ndimage.gaussian_filter(inside(kind, u, v).astype(np.float32), 100 * s) for s in SOFTNESS]
        for kind in OBJECTS
    ]
    return np.stack([[_normalise(shape > 0.5) for shape in shapes] for shapes in soft])


def _normalise(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Crop a mask to its bounding box, make that square, resample to TEMPLATE_PX (nearest pixel centres)."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    top, left = rows[0], columns[0]
    height, width = rows[-1] - top + 1, columns[-1] - left + 1
    side = max(height, width)
    square = np.zeros((side, side), dtype=bool)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = mask_HW[top : top + height, left : left + width]
    index = ((np.arange(TEMPLATE_PX) + 0.5) * side / TEMPLATE_PX).astype(int)
    return np.asarray(square[np.ix_(index, index)])


def _shape_of(blob_HW: NDArray[np.bool_]) -> str | None:
    candidate = _normalise(blob_HW)
    templates = _templates()
    overlap_KS = (templates & candidate).sum(axis=(2, 3)) / (templates | candidate).sum(axis=(2, 3))
    overlap = overlap_KS.max(axis=1)
    best = int(overlap.argmax())
    return OBJECTS[best] if overlap[best] >= MIN_OVERLAP else None


def _majority(names: Sequence[str | None]) -> str | None:
    """The name that more than half of the blobs carry."""
    for name in sorted({n for n in names if n is not None}):
        if sum(n == name for n in names) * 2 > len(names):
            return name
    return None


def read_image(image_HWC: NDArray[np.uint8]) -> Reading:
    """Read one 64x64 RGB image, uint8."""
    colours, backgrounds = _palette()
    pixels = image_HWC.astype(np.float32)
    border = np.concatenate(
        [pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]]
    )
    ground = np.median(border, axis=0)
    to_background = np.linalg.norm(backgrounds - ground, axis=1)
    background = list(BACKGROUNDS)[int(to_background.argmin())] if to_background.min() < 60.0 else None

    to_ground = np.linalg.norm(pixels - ground, axis=2)
    to_colour = np.linalg.norm(pixels[:, :, None, :] - colours, axis=3)
    nearest = to_colour.argmin(axis=2)
    mask = to_colour.min(axis=2) < to_ground
    labels, found = ndimage.label(mask)
    areas = np.bincount(labels.ravel(), minlength=found + 1)[1:]
    blobs = [i + 1 for i in range(found) if areas[i] >= MIN_AREA_PX]
    if not blobs or areas[areas < MIN_AREA_PX].sum() > MAX_NOISE_SHARE * areas.sum():
        return Reading(None, None, len(blobs), background)

    kinds: list[str | None] = []
    hues: list[str | None] = []
    for label in blobs:
        blob = labels == label
        kinds.append(_shape_of(blob))
        core = ndimage.binary_erosion(blob) if areas[label - 1] > 80 else blob
        votes = np.bincount(nearest[core if core.any() else blob], minlength=len(colours))
        hues.append(list(COLOURS)[int(votes.argmax())] if votes.max() > 0.6 * votes.sum() else None)
    return Reading(_majority(kinds), _majority(hues), len(blobs), background)


def read(images_BHWC: NDArray[np.uint8]) -> list[Reading]:
    """Read a batch of images, each on its own."""
    return [read_image(image) for image in images_BHWC]


def fits(reading: Reading, prompt: Prompt) -> bool:
    """Whether an image shows what the prompt names; what it does not name is free."""
    return reading.readable and all(reading.words[name] == word for name, word in prompt.meaning.items())
