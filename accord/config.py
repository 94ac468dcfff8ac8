"""Typed configs: frozen pydantic models, read from YAML with dotted overrides, with errors that teach."""

import difflib
import importlib
import importlib.util
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from accord.errors import ConfigError

PACKAGE_SCHEME = "pkg://"
ENVIRONMENT_SCHEME = "env:"
DATABASE_VARIABLE = "ACCORD_DATABASE_URL"
"""Of the environment: the URL of the database of judgements, for every command that asks for one."""

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(pydantic.BaseModel):
    """Base of every config: frozen, and a key that it does not know is an error."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, hide_input_in_errors=True
    )


def load_yaml(cls: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path` as a `cls`. `overrides` are "section.key=value", where the value is parsed as YAML.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (with the closest known one), or a bad value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file; expected YAML in UTF-8") from None
    data = _parse_yaml(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; expected a mapping of sections")
    for override in overrides:
        _apply_override(data, override)
    return validate(cls, data, str(path))


def validate(cls: type[ConfigT], data: dict[str, Any], source: str) -> ConfigT:
    """Build a `cls` from plain data; `source` names where the data is from in the error.

    Raises:
        ConfigError: naming every wrong key by its dotted path.
    """
    try:
        return cls.model_validate(data)
    except pydantic.ValidationError as error:
        lines = [_explain(cls, problem) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{source}:\n  " + "\n  ".join(lines)) from None


def load_object(spec: str) -> Any:
    """The object that "package.module:attribute" names.

    Raises:
        ConfigError: when the form is another, or module or attribute do not exist.
    """
    module_name, separator, attribute = spec.partition(":")
    if not separator or not module_name or not attribute:
        raise ConfigError(f"{spec!r} names no object; expected the form 'package.module:attribute'")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"cannot import {module_name!r} of {spec!r}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            known = [known for known in vars(found) if not known.startswith("_")]
            raise ConfigError(f"{module_name!r} has no {attribute!r}{_did_you_mean(name, known)}")
        found = getattr(found, name)
    return found


def resolve_path(uri: str | Path) -> Path:
    """The local path of `uri`: "pkg://package/path" lies inside that installed package, else it is a path.

    Raises:
        ConfigError: when the package is not installed, or the path would leave the package.
    """
    text = str(uri)
    if not text.startswith(PACKAGE_SCHEME):
        if "://" in text:
            raise ConfigError(f"{text!r}: only local paths and {PACKAGE_SCHEME} are known here")
        return Path(text).expanduser()
    package, _, inside = text.removeprefix(PACKAGE_SCHEME).partition("/")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"{text!r}: there is no installed package {package!r}")
    root = Path(next(iter(found.submodule_search_locations))).resolve()
    path = (root / inside).resolve()
    if not path.is_relative_to(root):
        raise ConfigError(f"{text!r} leads out of the package {package!r}")
    return path


def environment_value(text: str, what: str = "this value") -> str:
    """`text` itself, or, of "env:NAME", what the environment has under NAME. It may be a secret.

    Raises:
        ConfigError: NAME is not set there; `what` says what it was for.
    """
    if not text.startswith(ENVIRONMENT_SCHEME):
        return text
    name = text.removeprefix(ENVIRONMENT_SCHEME)
    if not os.environ.get(name):
        raise ConfigError(f"{what} is to be read from the environment, but {name} is not set there")
    return os.environ[name]


_PASSWORD = re.compile(r"(?<=://)([^/\s@:]*):([^/\s]*)@")
_PASSWORD_PARAMETER = re.compile(r"(?i)\b(password|passwd|token|secret)=[^&\s'\"]*")


def redact_url(url: str) -> str:
    """`url` fit to be shown: the password of "scheme://user:password@host" becomes ***."""
    return _PASSWORD_PARAMETER.sub(r"\1=***", _PASSWORD.sub(r"\1:***@", url))


def known_keys(cls: type[pydantic.BaseModel]) -> list[str]:
    """The keys that a config knows, in the order in which they are declared."""
    return list(cls.model_fields)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.2; PyYAML wants 1.0e-4), and no key is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{name!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return dict(super().construct_mapping(node, deep=deep))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return _unshared(yaml.load(text, _Loader))  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        # Without the excerpt that YAML's own message has: it may be a password.
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(f"{source} is not valid YAML: {error.problem}{line}") from None
    except yaml.YAMLError:
        raise ConfigError(f"{source} is not valid YAML: it has characters that YAML forbids") from None


def _unshared(value: Any) -> Any:
    """A copy without YAML's aliases (*name): an override of one place must not change the other."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, separator, value = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"the override {redact_url(override)!r} is not of the form section.key=value")
    section = data
    for depth, key in enumerate(keys[:-1], start=1):
        inner = section.get(key)
        if inner is None:
            inner = section[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"the override {dotted!r}: {'.'.join(keys[:depth])!r} is a value, not a section of keys"
            )
        section = inner
    section[keys[-1]] = _parse_yaml(value, f"the value of {dotted!r}")


def _explain(cls: type[pydantic.BaseModel], problem: Any) -> str:
    location = list(problem["loc"])
    dotted = redact_url(".".join(str(part) for part in location)) or "(the whole)"
    if problem["type"] == "extra_forbidden":
        known = _keys_at(cls, location[:-1])
        listing = f"; known keys: {', '.join(known)}" if known else ""
        return f"unknown key {dotted!r}{_did_you_mean(str(location[-1]), known)}{listing}"
    if problem["type"] == "missing":
        return f"missing key {dotted!r}: it has no default"
    if location and location[-1] == "[key]":
        return f"unknown key {dotted.removesuffix('.[key]')!r}: {problem['msg']}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem["input"]
    if problem["type"] != "value_error" and (given is None or isinstance(given, str | int | float)):
        message += f", got {given!r:.80}"
    return f"{dotted}: {redact_url(message)}"


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _keys_at(cls: type[pydantic.BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys known to the config nested in `cls` at `location`."""
    candidates: list[type[pydantic.BaseModel]] = [cls]
    for part in location:
        inner: list[type[pydantic.BaseModel]] = []
        for candidate in candidates:
            field = candidate.model_fields.get(str(part))
            if field is not None:
                inner.extend(_models_in(field.annotation))
        candidates = inner or candidates
    return list(dict.fromkeys(key for candidate in candidates for key in known_keys(candidate)))


def _models_in(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, pydantic.BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
