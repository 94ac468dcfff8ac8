"""Who may import what: the method knows neither Ray nor gRPC; services and jobs do not know each other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The top-level packages that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def speaks_grpc(path: Path) -> bool:
    inside = path.relative_to(ROOT).parts
    return inside[:2] == ("accord", "client") or path.name.endswith("_pb2_grpc.py")


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("accord", {"ray", "kubernetes", "services", "ray_jobs", "tests"}),
        ("services", {"ray_jobs", "tests"}),
        ("ray_jobs", {"services", "tests"}),
    ],
)
def test_dependencies_point_one_way(package: str, forbidden: set[str]) -> None:
    found = modules(package)
    assert found
    for path in found:
        assert not forbidden & set(imported(path)), path


def test_of_the_method_only_the_client_and_the_stubs_speak_grpc() -> None:
    speakers = {path for path in modules("accord") if "grpc" in set(imported(path))}
    assert speakers
    assert all(speaks_grpc(path) for path in speakers)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("services.app", {"torch", "diffusers", "open_clip"}),  # what deploys, and every gateway's replica
        ("ray_jobs.loop", {"torch", "diffusers", "transformers", "open_clip", "ray"}),
        # `ensure` tells Ray to listen on the loopback interface alone, before it is imported.
        ("ray_jobs.study, ray_jobs.pretrain_shapes, ray_jobs.demo", {"ray"}),
    ],
)
def test_what_only_directs_the_work_imports_none_of_it(module: str, heavy: set[str]) -> None:
    """Seconds of every start, and of a gateway half a gigabyte."""
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
