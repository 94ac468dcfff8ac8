"""One catalogue of reasons, and how an error becomes a gRPC status with google.rpc details.

A status never holds a stack trace, a path or an address: what is unexpected is logged under the request's id,
and the client is told the id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "accord"
DETAILS_KEY = "grpc-status-details-bin"
MAX_VIOLATIONS = 16
"""A client refuses a status whose trailers are longer than its limit, 8 KiB by default."""
MAX_TEXT = 240


class Reason(StrEnum):
    """google.rpc.ErrorInfo.reason; docs/serve.md says what a client should do about each."""

    TOKEN_MISSING = "TOKEN_MISSING"
    TOKEN_INVALID = "TOKEN_INVALID"
    SCOPE_MISSING = "SCOPE_MISSING"
    REQUEST_MALFORMED = "REQUEST_MALFORMED"
    FIELD_INVALID = "FIELD_INVALID"
    IMAGE_INVALID = "IMAGE_INVALID"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    SERVICE_NOT_FOUND = "SERVICE_NOT_FOUND"
    RATE_LIMITED = "RATE_LIMITED"
    CONCURRENCY_LIMITED = "CONCURRENCY_LIMITED"
    CAPACITY_EXHAUSTED = "CAPACITY_EXHAUSTED"
    WATCHES_LIMITED = "WATCHES_LIMITED"
    TIME_BUDGET_SPENT = "TIME_BUDGET_SPENT"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"
    NOT_READY = "NOT_READY"
    BACKEND_UNAVAILABLE = "BACKEND_UNAVAILABLE"
    INTERNAL_ERROR = "INTERNAL_ERROR"


CODES: Mapping[Reason, grpc.StatusCode] = {
    Reason.TOKEN_MISSING: grpc.StatusCode.UNAUTHENTICATED,
    Reason.TOKEN_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    Reason.SCOPE_MISSING: grpc.StatusCode.PERMISSION_DENIED,
    Reason.REQUEST_MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.FIELD_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.IMAGE_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.SERVICE_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.CONCURRENCY_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.CAPACITY_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.WATCHES_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TIME_BUDGET_SPENT: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.REQUEST_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.NOT_READY: grpc.StatusCode.UNAVAILABLE,
    Reason.BACKEND_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.INTERNAL_ERROR: grpc.StatusCode.INTERNAL,
}


@dataclass(frozen=True)
class Violation:
    """One field that is wrong: its path in the request, and what was expected."""

    field: str
    description: str


@dataclass
class RequestError(Exception):
    """A request that ends with a status. `message` is for people, `metadata` (values below 100 characters)
    for programs; `retry_after_s` becomes a RetryInfo."""

    reason: Reason
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: Sequence[Violation] = ()
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"

    @property
    def code(self) -> grpc.StatusCode:
        return CODES[self.reason]


def invalid(violations: Sequence[Violation], reason: Reason = Reason.FIELD_INVALID) -> RequestError:
    """INVALID_ARGUMENT that names the first wrong fields."""
    first = violations[0]
    more = len(violations) - 1
    message = f"{first.field}: {first.description}" + (f" (and {more} more)" if more else "")
    return RequestError(reason, message, {"violations": str(len(violations))}, violations[:MAX_VIOLATIONS])


def shortened(text: str, limit: int = MAX_TEXT) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def rich_status(error: RequestError, request_id: str) -> status_pb2.Status:
    """The google.rpc.Status of an error: ErrorInfo always, BadRequest and RetryInfo where they apply."""
    info = error_details_pb2.ErrorInfo(
        reason=error.reason.value, domain=DOMAIN, metadata={**error.metadata, "request_id": request_id}
    )
    details = [_packed(info)]
    if error.violations:
        shown = [
            error_details_pb2.BadRequest.FieldViolation(
                field=shortened(violation.field, 80), description=shortened(violation.description)
            )
            for violation in error.violations[:MAX_VIOLATIONS]
        ]
        details.append(_packed(error_details_pb2.BadRequest(field_violations=shown)))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(max(0, int(error.retry_after_s * 1e9)))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=error.code.value[0], message=shortened(error.message), details=details)


def _packed(message: object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)  # type: ignore[arg-type]
    return packed
