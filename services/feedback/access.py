"""Who is behind a request to the page, and what every answer of ours says to the browser."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.feedback.backend import Backend
from services.feedback.signing import ForbiddenError, LinkError, RequestError, Session

RATER_COOKIE = "accord_rater"
OPERATOR_COOKIE = "accord_operator"
DOOR_COOKIE = "accord_door"  # of a browser that looks at a link; it lets nobody in

_MAX_BODY_BYTES = 64 * 1024

_HEADERS = {
    # Nothing from elsewhere, nothing inline: what a prompt holds cannot run.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",  # the address of an invite is a secret
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def backend_of(request: Request) -> Backend:
    """The service's parts."""
    backend: Backend = request.app.state.backend
    return backend


def session_of(request: Request, kind: str, cookie: str) -> Session:
    """The session of the request's cookie.

    Raises:
        LinkError: there is none, it has ended, or it was tampered with.
    """
    value = request.cookies.get(cookie)
    if not value:
        raise LinkError("This page needs an invitation. Please open the link that you were sent.")
    return backend_of(request).signer.read_session(kind, value)


def rater_session(request: Request) -> Session:
    """The rater's session, to read with."""
    return session_of(request, "rater", RATER_COOKIE)


def operator_session(request: Request) -> Session:
    """The operator's session, to read with."""
    return session_of(request, "operator", OPERATOR_COOKIE)


def session_or_none(request: Request, kind: str, cookie: str) -> Session | None:
    """As `session_of`; None in place of an error."""
    try:
        return session_of(request, kind, cookie)
    except LinkError:
        return None


def any_session(request: Request) -> Session:
    """A rater's or an operator's."""
    try:
        return rater_session(request)
    except LinkError:
        return operator_session(request)


def changing_rater(request: Request) -> Session:
    """The rater's session, for a request of the page's script that changes something.

    Raises:
        LinkError, ForbiddenError: no session, or a request that our own page did not make.
    """
    session = rater_session(request)
    check_csrf(request, session, request.headers.get("x-csrf-token", ""))
    return session


def check_csrf(request: Request, session: Session, token: str) -> None:
    """Raises ForbiddenError unless our own page made the request."""
    check_site(request)
    if not backend_of(request).signer.is_csrf_token(session, token):
        raise ForbiddenError("This request did not come from this session's page. Reload the page.")


def check_site(request: Request) -> None:
    """Raises ForbiddenError when the browser says that another site made the request."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ForbiddenError("This request came from another site, so nothing was done.")


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a submitted form.

    Raises:
        RequestError: it is no form in UTF-8.
    """
    from urllib.parse import parse_qsl

    try:
        fields = parse_qsl((await request.body()).decode("ascii"), keep_blank_values=True, max_num_fields=20)
    except ValueError:
        raise RequestError("this is no form that we know") from None
    return dict(fields)


RaterSession = Annotated[Session, Depends(rater_session)]
ChangingRater = Annotated[Session, Depends(changing_rater)]
OperatorSession = Annotated[Session, Depends(operator_session)]
AnySession = Annotated[Session, Depends(any_session)]
Parts = Annotated[Backend, Depends(backend_of)]
Form = Annotated[dict[str, str], Depends(form_of)]


class Guard:
    """ASGI middleware: bounds what a request may send, and adds the headers that protect the browser."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = 0

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > _MAX_BODY_BYTES:
                raise RequestError(f"the request is too large; at most {_MAX_BODY_BYTES} bytes are read")
            return message

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers: list[Any] = message.setdefault("headers", [])
                headers += [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                if not any(name == b"cache-control" for name, _ in headers):
                    headers.append((b"cache-control", b"no-store"))
            await send(message)

        await self._app(scope, bounded_receive, guarded_send)
