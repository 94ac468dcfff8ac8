"""Brings a database's tables to this version, with Alembic. It runs whenever a store is opened."""

from pathlib import Path

from sqlalchemy import Connection, inspect

from accord.errors import FeedbackError

HEAD = "0004"
_BASELINE = "0001"  # the tables of the versions that made them without migrations


def migrate(connection: Connection, shown: str) -> None:
    """Bring the tables to `HEAD` within the connection's transaction.

    Raises:
        FeedbackError: the database was made by a newer version; `shown` names it.
    """
    found = inspect(connection)
    tables = set(found.get_table_names())
    version = None
    if "alembic_version" in tables:
        version = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    if version == HEAD:
        return
    # Alembic is slow to import, and seldom needed.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).resolve().parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        if version is None and "judgements" in tables:
            command.stamp(config, _BASELINE)
        command.upgrade(config, HEAD)
    except CommandError as error:
        raise FeedbackError(
            f"the feedback store {shown} has the schema version {version!r}, which this version of Accord "
            f"does not know (it knows up to {HEAD!r}): install the version that made it, or a newer one "
            f"({error})"
        ) from None
