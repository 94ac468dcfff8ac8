"""Jobs as processes of their own, which tests interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any


def start_and_kill(
    job: str,
    options: Sequence[str],
    root: Path,
    moment: Callable[[], bool],
    *,
    by: signal.Signals = signal.SIGKILL,
    preexec_fn: Callable[[], Any] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ray_jobs.JOB OPTIONS` and sends it `by` at the moment; how it ended.

    What it wrote is in `stderr`, all of it together: what a job says to people goes there.
    """
    with tempfile.TemporaryFile("w+") as output:  # no pipe: what Ray starts might hold it open
        process = subprocess.Popen(
            [sys.executable, "-m", f"ray_jobs.{job}", *options],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=preexec_fn,
        )
        try:
            while not moment():
                if process.poll() is not None:
                    raise AssertionError(f"{job} ended before its moment:\n{_read(output)}")
                time.sleep(0.01)
            process.send_signal(by)
            process.wait(timeout=300)
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess(process.args, process.returncode, stderr=_read(output))


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
