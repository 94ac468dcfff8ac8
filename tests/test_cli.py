"""The command line: which job each command becomes."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import accord
from accord import cli
from tests.conftest import ROOT

JOBS = {
    "collect": "collect",
    "evaluate": "evaluate",
    "finetune": "finetune",
    "judge": "judge",
    "learn-reward": "learn_reward",
    "loop": "loop",
    "pretrain-shapes": "pretrain_shapes",
    "report": "report",
    "score": "score",
}


class Executed(Exception):  # noqa: N818 (no error: execve ends this program)
    pass


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    calls: list[list[str]] = []

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert path == sys.executable
        calls.append(arguments)
        raise Executed

    monkeypatch.setattr("os.execve", execve)
    return calls


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, arguments)


@pytest.mark.parametrize(("command", "module"), JOBS.items())
def test_a_command_becomes_its_job_with_all_options(
    command: str, module: str, executed: list[list[str]]
) -> None:
    options = ["--recipe", "r.yaml", "--set", "a.b=1", "--set=c=2", "--address", "auto", "--help"]
    invoke(command, *options)
    assert executed == [[sys.executable, "-m", f"ray_jobs.{module}", *options]]


@pytest.mark.parametrize("command", ["job", "status"])
def test_operators_commands_become_their_module(command: str, executed: list[list[str]]) -> None:
    invoke(command, "list", "--address", "http://127.0.0.1:8265", "--help")
    words = ["list", "--address", "http://127.0.0.1:8265", "--help"]
    assert executed == [[sys.executable, "-m", "ray_jobs.operate", command, *words]]


def test_models_knows_its_commands_without_mlflow() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from accord import cli;"
        "shown = CliRunner().invoke(cli.app, ['models', '--help']).stdout;"
        "assert all(c in shown for c in ('register', 'promote', 'rollback', 'lineage')), shown;"
        "assert not {'mlflow', 'ray', 'torch', 'kubernetes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", JOBS.values())
def test_each_job_exists(module: str) -> None:
    assert importlib.util.find_spec(f"ray_jobs.{module}") is not None


def test_demo_is_the_loop_and_serving_on_the_demo_s_recipe(executed: list[list[str]]) -> None:
    invoke("demo", "--set", "seed=1")
    invoke("demo", "--skip-serving", "--set", "seed=1")
    options = ["--recipe", str(ROOT / "recipes" / "sandbox" / "demo.yaml"), "--set", "seed=1"]
    assert executed == [
        [sys.executable, "-m", "ray_jobs.demo", *options],
        [sys.executable, "-m", "ray_jobs.loop", *options],
    ]


def test_demo_with_a_person_is_the_same_with_fewer_images(executed: list[list[str]]) -> None:
    invoke("demo", "--rater", "ann", "--set", "seed=1")
    invoke("demo", "--skip-serving", "--rater=ann")
    first, second = executed
    assert first[:3] == [sys.executable, "-m", "ray_jobs.demo"]
    assert first[-2:] == ["--set", "seed=1"]  # last, and so it counts
    assert second[2] == "ray_jobs.loop"
    for words in executed:
        assert {"panel=null", "feedback.rater=ann", "run_dir=runs/demo-ann"} <= set(words)
        assert not [word for word in words if word.startswith("--rater")]
    for arguments in (["--rater"], ["--rater", "--set"]):
        assert "accord demo --rater me" in invoke("demo", *arguments).stderr
    assert len(executed) == 2


def test_serve_is_the_services_on_this_machine(executed: list[list[str]]) -> None:
    invoke("serve", "--port", "0", "--help")
    assert executed == [[sys.executable, "-m", "services.local", "--port", "0", "--help"]]


def test_demo_without_a_checkout_says_what_to_do(
    executed: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(accord, "__file__", str(tmp_path / "accord" / "__init__.py"))
    result = invoke("demo")
    assert result.exit_code == 2
    assert "checkout" in result.stderr
    assert "accord loop --recipe FILE" in result.stderr
    assert executed == []


def test_help_and_version() -> None:
    text = invoke("--help").stdout
    assert all(command in text for command in [*JOBS, "demo"])
    assert invoke("--version").stdout == f"accord {accord.__version__}\n"


def test_an_unknown_command_is_refused() -> None:
    result = invoke("colect")
    assert result.exit_code == 2
    assert "collect" in result.stderr


def test_exit_status_and_arguments_are_the_job_s(tmp_path: Path) -> None:
    (tmp_path / "ray_jobs").mkdir()
    (tmp_path / "ray_jobs" / "__init__.py").touch()
    (tmp_path / "ray_jobs" / "probe.py").write_text("import sys; print(sys.argv[1:]); sys.exit(7)")
    done = subprocess.run(
        [sys.executable, "-c", "from accord.cli import run_job; run_job('probe', ['--set', 'name=a b'])"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == "['--set', 'name=a b']\n"


def test_make_help_lists_every_target() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True)
    assert {"demo", "test", "lint", "format", "help"} <= set(targets)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout)
    assert all(re.search(rf"^ *{target} +\S", plain, re.MULTILINE) for target in targets)


def test_make_says_when_python_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    command = ["make", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}", "demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.9.1" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_constraints_are_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+!]*", line) for line in pinned)
    assert {"torch==2.14.0", "torchvision==0.29.0"} <= set(pinned)
