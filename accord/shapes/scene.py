"""The shapes world: scenes of one kind of object, and their renderer.

A scene is 64x64 pixels: one kind of object in one colour, one to four of them placed without overlap, on
one of five lightly textured backgrounds. It is drawn at three times the size and box-filtered.

Legend: H W pixels, S supersampled pixels, C colour channels (RGB).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE_PX = 64
SUPERSAMPLING = 3
OBJECTS = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 36),
    "green": (16, 138, 62),
    "blue": (36, 60, 214),
    "yellow": (250, 220, 30),
    "purple": (140, 40, 170),
    "orange": (246, 132, 16),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "in the sky": (150, 208, 246),
    "on grass": (134, 202, 96),
    "in the desert": (226, 196, 142),
    "at night": (22, 24, 48),
    "in the snow": (240, 244, 248),
}
COUNTS = ("one", "two", "three", "four")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "colour": tuple(COLOURS),
    "count": COUNTS,
    "background": tuple(BACKGROUNDS),
}
"""What can be said of a scene, in the grammar's words."""
# Half the side of an object's bounding box, in pixels: the more objects, the smaller they are.
RADIUS_PX = {1: (14.0, 19.0), 2: (11.0, 14.0), 3: (9.5, 12.0), 4: (9.0, 11.0)}


@dataclass(frozen=True)
class Scene:
    """What an image shows, and the seed of everything the words do not say (places, sizes, texture)."""

    object: str
    colour: str
    count: int
    background: str
    seed: int

    @property
    def words(self) -> dict[str, str]:
        """The scene in the grammar's words, by attribute."""
        return {
            "object": self.object,
            "colour": self.colour,
            "count": COUNTS[self.count - 1],
            "background": self.background,
        }


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with every attribute drawn uniformly."""
    return Scene(
        object=OBJECTS[rng.integers(len(OBJECTS))],
        colour=tuple(COLOURS)[rng.integers(len(COLOURS))],
        count=int(rng.integers(1, len(COUNTS) + 1)),
        background=tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))],
        seed=int(rng.integers(2**31)),
    )


def inside(kind: str, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether points lie in the shape. u, v in [-1, 1]: right and down from the centre, in half sides."""
    if kind == "circle":
        return np.asarray(u * u + v * v <= 0.92)
    if kind == "square":
        return (np.abs(u) <= 0.84) & (np.abs(v) <= 0.84)
    if kind == "triangle":
        return (v <= 0.86) & (np.abs(u) <= (v + 0.98) * 0.54)
    if kind == "cross":
        return ((np.abs(u) <= 0.31) & (np.abs(v) <= 0.98)) | ((np.abs(v) <= 0.31) & (np.abs(u) <= 0.98))
    if kind == "heart":
        x, y = u * 1.22, -v * 1.22 + 0.14
        return np.asarray((x * x + y * y - 1.0) ** 3 - x * x * y**3 <= 0.0)
    if kind == "star":
        angle = np.arctan2(u, -v)
        radius = np.hypot(u, v)
        sector = np.abs(np.mod(angle + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
        outer, inner = 1.08, 0.46
        # The edge between a tip (angle 0) and a notch (angle pi/5), as a half plane.
        edge = (
            outer
            * inner
            * np.sin(np.pi / 5)
            / (outer * np.sin(sector) + inner * np.sin(np.pi / 5 - sector) + 1e-9)
        )
        return np.asarray(radius <= edge)
    raise ValueError(f"unknown shape {kind!r}; known: {', '.join(OBJECTS)}")


def _places(count: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centres and half sides (x, y, r in pixels) of boxes that do not touch, redrawn until they fit."""
    low, high = RADIUS_PX[count]
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(60):
            r = float(rng.uniform(low, high))
            x, y = rng.uniform(r + 3.0, SIZE_PX - r - 3.0, size=2)
            if all(max(abs(x - px), abs(y - py)) >= r + pr + 2.5 for px, py, pr in placed):
                placed.append((float(x), float(y), r))
            if len(placed) == count:
                return placed


def _paint_background(name: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """The background at full supersampled size, shape (S, S, 3), 0..255."""
    side = SIZE_PX * SUPERSAMPLING
    base = np.array(BACKGROUNDS[name], dtype=np.float32)
    v = np.linspace(0.0, 1.0, side, dtype=np.float32)[:, None, None]
    canvas = np.broadcast_to(base, (side, side, 3)).copy()
    phase = float(rng.uniform(0, 2 * np.pi))
    if name == "in the sky":
        canvas += 22.0 * (v - 0.5)
    elif name == "on grass":
        stripes = np.sin(np.linspace(0, 34 * np.pi, side, dtype=np.float32) + phase)
        canvas += 7.0 * stripes[None, :, None]
    elif name == "in the desert":
        u = np.linspace(0, 4 * np.pi, side, dtype=np.float32)[None, :, None]
        canvas += 8.0 * np.sin(18.0 * v + 0.8 * np.sin(u + phase))
    elif name == "at night":
        for _ in range(10):
            x, y = rng.integers(1, side - 4, size=2)
            canvas[y : y + 3, x : x + 3] = 120.0
    else:
        canvas -= 9.0 * v
    return canvas


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw the scene.

    Returns:
        image_HWC, 64x64x3, uint8 RGB; the same scene always gives the same image.
    """
    rng = np.random.default_rng(scene.seed)
    canvas = _paint_background(scene.background, rng)
    shade = rng.uniform(-10.0, 10.0)
    colour = np.clip(np.array(COLOURS[scene.colour], dtype=np.float32) + shade, 0, 255)
    for x, y, r in _places(scene.count, rng):
        x0, x1 = int((x - r) * SUPERSAMPLING), int((x + r) * SUPERSAMPLING) + 1
        y0, y1 = int((y - r) * SUPERSAMPLING), int((y + r) * SUPERSAMPLING) + 1
        u = ((np.arange(x0, x1, dtype=np.float32) + 0.5) / SUPERSAMPLING - x) / r
        v = ((np.arange(y0, y1, dtype=np.float32) + 0.5) / SUPERSAMPLING - y) / r
        mask = inside(
            scene.object, np.broadcast_to(u, (len(v), len(u))), np.broadcast_to(v[:, None], (len(v), len(u)))
        )
        canvas[y0:y1, x0:x1][mask] = colour
    small = canvas.reshape(SIZE_PX, SUPERSAMPLING, SIZE_PX, SUPERSAMPLING, 3).mean(axis=(1, 3))
    return np.asarray(np.clip(np.rint(small), 0, 255), dtype=np.uint8)
