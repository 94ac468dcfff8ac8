"""Around every call: authentication, parsing, the request's id, the status with its details, metrics, and the
log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from accord.tokens import Principal, TokenFile
from services.config import Limits
from services.gateway import validation
from services.gateway.auth import authenticate
from services.gateway.errors import DETAILS_KEY, Reason, RequestError, rich_status
from services.metrics import GatewayMetrics

logger = logging.getLogger("ray.serve")

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
REQUEST_ID_KEY = "accord-request-id"


class Context(Protocol):
    """What we use of Serve's RayServegRPCContext."""

    def invocation_metadata(self) -> list[tuple[str, str]]: ...
    def set_code(self, code: Any) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, Any]]) -> None: ...


@dataclass
class Call:
    """A call that is let in."""

    method: str
    request_id: str
    principal: Principal | None


class Calls:
    """Turns a method's bytes into a checked message, and what it raises into a status.

    Serve drops the details of a status when a handler raises, and shows the client a stack trace. So a
    handler returns: an empty message, with the status in the context.
    """

    def __init__(self, tokens: TokenFile, metrics: GatewayMetrics) -> None:
        self._tokens, self._metrics = tokens, metrics
        self.limits = Limits()
        self._in_flight: dict[str, int] = {}

    async def unary(
        self,
        method: str,
        scope: str | None,
        types: tuple[type[Request], type[Response]],
        data: bytes,
        context: Context,
        handler: Callable[[Request, Call], Awaitable[Response]],
    ) -> Response:
        """The handler's response; without a scope no token is needed."""
        call, begun = Call(method, "", None), self._begin(method)
        try:
            request = self._open(call, scope, types[0], data, context)
            response = await handler(request, call)
            self._end(call, begun, "OK")
            return response
        except BaseException as error:
            self._fail(call, begun, context, error)
            return types[1]()

    async def stream(
        self,
        method: str,
        scope: str | None,
        types: tuple[type[Request], type[Response]],
        data: bytes,
        context: Context,
        handler: Callable[[Request, Call], AsyncGenerator[Response, None]],
    ) -> AsyncIterator[Response]:
        """The handler's responses. Serve sends a status's details only with a message, so that an empty one,
        without an event, comes before an error."""
        call, begun = Call(method, "", None), self._begin(method)
        try:
            request = self._open(call, scope, types[0], data, context)
            async with contextlib.aclosing(handler(request, call)) as responses:
                async for response in responses:
                    yield response
            self._end(call, begun, "OK")
            return
        except BaseException as error:
            self._fail(call, begun, context, error)
        yield types[1]()

    def _open(
        self, call: Call, scope: str | None, request_type: type[Request], data: bytes, context: Context
    ) -> Request:
        call.request_id = validation.request_id("")
        if scope is not None:
            call.principal = authenticate(self._tokens, context.invocation_metadata(), scope)
        request = validation.parse(request_type, data, self.limits)
        call.request_id = validation.request_id(getattr(request, "request_id", "")) or call.request_id
        return request

    def _begin(self, method: str) -> float:
        self._in_flight[method] = self._in_flight.get(method, 0) + 1
        self._metrics.in_flight.set(self._in_flight[method], tags={"method": method})
        return time.monotonic()

    def _end(self, call: Call, begun: float, status: str) -> None:
        self._in_flight[call.method] -= 1
        self._metrics.in_flight.set(self._in_flight[call.method], tags={"method": call.method})
        self._metrics.requests.inc(tags={"method": call.method, "status": status})
        self._metrics.latency.observe(time.monotonic() - begun, tags={"method": call.method})

    def _fail(self, call: Call, begun: float, context: Context, error: BaseException) -> None:
        """Puts the status into the context; a cancelled call, and what ends a process, is raised again."""
        if isinstance(error, RequestError):
            shown = error
        elif isinstance(error, Exception):
            logger.exception("request %s of %s failed", call.request_id, call.method)
            shown = RequestError(
                Reason.INTERNAL_ERROR, f"this is a fault of the server; tell its operator {call.request_id}"
            )
        else:
            self._end(call, begun, "CANCELLED")
            if isinstance(error, asyncio.CancelledError):
                self._metrics.cancelled.inc(tags={"method": call.method})
                logger.info("request %s of %s was given up by the client", call.request_id, call.method)
            raise error
        self._end(call, begun, shown.code.name)
        self._metrics.errors.inc(tags={"method": call.method, "reason": shown.reason.value})
        if shown.reason in (Reason.TIME_BUDGET_SPENT, Reason.REQUEST_TIMEOUT):
            self._metrics.expired.inc(tags={"method": call.method})
        who = call.principal.name if call.principal else "-"
        logger.info("request %s of %s by %s: %s", call.request_id, call.method, who, shown.reason.value)
        status = rich_status(shown, call.request_id)
        context.set_code(shown.code)
        context.set_details(status.message)
        context.set_trailing_metadata(
            [(DETAILS_KEY, status.SerializeToString()), (REQUEST_ID_KEY, call.request_id)]
        )
