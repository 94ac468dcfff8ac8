"""Which model answers a request that names none: a stated share goes to the canary. Pure, without Ray."""

from __future__ import annotations

import hashlib
from enum import StrEnum

from services.config import CanarySettings

_DRAW_BYTES = 8


class Role(StrEnum):
    """As what a model answered; a label of metrics."""

    CHAMPION = "champion"
    """The default model, for a request that named none."""
    CANARY = "canary"
    NAMED = "named"
    """The model that the request named."""


def draw(name: str, purpose: str = "canary") -> float:
    """A number in [0, 1), always the same for the same id, as good as uniform over ids, and another one for
    another purpose."""
    digest = hashlib.sha256(f"{purpose}\n{name}".encode()).digest()
    return float(int.from_bytes(digest[:_DRAW_BYTES], "big") / 2 ** (8 * _DRAW_BYTES))


def role(model: str, request_id: str, canary: CanarySettings | None) -> Role:
    """Of a request that names `model` ("" for none).

    A retry under the same id is drawn alike. A larger share keeps every request that a smaller one had drawn.
    """
    if model:
        return Role.NAMED
    return Role.CANARY if canary is not None and draw(request_id) < canary.share else Role.CHAMPION
