"""How each error looks from outside, over HTTP and over gRPC. One that is not ours says nothing of itself."""

from __future__ import annotations

import dataclasses
import logging

import grpc

from accord.errors import AccordError, FeedbackError, ImageError, StorageError
from accord.feedback import AnsweredError, ExcludedError, LeaseError, NotFoundError
from accord.feedback.database import DatabaseError
from accord.image_store import ImageStoreError
from services.feedback.signing import ForbiddenError, LinkError, RequestError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Problem:
    """An error as clients see it. `reason` is for programs, `message` for people."""

    status: int
    code: grpc.StatusCode
    reason: str
    message: str


_KINDS: tuple[tuple[type[AccordError], int, grpc.StatusCode, str], ...] = (
    (LinkError, 401, grpc.StatusCode.UNAUTHENTICATED, "SESSION_INVALID"),
    (ForbiddenError, 403, grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN"),
    (ExcludedError, 403, grpc.StatusCode.PERMISSION_DENIED, "RATER_EXCLUDED"),
    (NotFoundError, 404, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (ImageError, 404, grpc.StatusCode.NOT_FOUND, "IMAGE_MISSING"),
    (LeaseError, 409, grpc.StatusCode.FAILED_PRECONDITION, "LEASE_LOST"),
    (AnsweredError, 409, grpc.StatusCode.ALREADY_EXISTS, "ANSWERED_BEFORE"),
    (RequestError, 400, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (FeedbackError, 400, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
)


def explain(error: Exception) -> Problem:
    """The problem that `error` is. What only the operator can mend goes to the log alone."""
    if isinstance(error, DatabaseError | StorageError):
        _log.error("%s", error)
        full = isinstance(error, StorageError)
        return Problem(
            503,
            grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.UNAVAILABLE,
            "STORAGE_FULL" if full else "STORE_UNAVAILABLE",
            "the store of judgements takes nothing just now; nothing was stored, try again in a while",
        )
    if isinstance(error, ImageStoreError):
        _log.error("%s", error)
        message = "the images cannot be reached just now; nothing was stored, try again in a while"
        return Problem(503, grpc.StatusCode.UNAVAILABLE, "IMAGES_UNAVAILABLE", message)
    for kind, status, code, reason in _KINDS:
        if isinstance(error, kind):
            message = "there is no such image" if kind is ImageError else str(error)
            return Problem(status, code, reason, message)
    _log.error("a request failed", exc_info=error)
    return Problem(
        500, grpc.StatusCode.INTERNAL, "INTERNAL", "something went wrong in the service; its log says what"
    )
