"""How pages are made: templates in which everything is escaped, and cookies out of reach of scripts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import jinja2
from fastapi import Request, Response
from fastapi.responses import HTMLResponse

from services.feedback.signing import Session

PAGES = Path(__file__).parent / "pages"


def templates() -> jinja2.Environment:
    """The pages' templates."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page. Everything that goes into it is escaped."""
    made: jinja2.Environment = request.app.state.templates
    return HTMLResponse(made.get_template(template).render(values), status)


def door(
    request: Request, kind: str, title: str, *lines: str, status: int = 200, **values: Any
) -> HTMLResponse:
    """A page with a few words: a welcome, or why one cannot come in."""
    values = {"token": "", "error": "", "csrf_token": "", **values}
    return page(request, "door.html", status, kind=kind, title=title, lines=lines, **values)


def set_session(
    response: Response,
    request: Request,
    cookie: str,
    value: str,
    session: Session,
    samesite: Literal["strict", "lax"] = "strict",
) -> None:
    """Keep a session in the browser, out of reach of scripts and of other sites.

    "lax" shows it to us when a link in a message is followed, too.
    """
    secure = (request.app.state.backend.config.public_url or "").startswith("https")
    left_s = int(session.expires_at - time.time())
    response.set_cookie(cookie, value, max_age=left_s, httponly=True, samesite=samesite, secure=secure)
