"""Bearer tokens: one file format for every service.

    tokens:
      - name: first
        sha256: 2c26b46b68ffc68f...    # of the token's text, in hexadecimal
        scopes: [generate, score]
        expires: 2027-01-31            # optional: midnight UTC, or a full time with its zone

A token is 256 bits from the system's random source, so plain SHA-256 is the right hash: there is no
dictionary to try against it, and a slow hash (bcrypt, Argon2) would only make every request slow. The text of
a token is shown once, when it is made; it is in no file but the one that its owner keeps, and in no repr, log
or error.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import pydantic
import yaml

from accord.artifacts import storage_errors
from accord.config import Config, load_yaml
from accord.errors import ConfigError, TokenError

Scope: TypeAlias = Literal["generate", "score", "rate", "feedback", "admin"]
SCOPES: tuple[str, ...] = get_args(Scope)
FIRST_TOKEN = "first"

# Told from other secrets at a glance, by people and by secret scanners.
_PREFIX = "accord_"
_TOKEN_BYTES = 32
_MOST_CHARACTERS = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: the name of the token, and what it may do."""

    name: str
    scopes: frozenset[str]


class TokenRecord(Config):
    """A token as its file knows it: everything but its text."""

    name: str
    sha256: str = pydantic.Field(repr=False)
    scopes: tuple[Scope, ...] = pydantic.Field(min_length=1)
    expires: pydantic.AwareDatetime | None = None

    # Before pydantic's own checks, and without the value: it may be a token that was put in the wrong place.
    @pydantic.field_validator("name", mode="before")
    @classmethod
    def _check_name(cls, name: Any) -> Any:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith(_PREFIX):
            raise ValueError(
                "a token's name is 1 to 64 letters, digits, dots, dashes and underscores, "
                f"and does not begin with {_PREFIX!r}"
            )
        return name

    @pydantic.field_validator("sha256", mode="before")
    @classmethod
    def _check_sha256(cls, sha256: Any) -> Any:
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ValueError("expected the SHA-256 of the token as 64 lower-case hexadecimal digits")
        return sha256

    @pydantic.field_validator("expires", mode="before")
    @classmethod
    def _read_date(cls, expires: Any) -> Any:
        if isinstance(expires, datetime.date) and not isinstance(expires, datetime.datetime):
            return datetime.datetime.combine(expires, datetime.time(), datetime.UTC)
        return expires

    def expired(self, now: datetime.datetime) -> bool:
        """Whether the token is no longer good at `now` (with its zone)."""
        return self.expires is not None and now >= self.expires


class _Content(Config):
    tokens: tuple[TokenRecord, ...] = ()

    @pydantic.model_validator(mode="after")
    def _check_names(self) -> "_Content":
        names = [record.name for record in self.tokens]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tokens of the same name: {', '.join(twice)}; a name names one token")
        return self


class TokenFile:
    """The tokens of a file, which is read again when it has changed: a revoked token is refused at once."""

    def __init__(self, path: Path, records: Sequence[TokenRecord], signature: object) -> None:
        self.path = path
        self._records = tuple(records)
        self._signature = signature

    @classmethod
    def load(cls, path: str | Path) -> "TokenFile":
        """The tokens of `path` (YAML or JSON).

        Raises:
            TokenError: there is no such file, or it does not say what it must say.
        """
        path = Path(path).expanduser()
        signature = _signature(path)  # before the reading: a change in between is seen the next time
        return cls(path, _read(path), signature)

    def __repr__(self) -> str:
        return f"TokenFile({str(self.path)!r}, {len(self._records)} tokens)"

    @property
    def records(self) -> tuple[TokenRecord, ...]:
        """What the file holds now."""
        self._refresh()
        return self._records

    def authenticate(self, token: str) -> Principal | None:
        """Who has this token; None when nobody has, or it has expired."""
        self._refresh()
        if len(token) > _MOST_CHARACTERS:
            return None
        sha256 = _hash(token)
        found: TokenRecord | None = None
        for record in self._records:  # all of them, so that the time taken does not tell which one it is
            if hmac.compare_digest(record.sha256, sha256):
                found = record
        if found is None or found.expired(datetime.datetime.now(datetime.UTC)):
            return None
        return Principal(found.name, frozenset(found.scopes))

    def _refresh(self) -> None:
        """Read the file again if it has changed: one `stat` when it has not."""
        signature = _signature(self.path)
        if signature == self._signature:
            return
        self._signature = signature
        if signature is None:  # taken away on purpose: nobody is let in
            self._records = ()
            return
        try:
            self._records = _read(self.path)
        except TokenError as error:  # an editing accident: it must lock nobody out, and let nobody new in
            _log.warning("the tokens stay as they were: %s", error)


def add(
    path: str | Path, name: str, scopes: Sequence[str], *, expires: datetime.datetime | None = None
) -> str:
    """Make a token, write its hash into `path` (made when it is not there), and return the token's text.

    The file is replaced as a whole, readable by its owner only; comments in it are lost.

    Raises:
        TokenError: the name is taken or of no allowed form, a scope is unknown, or the file is not writable.
    """
    path = Path(path).expanduser()
    token = _PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    record = _record(name, scopes, token, expires)
    with _locked(path):
        records = _read(path) if path.exists() else ()
        if any(known.name == name for known in records):
            raise TokenError(
                f"{path} has a token named {name!r} already: choose another name, or revoke that one first "
                f"(accord token revoke {name})"
            )
        _write(path, (*records, record))
    return token


def remove(path: str | Path, name: str) -> None:
    """Take the token `name` out of the file: services that read it refuse the token from then on.

    Raises:
        TokenError: there is no such token or file.
    """
    path = Path(path).expanduser()
    with _locked(path):
        records = _read(path)
        kept = tuple(record for record in records if record.name != name)
        if len(kept) == len(records):
            names = ", ".join(sorted(record.name for record in records)) or "none"
            raise TokenError(f"{path} has no token named {name!r}; it has: {names}")
        _write(path, kept)


def ensure_first_token(tokens_path: str | Path, secret_path: str | Path) -> bool:
    """On first start, make a token with every scope: its hash in `tokens_path`, its text in `secret_path`.

    Both are readable by their owner only. When there is a file of tokens, even an empty one, nothing is done.
    Of two processes that start at once, one makes the token and the other finds it.

    Returns:
        Whether a token was made.

    Raises:
        TokenError: a file cannot be written.
    """
    tokens_path, secret_path = Path(tokens_path).expanduser(), Path(secret_path).expanduser()
    if tokens_path.exists():  # also where the file is mounted and nothing beside it can be written
        return False
    token = _PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    with _locked(tokens_path):
        if tokens_path.exists():
            return False
        # The secret first: killed in between, the next start makes another one.
        _write_private(secret_path, token + "\n")
        _write(tokens_path, (_record(FIRST_TOKEN, SCOPES, token, None),))
    return True


def read_secret(path: str | Path) -> str:
    """The text of a token from a file that holds nothing else.

    Raises:
        TokenError: there is no such file, or it holds no token.
    """
    path = Path(path).expanduser()
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise TokenError(f"cannot read a token from {path}: {reason}") from None
    if not token or len(token.split()) != 1 or len(token) > _MOST_CHARACTERS or not token.isascii():
        raise TokenError(f"{path} holds no token: expected one word and nothing else")
    return token


def state_directory() -> Path:
    """Where `accord serve` keeps its tokens, and clients on the same machine look for one.

    $ACCORD_HOME, or `accord` in $XDG_STATE_HOME, or ~/.local/state/accord.
    """
    if home := os.environ.get("ACCORD_HOME"):
        return Path(home).expanduser()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "accord"


def default_tokens_path() -> Path:
    """The file of hashed tokens that `accord serve` and `accord token` use unless told otherwise."""
    return state_directory() / "tokens.yaml"


def default_secret_path() -> Path:
    """The file with the text of the first token, which clients on the same machine use by default."""
    return state_directory() / "token"


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _record(name: str, scopes: Sequence[str], token: str, expires: datetime.datetime | None) -> TokenRecord:
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        what = f"unknown scope {unknown[0]!r:.40}" if unknown else "a token needs a scope"
        raise TokenError(f"{what}; scopes are: {', '.join(SCOPES)}")
    try:
        # Not the constructor: its types promise what is still to be checked.
        return TokenRecord.model_validate(
            {"name": name, "sha256": _hash(token), "scopes": tuple(dict.fromkeys(scopes)), "expires": expires}
        )
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise TokenError(str(problem["msg"]).removeprefix("Value error, ")) from None


def _signature(path: Path) -> object:
    """What changes when the file does; None when there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _read(path: Path) -> tuple[TokenRecord, ...]:
    if not path.is_file():
        raise TokenError(
            f"there is no token file {path}: `accord serve` makes one when it starts, and so does "
            f"`accord token create NAME --file {path}`"
        )
    try:
        return load_yaml(_Content, path).tokens
    except ConfigError as error:
        raise TokenError(str(error)) from None


def _write(path: Path, records: Sequence[TokenRecord]) -> None:
    content = _Content(tokens=tuple(records)).model_dump(mode="json", exclude_none=True)
    if path.suffix.lower() == ".json":
        _write_private(path, json.dumps(content, indent=2) + "\n")
    else:
        _write_private(path, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100))


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, all or nothing, on the disk when this returns."""
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(name, path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise TokenError(f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer of `path` at a time. The lock is a file beside it, since `path` itself is replaced."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TokenError(f"cannot write beside {path}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # freed when the process ends, however it ends
        yield
    finally:
        os.close(handle)
