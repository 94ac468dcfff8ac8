"""What can go wrong with a call, as exceptions, read from a gRPC status and its google.rpc details.

Besides the gateway's own statuses there are those of Ray Serve's proxy, of a TLS proxy in front, and of gRPC
itself; docs/client.md lists them.
"""

# ruff: noqa: N818 (they are named as gRPC names its codes)

import dataclasses
import re
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from accord.errors import AccordError

_DETAILS_KEY = "grpc-status-details-bin"
_MOST_CHARACTERS = 300

# Ray's words for a replica, worker or node that died under a call: "The actor died unexpectedly before ...",
# "ray.exceptions.ActorDiedError: ...". Serve's proxy answers them with INTERNAL and a stack trace.
_DEAD_REPLICA = re.compile(
    r"actor (is )?(dead|died)|actor .{0,40}unavailable|worker died|"
    r"\b(RayActor|ActorDied|ActorUnavailable|WorkerCrashed|NodeDied|OwnerDied|DeploymentUnavailable)\w*Error",
    re.IGNORECASE,
)
# What HTTP/2 proxies make of a server that goes away.
_RESET = re.compile(r"RST_STREAM|GOAWAY|stream (was )?(terminated|removed)|connection reset", re.IGNORECASE)
# Serve's proxy before the application has a route.
_NO_ROUTE = "ray.serve.RayServeAPIService"
_CONNECT = re.compile(
    r"failed to connect|connection refused|dns resolution failed|name resolution", re.IGNORECASE
)
_CERTIFICATE = re.compile(
    r"CERTIFICATE_VERIFY_FAILED|not in peer certificate|hostname verification|certificate (has )?expired",
    re.IGNORECASE,
)
_CLIENT_CERTIFICATE = re.compile(
    r"CERTIFICATE_REQUIRED|BAD_CERTIFICATE|UNKNOWN_CA|ALERT_\w*CERTIFICATE", re.IGNORECASE
)
_NOT_TLS = re.compile(r"WRONG_VERSION_NUMBER|HTTP_REQUEST|ssl handshake failed", re.IGNORECASE)
_CLOSED = re.compile(
    r"failed to connect.*(socket closed|connection reset)|http1\.x server", re.IGNORECASE | re.DOTALL
)
_REQUESTS_FAULT = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ALREADY_EXISTS,
)
_MESSAGE_SIZE = re.compile(r"message larger than max", re.IGNORECASE)


class ClientError(AccordError):
    """Base of all errors of a call. `exit_status` is what the command line leaves with."""

    exit_status = 1
    retryable = False
    retry_after_s: float | None = None
    """When the server wants to be asked again, if it says."""

    def __init__(self, message: str, *, code: str = "", reason: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.code = code
        """Name of the gRPC status code."""
        self.reason = reason
        """Of the catalogue in docs/serve.md; empty when the answer was not the gateway's."""
        self.request_id = request_id


@dataclasses.dataclass(frozen=True, slots=True)
class Violation:
    """One field of the request that is wrong: its path, and what was expected."""

    field: str
    description: str


class InvalidRequest(ClientError):
    """The request can never succeed as it is: see `violations`."""

    exit_status = 2

    def __init__(self, message: str, violations: tuple[Violation, ...] = (), **about: str) -> None:
        super().__init__(message, **about)
        self.violations = violations


class Unauthenticated(ClientError):
    """There is no token, or the server does not know it, or it has expired."""

    exit_status = 3


class PermissionDenied(ClientError):
    """The token is good, but its scopes do not cover the call."""

    exit_status = 3


class NotFound(ClientError):
    """What was asked for is not there."""

    exit_status = 2


class ModelNotFound(NotFound):
    """No loaded model has this alias or digest."""


class Overloaded(ClientError):
    """The server, or this token's share of it, is used up: again after `retry_after_s`."""

    exit_status = 4
    retryable = True


class DeadlineExceeded(ClientError):
    """The call took longer than its deadline or its time budget allows."""

    exit_status = 4


class Unavailable(ClientError):
    """The server cannot be reached, is not ready, or died under the call, also after retries."""

    exit_status = 4
    retryable = True

    never_connected = False
    """Nothing answered at the address at all."""


class UntrustedCertificate(Unavailable):
    """TLS could not be agreed on: a certificate is not trusted, or one side does not speak TLS."""

    exit_status = 3
    retryable = False


class ServerError(ClientError):
    """A failure that is the server's own fault. Its log has more, under the request's id."""


def from_rpc(error: Any, *, target: str, request_id: str, has_token: bool, secure: bool) -> ClientError:
    """The exception for a failed call; `error` is a grpc.RpcError or a grpc.aio.AioRpcError."""
    rich = _rich_status(error)
    found = _classified(error, rich, target, request_id, has_token, secure)
    retry = _detail(rich, error_details_pb2.RetryInfo)
    if retry:
        found.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return found


def _classified(
    error: Any, rich: status_pb2.Status | None, target: str, request_id: str, has_token: bool, secure: bool
) -> ClientError:
    code: grpc.StatusCode = error.code()
    details = str(error.details() or "")
    info = _detail(rich, error_details_pb2.ErrorInfo)
    about = {"code": code.name, "reason": info.reason if info else "", "request_id": request_id}
    message = _shortened(rich.message if rich and rich.message else details)

    if code is grpc.StatusCode.UNAUTHENTICATED:
        if has_token and not info:  # a proxy in front, which has reasons of its own
            return Unauthenticated(
                f"{target} refuses this client: {message or _wrong_token(target)}", **about
            )
        return Unauthenticated(_wrong_token(target) if has_token else _no_token(target), **about)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return PermissionDenied(message or f"{target} does not allow this call with this token", **about)
    if code in _REQUESTS_FAULT:
        violations = _violations(rich)
        return InvalidRequest(_listed(message, violations), violations, **about)
    if code is grpc.StatusCode.NOT_FOUND:
        if _NO_ROUTE in details:
            return Unavailable(f"{target} is up, but its application is not ready yet", **about)
        kind = ModelNotFound if info and info.reason == "MODEL_NOT_FOUND" else NotFound
        return kind(message, **about)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not _MESSAGE_SIZE.search(details):
        return Overloaded(message or "the server is full", **about)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(_too_late(message, about["reason"], target), **about)
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(details, message, target, secure, about)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ServerError(
            f"what answers at {target} does not know this method: is it Accord's gateway?", **about
        )
    if not info and (_DEAD_REPLICA.search(details) or _RESET.search(details)):
        return Unavailable(f"a part of the server at {target} died under the call", **about)
    return ServerError(f"the server failed ({code.name}): {message or 'it does not say why'}", **about)


def _unavailable(details: str, message: str, target: str, secure: bool, about: dict[str, str]) -> ClientError:
    if _CERTIFICATE.search(details):
        return UntrustedCertificate(
            f"the certificate of {target} is not trusted, or is for another name: name the authority that "
            f"signed it (--ca-file, ACCORD_CA_FILE or TLS(ca_file=...)). gRPC says: {_last_error(details)}",
            **about,
        )
    if _CLIENT_CERTIFICATE.search(details):
        return UntrustedCertificate(
            f"{target} wants a certificate of this client that it trusts: give one with its key "
            f"(--certificate and --key, or TLS(certificate_file=..., key_file=...))",
            **about,
        )
    if _NOT_TLS.search(details):
        return UntrustedCertificate(
            f"{target} and this client agree on no TLS: perhaps the server speaks none (leave TLS out), or "
            f"wants a client certificate. gRPC says: {_last_error(details)}",
            **about,
        )
    if _CONNECT.search(details) or _CLOSED.search(details):
        hint = _closed(target, secure) if _CLOSED.search(details) else _no_server(target)
        error = Unavailable(f"{hint}. gRPC says: {_last_error(details)}", **about)
        error.never_connected = True
        return error
    return Unavailable(f"{target} is not available: {message or 'it does not say why'}", **about)


def _no_server(target: str) -> str:
    return (
        f"no server answers at {target}: start one with `accord serve`, or say where it is (--endpoint or "
        "ACCORD_ENDPOINT)"
    )


def _closed(target: str, secure: bool) -> str:
    if secure:
        return (
            f"{target} ends the connection at once: perhaps it wants a certificate of this client "
            "(--certificate and --key, or TLS(certificate_file=..., key_file=...))"
        )
    return (
        f"{target} ends the connection at once: perhaps it wants TLS (grpcs://{target}), or is no gRPC server"
    )


def _no_token(target: str) -> str:
    return (
        f"{target} wants a token, and there is none: set ACCORD_TOKEN, or name a file (--token-file). "
        "`accord serve` says where it keeps the first one; `accord token create` makes others"
    )


def _wrong_token(target: str) -> str:
    return (
        f"{target} does not know this token, or it has expired or was revoked: `accord token list` shows "
        "those that there are, where the server runs"
    )


def _too_late(message: str, reason: str, target: str) -> str:
    if reason:
        return message
    return (
        f"{target} did not answer in time: allow more (timeout_s, --timeout), or ask for fewer candidates or "
        "steps"
    )


def _listed(message: str, violations: tuple[Violation, ...]) -> str:
    if len(violations) < 2:
        return message or "the request is not valid"
    lines = [f"{violation.field}: {violation.description}" for violation in violations]
    return "the request is not valid:\n  " + "\n  ".join(lines)


def _rich_status(error: Any) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except (
                Exception
            ):  # what is no status is no help; protobuf's own error class differs between versions
                return None
    return None


def _detail(rich: status_pb2.Status | None, kind: Any) -> Any:
    for packed in rich.details if rich else ():
        if packed.Is(kind.DESCRIPTOR):
            found = kind()
            packed.Unpack(found)
            return found
    return None


def _violations(rich: status_pb2.Status | None) -> tuple[Violation, ...]:
    bad = _detail(rich, error_details_pb2.BadRequest)
    found = bad.field_violations if bad else ()
    return tuple(Violation(violation.field, violation.description) for violation in found)


def _last_error(details: str) -> str:
    return _shortened(details.split("last error:")[-1].strip())


def _shortened(text: str) -> str:
    """The first line, short: Serve's own texts are stack traces."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= _MOST_CHARACTERS else line[: _MOST_CHARACTERS - 3] + "..."
