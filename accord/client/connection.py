"""Where the server is, how to trust it, and which token to show: from arguments, environment and defaults."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import grpc

from accord import tokens
from accord.errors import ConfigError

DEFAULT_TARGET = "localhost:9000"
"""Where `accord serve` listens."""
ENDPOINT_VARIABLE = "ACCORD_ENDPOINT"
TOKEN_VARIABLE = "ACCORD_TOKEN"
CA_VARIABLE = "ACCORD_CA_FILE"

_OPTIONS = (
    # The images of a whole request are one message. The server bounds what it makes.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # See accord.client.retry.
    ("grpc.enable_retries", 0),
    # A server that comes back is found again soon.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 3000),
)
_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?|unix:.*")
_SECURE = ("grpcs://", "https://")
_PLAIN = ("grpc://", "http://")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """How to trust the server, and what to show it."""

    ca_file: str | Path | None = None
    """PEM of the authorities to trust; without it, the usual public ones."""
    certificate_file: str | Path | None = None
    """PEM of this client's certificate, for a server that asks for one (mTLS)."""
    key_file: str | Path | None = None
    server_name: str | None = None
    """The name that the server's certificate must be for, where it is not that of the address."""

    def __post_init__(self) -> None:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ConfigError(
                "a client certificate needs its key, and a key its certificate: give both or neither"
            )

    def credentials(self) -> Any:
        """grpc.ChannelCredentials.

        Raises:
            ConfigError: a file cannot be read, or is no PEM of its kind.
        """
        return grpc.ssl_channel_credentials(
            root_certificates=_pem(self.ca_file, "CERTIFICATE"),
            private_key=_pem(self.key_file, "PRIVATE KEY"),
            certificate_chain=_pem(self.certificate_file, "CERTIFICATE"),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, ready to be called."""

    target: str
    tls: TLS | None
    token: str | None = dataclasses.field(repr=False)

    @classmethod
    def find(
        cls,
        target: str | None = None,
        *,
        token: str | None = None,
        token_file: str | Path | None = None,
        tls: TLS | bool | None = None,
    ) -> "Endpoint":
        """What the arguments say, or else the environment, or else what `accord serve` left on this machine.

        TLS is used when `tls` says so, when the target begins with grpcs://, or when ACCORD_CA_FILE is set.
        The token of the local `accord serve` is only ever sent to this machine.

        Raises:
            ConfigError, TokenError: settings that contradict one another, or files that cannot be read.
        """
        address = target or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_TARGET
        secure: bool | None = None
        for scheme in (*_SECURE, *_PLAIN):
            if address.startswith(scheme):
                address, secure = address.removeprefix(scheme).rstrip("/"), scheme in _SECURE
        if not address or any(character.isspace() for character in address):
            raise ConfigError(f"{address!r} is no address; expected HOST:PORT or grpcs://HOST:PORT")
        return cls(address, _tls(tls, secure, address), _token(token, token_file, address))

    def channel(self, aio: bool) -> Any:
        """A grpc.Channel or grpc.aio.Channel, which connects when it is first used."""
        module = grpc.aio if aio else grpc
        if self.tls is None:
            return module.insecure_channel(self.target, options=_OPTIONS)
        names: tuple[tuple[str, Any], ...] = ()
        if self.tls.server_name:
            names = (("grpc.ssl_target_name_override", self.tls.server_name),)
        return module.secure_channel(self.target, self.tls.credentials(), options=(*_OPTIONS, *names))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What is sent with each call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


def _tls(tls: TLS | bool | None, secure: bool | None, address: str) -> TLS | None:
    if isinstance(tls, TLS):
        if secure is False:
            raise ConfigError(f"{address} was given as plain (grpc://), and TLS settings with it: choose one")
        return tls
    ca_file = os.environ.get(CA_VARIABLE) or None
    if tls is None:
        tls = secure if secure is not None else ca_file is not None
    return TLS(ca_file=ca_file) if tls else None


def _token(token: str | None, token_file: str | Path | None, address: str) -> str | None:
    if token is not None and token_file is not None:
        raise ConfigError("both a token and a token file are given: choose one")
    if token is None and token_file is not None:
        return tokens.read_secret(token_file)
    token = token if token is not None else os.environ.get(TOKEN_VARIABLE, "")
    if token := token.strip():
        if not token.isascii() or len(token.split()) != 1:
            raise ConfigError(
                "the token has characters that no token has; expected one word of letters and digits"
            )
        return token
    default = tokens.default_secret_path()
    return tokens.read_secret(default) if _LOOPBACK.fullmatch(address) and default.is_file() else None


def _pem(path: str | Path | None, kind: str) -> bytes | None:
    if path is None:
        return None
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if b"-----BEGIN" not in data or kind.encode() not in data:
        raise ConfigError(
            f"{path} holds no {kind.lower()}; expected a PEM file with '-----BEGIN ... {kind}-----'"
        )
    return data
