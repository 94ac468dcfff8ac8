"""The rating page: a link opens a session, the page asks for tasks and sends answers back."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import Annotated, Any, Literal

import grpc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import Field, model_validator
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from accord.config import Config
from accord.errors import AccordError
from accord.feedback import NotFoundError, Task
from services.feedback.access import (
    DOOR_COOKIE,
    RATER_COOKIE,
    AnySession,
    ChangingRater,
    Form,
    Guard,
    Parts,
    RaterSession,
    check_csrf,
    check_site,
    session_or_none,
)
from services.feedback.backend import Backend
from services.feedback.operator_page import add_operator_page
from services.feedback.problems import Problem, explain
from services.feedback.signing import ForbiddenError, RequestError, Session
from services.feedback.views import PAGES, door, page, set_session, templates

_STATIC = {
    "base.css": "text/css",
    "rate.css": "text/css",
    "rate.js": "text/javascript",
    "outbox.js": "text/javascript",
    "words.js": "text/javascript",
    "operator.css": "text/css",
    "operator.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}

Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{8,64}$")]


class NextRequest(Config):
    """Which tasks the page has already."""

    held: Annotated[tuple[str, ...], Field(max_length=8)] = ()


class AnswerRequest(Config):
    """An answer: a verdict an image, or a preference."""

    idempotency_key: Key
    verdicts: Annotated[tuple[Literal["good", "bad", "skip"], ...], Field(max_length=16)] | None = None
    preference: Literal["left", "right", "tie"] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> AnswerRequest:
        if (self.verdicts is None) == (self.preference is None):
            raise ValueError("expected either verdicts or a preference")
        return self


class UndoRequest(Config):
    """Takes back the last answer."""

    idempotency_key: Key


def create_app(backend: Backend) -> ASGIApp:
    """The web application over a running service's parts."""
    app = FastAPI(title="Accord feedback", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.backend = backend
    app.state.templates = templates()
    _add_pages(app)
    _add_session(app)
    _add_api(app)
    add_operator_page(app)
    for kind in (Exception, AccordError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _show_error)
    return Guard(app)


def _add_pages(app: FastAPI) -> None:
    @app.get("/")
    def root() -> Response:
        return RedirectResponse("/rate", 307)

    @app.get("/health")
    def health(backend: Parts) -> Response:
        backend.campaigns.excluded()  # raises when the database is away
        return JSONResponse({"status": "ok"})

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in _STATIC:
            raise HTTPException(404)
        content = (PAGES / name).read_bytes()
        headers = {"cache-control": "no-cache"}
        return Response(content, media_type=_STATIC[name], headers=headers)

    @app.get("/images/{digest}")
    def image(digest: str, backend: Parts, session: AnySession) -> Response:
        headers = {"cache-control": "private, max-age=604800, immutable"}
        return Response(backend.images.get(digest), media_type="image/png", headers=headers)

    @app.get("/rate")
    def rate(request: Request, backend: Parts, session: RaterSession) -> Response:
        campaign = backend.campaigns.get(session.campaign_id)
        return page(
            request,
            "rate.html",
            csrf_token=backend.signer.csrf_token(session),
            title=campaign.title,
            kind=campaign.kind,
            campaign_id=campaign.campaign_id,
            rater=session.rater,
        )


def _add_session(app: FastAPI) -> None:
    @app.get("/invite/{token}")
    def invited(request: Request, token: str, backend: Parts) -> Response:
        # Only the button opens the link: programs that preview links in messages do not use it up.
        invite = backend.signer.read_invite(token)
        campaign = backend.campaigns.get(invite.campaign_id)
        lines = (
            f"You are invited to judge pictures, as {invite.rater}.",
            "It works with the keyboard alone, or with a thumb. You can stop at any time, and go on later in "
            "this browser.",
        )
        response = door(request, "invite", campaign.title, *lines, token=token)
        session = backend.stand_at_door(invite, session_or_none(request, "door", DOOR_COOKIE))
        ticket = backend.signer.write_session("door", session)
        set_session(response, request, DOOR_COOKIE, ticket, session, samesite="lax")
        return response

    @app.post("/invite")
    def enter(request: Request, backend: Parts, form: Form) -> Response:
        check_site(request)
        current = session_or_none(request, "rater", RATER_COOKIE)
        try:
            session = backend.open_invite(
                form.get("token", ""), current, session_or_none(request, "door", DOOR_COOKIE)
            )
        except ForbiddenError as error:
            assert current is not None
            csrf = backend.signer.csrf_token(current)
            return door(request, "leave", "Somebody else's link", str(error), status=403, csrf_token=csrf)
        response = RedirectResponse("/rate", 303)
        set_session(response, request, RATER_COOKIE, backend.signer.write_session("rater", session), session)
        response.delete_cookie(DOOR_COOKIE, httponly=True, samesite="lax")
        return response

    @app.post("/leave")
    def leave(request: Request, form: Form, session: RaterSession) -> Response:
        check_csrf(request, session, form.get("csrf_token", ""))
        response = door(request, "notice", "You have left", "To go on, ask for a new link.")
        response.delete_cookie(RATER_COOKIE, httponly=True, samesite="strict")
        return response


def _add_api(app: FastAPI) -> None:
    @app.post("/api/next")
    def next_task(body: NextRequest, backend: Parts, session: ChangingRater) -> dict[str, Any]:
        besides = body.held[0] if body.held else None
        task = backend.lease(session.campaign_id, session.rater, besides=besides)
        return {"task": _task(task), "progress": _progress(backend, session)}

    @app.post("/api/tasks/{task_id}/answer")
    def answer(task_id: str, body: AnswerRequest, backend: Parts, session: ChangingRater) -> dict[str, Any]:
        if task_id.rpartition(".")[0] != session.campaign_id:
            raise NotFoundError("this campaign has no such task")
        given = body.preference if body.preference is not None else list(body.verdicts or ())
        counted = backend.submit(task_id, session.rater, given, body.idempotency_key)
        return {"counted": counted, "progress": _progress(backend, session)}

    @app.post("/api/undo")
    def undo(body: UndoRequest, backend: Parts, session: ChangingRater) -> dict[str, Any]:
        task_id = backend.undo(session.campaign_id, session.rater, body.idempotency_key)
        task = backend.held_task(session.campaign_id, session.rater, task_id) if task_id else None
        return {"task_id": task_id, "task": _task(task), "progress": _progress(backend, session)}


def _progress(backend: Backend, session: Session) -> dict[str, int]:
    return asdict(backend.progress(session.campaign_id, session.rater))


def _task(task: Task | None) -> dict[str, Any] | None:
    if task is None:
        return None
    left = task.expires_at - datetime.datetime.now(datetime.UTC)
    return {
        "task_id": task.task_id,
        "prompt": task.prompt,
        "images": task.images,
        "right_images": task.right_images,
        "question": task.question,
        "expires_in_s": max(0.0, left.total_seconds()),  # our clock and the browser's may differ
    }


def _problem(error: Exception) -> Problem:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        text = f"the request is not what was expected: {where}: {first['msg']}"
        return explain(RequestError(text))
    if isinstance(error, HTTPException):
        text = "there is no such page" if error.status_code == 404 else str(error.detail)
        return Problem(error.status_code, grpc.StatusCode.UNKNOWN, "NO_SUCH_PAGE", text)
    return explain(error)


def _show_error(request: Request, error: Exception) -> Response:
    """Scripts get JSON, people a page."""
    problem = _problem(error)
    request.app.state.backend.metrics.refusals.labels(problem.reason).inc()
    if request.url.path.startswith("/api/"):
        return JSONResponse({"reason": problem.reason, "message": problem.message}, problem.status)
    if request.url.path.startswith("/operator") and problem.status == 401:
        return RedirectResponse("/operator/login", 303)
    titles = {401: "You cannot come in", 403: "Not like this", 404: "Nothing is here"}
    title = titles.get(problem.status, "That did not work")
    return door(request, "notice", title, problem.message, status=problem.status)
