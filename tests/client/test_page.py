"""Every command and program of docs/client.md is run, against a server that answers as the gateway does."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2

from accord import client as api
from accord.client.errors import ClientError
from accord.v1 import generation_pb2
from tests.client import server
from tests.client.server import Faulty
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "client.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.strip().splitlines()
]
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def environment(faulty: Faulty, directory: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ACCORD_HOME": str(directory / "home"),
        "ACCORD_ENDPOINT": faulty.target,
        "ACCORD_TOKEN": server.TOKEN,
    }


def test_the_page_has_what_the_tests_below_run() -> None:
    assert len(COMMANDS) == 11
    assert len(PROGRAMS) == 5
    assert {shlex.split(command)[0] for command in COMMANDS} == {"accord", "grpcurl"}


def test_the_commands_run_one_after_the_other(faulty: Faulty, tmp_path: Path) -> None:
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "grpcurl" or words[:2] == ["accord", "serve"]:
            continue  # see below; the last is run by the tests of the services
        done = subprocess.run(
            [sys.executable, "-m", "accord.cli", *words[1:]],
            cwd=tmp_path,
            env=environment(faulty, tmp_path),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (tmp_path / "second.png").is_file()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"04.png", "contact-sheet.png"}


def test_the_programs_run(faulty: Faulty, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=environment(faulty, tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for program in PROGRAMS
    ]
    for process, program in zip(processes, PROGRAMS, strict=True):
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, f"{program}\n{stderr}"
    assert (tmp_path / "plain.png").read_bytes().startswith(b"\x89PNG")


def test_what_grpcurl_is_told_is_in_the_contract() -> None:
    """grpcurl is no part of Debian: its requests are read as it would read them."""
    assert generation_pb2.DESCRIPTOR
    assert health_pb2.DESCRIPTOR
    asked = [shlex.split(command) for command in COMMANDS if command.startswith("grpcurl")]
    methods = [words[-1] for words in asked if "/" in words[-1]]
    assert len(methods) == 2
    for words in asked:
        if "-d" in words:
            service, _, name = words[-1].partition("/")
            method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
            request = message_factory.GetMessageClass(method.input_type)()
            json_format.Parse(words[words.index("-d") + 1], request)


def test_the_tables_name_what_there_is() -> None:
    names = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \| [A-Z_]+", PAGE, re.MULTILINE)
    listed = {name for pair in names for name in pair if name}
    known = {
        name
        for name in api.__all__
        if isinstance(kind := getattr(api, name), type) and issubclass(kind, ClientError)
    }
    assert listed | {"ServerError"} == known - {"ClientError"}
    statuses = {int(status) for status in re.findall(r"^\| (\d+) \| ", PAGE, re.MULTILINE)}
    assert {getattr(api, name).exit_status for name in known} <= statuses


@pytest.mark.parametrize("name", sorted(re.findall(r"`(ACCORD_\w+)`", PAGE)))
def test_the_variables_that_it_names_are_read(name: str) -> None:
    assert f'"{name}"' in (ROOT / "accord" / "client" / "connection.py").read_text()
