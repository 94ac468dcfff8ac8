"""Lanes: tests that need something of the machine. Locally its absence skips them; in CI it fails them."""

import os
from typing import NoReturn

import pytest


def missing(reason: str, *, lane: str = "") -> NoReturn:
    """Give up the running test because the machine lacks something. A missing GPU never fails a run."""
    if os.environ.get("CI") == "true" and lane != "gpu":
        pytest.fail(f"{reason} (in CI every lane but gpu must run)", pytrace=False)
    pytest.skip(reason)
