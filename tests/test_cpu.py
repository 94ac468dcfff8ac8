"""The process that runs models."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from accord.cpu import use_cpu

if sys.argv[1] == "kept":
    use_cpu(1)

def work():
    for _ in range(20):
        torch.ones(2**24)  # 64 MiB

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that the kernel gave to a thread that takes and frees 64 MiB 20 times."""
    done = subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_stays_with_the_process() -> None:
    assert faults("kept") < faults("given back") / 10
