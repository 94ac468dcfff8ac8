"""The commands of the README and of its pages, made small enough to be run as tests."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PAGES = ("README.md", "docs/research.md", "docs/operate.md", "docs/sandbox.md")
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    blocks = BLOCK.findall((ROOT / page).read_text())
    return [line for block in blocks for line in block.strip().splitlines()]


ALL = [(page, command) for page in PAGES for command in commands(page)]


def shrunk(command: str, directory: Path) -> list[str]:
    """The command's words: the demo's recipe made small, everything below runs/ put into `directory`."""
    words = shlex.split(command.replace("recipes/sandbox/demo.yaml", "recipes/sandbox/smoke.yaml"))
    words = [re.sub(r"^(sqlite:///)?runs/", rf"\g<1>{directory}/", word) for word in words]
    venv = Path(sys.executable).parent
    words[0] = words[0].replace(".venv/bin", str(venv))
    if "--study" in words:
        words += ["--set", f"run_dir={directory}/study"]
    if command == "make demo":
        arguments = f"--recipe recipes/sandbox/smoke.yaml --run-dir {directory}/demo"
        made = ["-o", f"{venv.parent}/.installed", f"VENV={venv.parent}"]  # this environment, as it is
        return ["make", *made, "demo", f"ARGS={arguments}"]
    if "--recipe" in words and "--run-dir" not in words:
        words += ["--run-dir", f"{directory}/demo"]
    if "softmax" in command and "--recipe" in words:
        words += ["--set", "ray.local=true"]
    if "ui" in words:  # a server that never ends: see that its store is there instead
        return [words[0], "experiments", "search"]
    return words


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        words, cwd=ROOT, env=merged, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800
    )
