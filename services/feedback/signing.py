"""Who may rate: signed links, signed sessions, and the secret that signs them.

A link names a campaign and a rater, expires, and opens one session: whoever opens it second gets nothing. All
that the browser holds is signed, and who rates is read from there alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import time
from pathlib import Path

import itsdangerous
from itsdangerous import URLSafeSerializer

from accord.config import Config
from accord.errors import AccordError, ConfigError

SECRET_NAME = "secret"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MIN_SECRET_BYTES = 32


class LinkError(AccordError):
    """A link or a session that lets nobody in. The message is for the person who opened it."""


class ForbiddenError(AccordError):
    """A request that this session or token may not make."""


class RequestError(AccordError):
    """A request that does not say what it must say."""


class Invite(Config):
    """What a link says. `expires_at` is in seconds since 1970."""

    campaign_id: str
    rater: str
    nonce: str
    expires_at: float


class Session(Config):
    """What a rater's or, with no campaign, an operator's cookie says."""

    session_id: str
    campaign_id: str = ""
    rater: str
    expires_at: float


class Signer:
    """Makes and reads what the service signs."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def make_invite(self, campaign_id: str, rater: str, hours: float) -> tuple[str, Invite]:
        """A link's token, and what it says.

        Raises:
            ConfigError: a name that is none.
        """
        for what, name in (("campaign", campaign_id), ("rater", rater)):
            if not NAME.fullmatch(name):
                raise ConfigError(
                    f"{name!r} is no name of a {what}; expected 1 to 64 letters, digits, - and _"
                )
        invite = Invite(
            campaign_id=campaign_id,
            rater=rater,
            nonce=secrets.token_urlsafe(16),
            expires_at=time.time() + hours * 3600,
        )
        return self._serializer("invite").dumps(invite.model_dump()), invite

    def read_invite(self, token: str) -> Invite:
        """Raises LinkError: not ours, changed, or expired."""
        invite = Invite.model_validate(self._read("invite", token, "This link is not valid"))
        if invite.expires_at <= time.time():
            raise LinkError("This link has expired. Please ask for a new one.")
        return invite

    def start_session(self, kind: str, rater: str, hours: float, campaign_id: str = "") -> Session:
        """A new session of a `kind`: "rater" or "operator"."""
        return Session(
            session_id=secrets.token_urlsafe(16),
            campaign_id=campaign_id,
            rater=rater,
            expires_at=time.time() + hours * 3600,
        )

    def write_session(self, kind: str, session: Session) -> str:
        """The cookie of a session."""
        return self._serializer(f"session {kind}").dumps(session.model_dump())

    def read_session(self, kind: str, cookie: str) -> Session:
        """Raises LinkError: not ours, changed, of another kind, or expired."""
        session = Session.model_validate(self._read(f"session {kind}", cookie, "This session is not valid"))
        if session.expires_at <= time.time():
            raise LinkError("Your session has ended. Please ask for a new link.")
        return session

    def csrf_token(self, session: Session) -> str:
        """What a page must send back with every change; another site cannot read it."""
        return hmac.new(self._secret.encode(), f"csrf {session.session_id}".encode(), "sha256").hexdigest()

    def is_csrf_token(self, session: Session, token: str) -> bool:
        """Whether `token` is that session's."""
        return hmac.compare_digest(self.csrf_token(session).encode(), token.encode())

    def write_page(self, what: str, of: str, start: int) -> str:
        """The token of a list's next page: of `what`, within `of`, from `start`."""
        return self._serializer(f"page {what}").dumps([of, start])

    def read_page(self, what: str, of: str, token: str) -> int:
        """Where that page starts.

        Raises:
            RequestError: it is no token of this list.
        """
        with contextlib.suppress(itsdangerous.BadData):
            found, start = self._serializer(f"page {what}").loads(token)
            if found == of:
                return int(start)
        raise RequestError("page_token is of another list; expected the next_page_token of the page before")

    def _serializer(self, purpose: str) -> URLSafeSerializer:
        options = {"key_derivation": "hmac", "digest_method": hashlib.sha256}
        return URLSafeSerializer(self._secret, salt=f"accord.feedback {purpose}", signer_kwargs=options)

    def _read(self, purpose: str, token: str, problem: str) -> object:
        try:
            return self._serializer(purpose).loads(token)
        except itsdangerous.BadData:
            raise LinkError(f"{problem}. Please ask for a new link.") from None


def load_secret(state_dir: Path) -> str:
    """The secret in `state_dir`, made on the first call; only its owner may read it.

    Raises:
        ConfigError: the folder cannot be written, or the file is too short to be a secret or open to others.
    """
    path = state_dir / SECRET_NAME
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _make_secret(path)
        secret = path.read_text(encoding="ascii").strip()
        mode = path.stat().st_mode & 0o777
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot keep the secret that signs links in {path}: {getattr(error, 'strerror', 'not text')}. "
            "Name a folder that this user may write in: state_dir"
        ) from None
    if len(secret) < _MIN_SECRET_BYTES:
        raise ConfigError(f"{path} is too short to be a secret; remove it, and a new one is made (links end)")
    if mode & 0o007:
        raise ConfigError(f"{path} can be read by every user of this machine; give it the mode 0600")
    return secret


def _make_secret(path: Path) -> None:
    """Whole or not at all, and the first of several starts at once wins."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(48))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()
