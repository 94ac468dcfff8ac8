"""Reading numbers out of a summary, and writing them down.

A summary may lack any number: a stage was skipped, there were no votes, a metric was not defined. Such a
number is None here and an em dash on the page; nothing that is missing ever becomes a zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DASH = "—"
MINUS = "−"


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; each part is None where the summary does not have it."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def has_interval(self) -> bool:
        return self.value is not None and self.low is not None and self.high is not None


def node(tree: Any, *path: Any) -> Any:
    """What lies at `path` in nested mappings, or None. Keys match by their text: 16 finds "16" (JSON)."""
    for key in path:
        if not isinstance(tree, Mapping):
            return None
        tree = tree[key] if key in tree else {str(name): child for name, child in tree.items()}.get(str(key))
    return tree


def finite(value: Any) -> float | None:
    """`value` as a float, or None when it is missing, not a number, or not finite."""
    if value is None or isinstance(value, str | bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def estimate(tree: Any, *path: Any) -> Estimate:
    """The estimate at `path`: a mapping with value, low, high and n, or a bare number."""
    found = node(tree, *path)
    if not isinstance(found, Mapping):
        return Estimate(finite(found))
    n = finite(found.get("n"))
    return Estimate(
        finite(found.get("value")),
        finite(found.get("low")),
        finite(found.get("high")),
        None if n is None else int(n),
    )


def number(tree: Any, *path: Any) -> float | None:
    """The number at `path`, or None; for an estimate, its value."""
    return estimate(tree, *path).value


def fixed(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """`value` with so many decimals and a true minus sign, a plus sign if `signed`; an em dash for None."""
    if value is None:
        return DASH
    text = f"{abs(value):,.{digits}f}"
    if not any(digit in "123456789" for digit in text):
        return text  # no sign on a zero
    return (MINUS if value < 0 else "+" if signed else "") + text


def percent(share: float | None, digits: int = 0, *, signed: bool = False) -> str:
    """A share in [0, 1] in per cent, without the sign: 0.413 -> "41"."""
    return fixed(None if share is None else 100 * share, digits, signed=signed)


def interval(shares: Estimate, digits: int = 0, *, scale: float = 100.0) -> str:
    """The interval alone, "35–48", in per cent unless `scale` says otherwise; empty when there is none."""
    if shares.low is None or shares.high is None:
        return ""
    signed = shares.low < 0 or shares.high < 0
    ends = [fixed(scale * end, digits, signed=signed) for end in (shares.low, shares.high)]
    return (" to " if signed else "–").join(ends)


def points(difference: Estimate) -> str:
    """A difference of shares: "+9 points (+3 to +15)"; empty when there is none."""
    if difference.value is None:
        return ""
    text = f"{percent(difference.value, signed=True)} points"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} ({percent(difference.low, signed=True)} to {percent(difference.high, signed=True)})"


def duration(seconds: float | None) -> str:
    """Seconds for people: "8.4 s", "96 s", "12 min", "2 h 05 min"."""
    if seconds is None:
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
