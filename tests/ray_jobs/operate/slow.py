"""A module that takes its time to be imported: a recipe that names it is a job that runs until it is let
go."""

import sys
import time
from pathlib import Path

if "--run-dir" in sys.argv:  # on the cluster
    release = Path(sys.argv[sys.argv.index("--run-dir") + 1]).with_suffix(".release")
    print("waiting", flush=True)
    until = time.monotonic() + 240
    while not release.exists() and time.monotonic() < until:
        time.sleep(0.1)
    print("let go", flush=True)


def evaluator(seed: int) -> None:
    """Never made."""
