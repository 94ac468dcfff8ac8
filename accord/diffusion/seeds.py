"""Seeds of a request's candidates."""

from __future__ import annotations

import hashlib


def candidate_seed(seed: int, candidate: int) -> int:
    """The seed of candidate number `candidate` of a request with `seed`: 63 bits of SHA-256 of both.

    So the candidates of neighbouring seeds do not overlap, and a candidate keeps its seed however many others
    are asked for.
    """
    digest = hashlib.sha256(f"{int(seed)}:{int(candidate)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
