"""Which invite links were opened: each opens one session, wherever the service runs and however often."""

import datetime
import hashlib

from sqlalchemy import Connection, insert, select

from accord.feedback.campaign_tables import used_invites
from accord.feedback.database import Database


class UsedInvites:
    """The links that were opened, in the feedback store's database. Only digests are kept."""

    def __init__(self, url: str) -> None:
        """Open the database, as `FeedbackStore` does.

        Raises:
            FeedbackError: the URL cannot be read, or the database does not answer.
        """
        self._database = Database(url)

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def claim(self, nonce: str, session_id: str) -> bool:
        """Whether the link with this nonce belongs to this session: to the first that claims it, for ever."""
        invite, session = _digest(nonce), _digest(session_id)

        def work(connection: Connection) -> bool:
            query = select(used_invites.c.session).where(used_invites.c.invite == invite)
            owner = connection.execute(query).scalar()
            if owner is None:
                now = datetime.datetime.now(datetime.UTC)
                connection.execute(
                    insert(used_invites).values(invite=invite, session=session, created_at=now)
                )
            return owner in (None, session)

        return self._database.write(work)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
