"""Services that run beside a job as processes of their own, for as long as the job needs them.

`python -m accord.children MODULE ARGUMENTS` is `python -m MODULE ARGUMENTS`, and ends when its standard input
does: a job that is killed cannot stop its children, but its end of the pipe closes.
"""

import contextlib
import os
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from accord.errors import AccordError

COMMAND = "ACCORD_COMMAND"
"""Variable of the environment: what was typed, for the process that the command has become."""
STOP_TIMEOUT_S = 60.0
_POLL_S = 0.1

Child = subprocess.Popen[bytes]


def become(module: str, arguments: Sequence[str]) -> NoReturn:
    """Becomes `python -m MODULE ARGUMENTS`: options, Ctrl-C, exit status and terminal are its own."""
    typed = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], {**os.environ, COMMAND: typed})


@contextlib.contextmanager
def child(command: Sequence[str], log: Path) -> Iterator[Child]:
    """Runs a command during the block; what it says is in `log`.

    Its standard input is silent, and ends with us.
    """
    with open(log, "wb") as output:
        # A session of its own, so that a Ctrl-C reaches it once: from us.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        _stop(process)


def tethered(module: str, *arguments: str) -> list[str]:
    """The command for `child` that runs a module, and ends with us even when we are killed."""
    return [sys.executable, "-m", "accord.children", module, *arguments]


def wait_for_file(process: Child, file: Path, timeout_s: float, name: str, log: Path) -> None:
    """Waits until the child writes the file by which it says that it serves.

    Raises:
        AccordError: it ends or is silent instead.
    """
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        if process.poll() is not None:
            raise AccordError(f"{name} ended{last_line(log)}\nIts log is {log}")
        if time.monotonic() > deadline:
            raise AccordError(
                f"{name} did not serve within {timeout_s:.0f} s{last_line(log)}\nIts log is {log}"
            )
        time.sleep(_POLL_S)


def last_line(log: Path) -> str:
    """What a log says last, after a colon; empty when it says nothing."""
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def _stop(process: Child) -> None:
    """Ends the child, also when the user has no patience; what it started ends with it."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
        assert process.stdin is not None
        process.stdin.close()
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise


def _run_tethered(arguments: Sequence[str]) -> None:
    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    module, *rest = arguments
    threading.Thread(target=watch, daemon=True, name="tether").start()
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run_tethered(sys.argv[1:])
