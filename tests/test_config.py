"""Configs: what is read, and what the errors teach."""

import sys
from pathlib import Path

import pydantic
import pytest

import accord
from accord.config import Config, load_object, load_yaml, redact_url, resolve_path
from accord.errors import AccordError, ConfigError


class Part(Config):
    steps: int = 1
    learning_rate: float = 1e-3


class Whole(Config):
    first: Part = Part()
    second: Part = Part()
    parts: dict[str, Part] = pydantic.Field(default_factory=dict)
    name: str
    url: pydantic.SecretStr | None = None


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_yaml(Whole, path, overrides)
    return str(caught.value)


def test_defaults_file_and_overrides_in_this_order(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nfirst: {steps: 2, learning_rate: 0.5}\n")
    whole = load_yaml(Whole, path, ["first.steps=3", "second.learning_rate=1e-4"])
    assert (whole.first.steps, whole.first.learning_rate) == (3, 0.5)
    assert (whole.second.steps, whole.second.learning_rate) == (1, 1e-4)


def test_a_later_override_wins_and_values_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a")
    whole = load_yaml(Whole, path, ["name=b", "name='7'", "parts={x: {steps: 4}}", "parts.x.steps=5"])
    assert whole.name == "7"
    assert whole.parts["x"].steps == 5


def test_configs_are_frozen(tmp_path: Path) -> None:
    whole = load_yaml(Whole, write(tmp_path, "name: a"))
    with pytest.raises(pydantic.ValidationError):
        whole.name = "b"  # type: ignore[misc]


def test_unknown_key_names_file_key_close_match_and_known_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nfirst: {stepz: 2}")
    message = failure(path)
    assert str(path) in message
    assert "'first.stepz'" in message
    assert "did you mean 'steps'?" in message
    assert "known keys: steps, learning_rate" in message


def test_unknown_key_inside_a_mapping_of_configs(tmp_path: Path) -> None:
    message = failure(write(tmp_path, "name: a\nparts: {x: {learning_rat: 2}}"))
    assert "'parts.x.learning_rat'; did you mean 'learning_rate'?" in message


def test_unknown_key_in_an_override(tmp_path: Path) -> None:
    assert "unknown key 'frist'; did you mean 'first'?" in failure(
        write(tmp_path, "name: a"), "frist.steps=1"
    )


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    message = failure(write(tmp_path, "first: {steps: many}\nsecond: {x: 1}"))
    assert "first.steps" in message
    assert "'many'" in message
    assert "'second.x'" in message
    assert "missing key 'name'" in message


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("name: a", ["first.steps"], "not of the form section.key=value"),
        ("name: a", ["=1"], "not of the form section.key=value"),
        ("name: a", ["name.x=1"], "'name' is a value, not a section"),
        ("name: [", [], "is not valid YAML"),
        ("name: a\nname: b", [], "'name' is given twice (line 2)"),
        ("- a\n- b", [], "holds a list; expected a mapping"),
        ("name: a\nfirst: {learning_rate: .nan}", [], "finite"),
        ("name: a\nx: !!python/object/apply:os.getcwd []", [], "is not valid YAML"),
        ("name: \x00", [], "is not valid YAML"),
    ],
)
def test_bad_input(tmp_path: Path, text: str, overrides: list[str], expected: str) -> None:
    assert expected in failure(write(tmp_path, text), *overrides)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in failure(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "is not a text file" in failure(tmp_path / "binary")


def test_an_override_of_one_alias_leaves_the_other_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nfirst: &part {steps: 2}\nsecond: *part")
    whole = load_yaml(Whole, path, ["first.steps=9"])
    assert (whole.first.steps, whole.second.steps) == (9, 2)


@pytest.mark.parametrize(
    "override",
    [
        "url=[postgresql://user:hunter2@host/db]",
        "first.steps=postgresql://user:hunter2@host/db",
        "first.steps=postgresql://host/db?user=me&password=hunter2",
        "postgresql://user:hunter2@host/db",
        "postgresql://user:hunter2@host/db=1",
        "url=: [hunter2",
    ],
)
def test_no_error_shows_a_password(tmp_path: Path, override: str) -> None:
    assert "hunter2" not in failure(write(tmp_path, "name: a"), override)


def test_redact_url() -> None:
    assert redact_url("postgresql://me:p@ss:w@host:5432/db") == "postgresql://me:***@host:5432/db"
    assert redact_url("sqlite:////tmp/a@b.db") == "sqlite:////tmp/a@b.db"
    assert redact_url("postgresql://h/d?password=x&a=b") == "postgresql://h/d?password=***&a=b"


def test_load_object() -> None:
    assert load_object("accord.errors:AccordError") is AccordError
    assert load_object("pathlib:Path.cwd") == Path.cwd


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("accord.errors", "package.module:attribute"),
        (":x", "package.module:attribute"),
        ("accord.nowhere:x", "cannot import 'accord.nowhere'"),
        ("accord.errors:ConfigErorr", "did you mean 'ConfigError'?"),
    ],
)
def test_load_object_that_does_not_resolve(spec: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=r".*") as caught:
        load_object(spec)
    assert expected in str(caught.value)


def test_resolve_path() -> None:
    package = Path(accord.__file__).resolve().parent
    assert resolve_path("pkg://accord/py.typed") == package / "py.typed"
    assert resolve_path("pkg://accord.shapes/weights") == package / "shapes" / "weights"
    assert resolve_path("~/x") == Path.home() / "x"
    assert resolve_path(Path("a/b")) == Path("a/b")


@pytest.mark.parametrize(
    "uri", ["pkg://accord.nowhere/x", "pkg:///x", "pkg://accord/../../etc/passwd", "s3://bucket/x"]
)
def test_resolve_path_refuses(uri: str) -> None:
    with pytest.raises(ConfigError):
        resolve_path(uri)


def test_configs_need_no_torch() -> None:
    import subprocess

    code = "import sys, accord.recipe, accord.cli, accord.artifacts; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(accord.__file__).parent.parent).returncode == 0
    )
