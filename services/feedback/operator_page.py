"""The operator's page: how campaigns stand, who rates how, what is stuck, and a maker of invite links."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response

from accord.errors import ConfigError
from services.feedback.access import OPERATOR_COOKIE, Form, OperatorSession, Parts, check_csrf, check_site
from services.feedback.backend import Backend
from services.feedback.signing import RequestError
from services.feedback.views import door, page, set_session

SCOPE = "feedback"
_PROMPTS_SHOWN = 30
_SESSION_HOURS = 12.0
_MAX_INVITE_HOURS = 24.0 * 366


def add_operator_page(app: FastAPI) -> None:
    """Adds /operator and what belongs to it."""

    @app.get("/operator/login")
    def login_page(request: Request) -> Response:
        return door(request, "login", "For operators", *_LOGIN_LINES)

    @app.post("/operator/login")
    def login(request: Request, backend: Parts, form: Form) -> Response:
        check_site(request)
        principal = backend.authenticate(form.get("token", "").strip())
        if principal is None or SCOPE not in principal.scopes:
            error = (
                "No token of this service. Is it complete, and not expired?"
                if principal is None
                else f"The token {principal.name} lacks the scope {SCOPE}."
            )
            return door(request, "login", "For operators", *_LOGIN_LINES, status=403, error=error)
        session = backend.signer.start_session("operator", principal.name, _SESSION_HOURS)
        response = RedirectResponse("/operator", 303)
        value = backend.signer.write_session("operator", session)
        set_session(response, request, OPERATOR_COOKIE, value, session)
        return response

    @app.post("/operator/logout")
    def logout(request: Request, form: Form, session: OperatorSession) -> Response:
        check_csrf(request, session, form.get("csrf_token", ""))
        response = RedirectResponse("/operator/login", 303)
        response.delete_cookie(OPERATOR_COOKIE, httponly=True, samesite="strict")
        return response

    @app.get("/operator")
    def overview(request: Request, backend: Parts, session: OperatorSession, campaign: str = "") -> Response:
        csrf = backend.signer.csrf_token(session)
        return page(request, "operator.html", **_standing(backend, campaign), csrf_token=csrf, link=None)

    @app.post("/operator/invite")
    async def invite(request: Request, backend: Parts, form: Form, session: OperatorSession) -> Response:
        check_csrf(request, session, form.get("csrf_token", ""))
        campaign_id = form.get("campaign", "")
        values = await asyncio.to_thread(_standing, backend, campaign_id)
        link = invite_link(backend, campaign_id, form.get("rater", ""), _hours(form.get("hours", "")))
        csrf = backend.signer.csrf_token(session)
        return page(request, "operator.html", **values, csrf_token=csrf, link=link)


def invite_link(backend: Backend, campaign_id: str, rater: str, hours: float | None = None) -> dict[str, Any]:
    """A new link: its `url`, `rater` and `hours`.

    Raises:
        NotFoundError: there is no such campaign.
        RequestError: a name that is none.
    """
    hours = backend.config.invite_hours if hours is None else hours
    campaign = backend.campaigns.get(campaign_id)
    try:
        token, invite = backend.signer.make_invite(campaign.campaign_id, rater, hours)
    except ConfigError as error:
        raise RequestError(str(error)) from None
    return {"url": f"{backend.config.site}/invite/{token}", "rater": invite.rater, "hours": hours}


_LOGIN_LINES = (
    f"Sign in with a token that has the scope {SCOPE}.",
    "On the machine that runs the service, accord token makes and lists them.",
)


def _hours(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours <= _MAX_INVITE_HOURS:
        raise RequestError(
            f"a link is good for a number of hours up to {_MAX_INVITE_HOURS:.0f}, not {text!r:.20}"
        )
    return hours


def _standing(backend: Backend, campaign_id: str) -> dict[str, Any]:
    """All that the page shows of the campaigns, and of one in detail."""
    campaigns = backend.campaigns.campaigns()
    chosen = campaign_id or (campaigns[-1].campaign_id if campaigns else "")
    if not chosen:
        return {
            "campaigns": (),
            "progress": None,
            "categories": (),
            "prompts": (),
            "raters": (),
            "agreement": {},
        }
    progress = backend.campaigns.progress(chosen)
    prompts = [row for row in _good_rates(progress.shares_by_prompt) if row[0] != "total"]
    return {
        "campaigns": campaigns,
        "progress": progress,
        "categories": _good_rates(progress.shares),
        "prompts": sorted(prompts, key=lambda row: (row[1], row[0]))[:_PROMPTS_SHOWN],
        "raters": backend.campaigns.raters(chosen),
        "agreement": progress.agreement,
    }


def _good_rates(shares: Any) -> list[tuple[str, float, float]]:
    """Name, share of good among good and bad, share of skips; the total first, and nothing undecided."""
    rows = []
    for name, share in sorted(shares.items(), key=lambda item: (item[0] != "total", item[0])):
        decided = share.get("good", 0.0) + share.get("bad", 0.0)
        if decided:
            rows.append((name, share.get("good", 0.0) / decided, share.get("skip", 0.0)))
    return rows
