"""Who asks: the bearer token in the request's metadata."""

from __future__ import annotations

from collections.abc import Iterable

from accord.tokens import Principal, TokenFile
from services.gateway.errors import Reason, RequestError

_SCHEME = "bearer "


def authenticate(tokens: TokenFile, metadata: Iterable[tuple[str, str | bytes]], scope: str) -> Principal:
    """Raises RequestError: no token, one that is not known (any longer), or one without the scope."""
    given = next((str(value) for key, value in metadata if key.lower() == "authorization"), None)
    if given is None:
        raise RequestError(
            Reason.TOKEN_MISSING, "no token: send the metadata `authorization: Bearer TOKEN` with the call"
        )
    if not given.lower().startswith(_SCHEME):
        raise RequestError(
            Reason.TOKEN_INVALID, "the metadata `authorization` is not of the form `Bearer TOKEN`"
        )
    principal = tokens.authenticate(given[len(_SCHEME) :].strip())
    if principal is None:
        raise RequestError(Reason.TOKEN_INVALID, "the token is not known, or has expired or been revoked")
    if scope not in principal.scopes:
        raise RequestError(
            Reason.SCOPE_MISSING,
            f"the token {principal.name!r} lacks the scope {scope!r}; ask the operator for one that has it",
            {"scope": scope},
        )
    return principal
