"""Opening a database by URL, with errors that teach and never show a password."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from accord.artifacts import storage_errors
from accord.errors import FeedbackError
from accord.feedback.migrations import migrate

_BUSY_TIMEOUT_S = 30
_CONNECT_TIMEOUT_S = 10
_ATTEMPTS = 100
# Kept open, and opened besides when many threads ask at once; PostgreSQL allows 100 in all by default.
_CONNECTIONS = 10
_MORE_CONNECTIONS = 30
_WRITES = "accord_writes"
# Any number will do, as long as everyone who makes the tables takes the same.
_SCHEMA_LOCK = 0x6163636F7264
_EXAMPLES = (
    "sqlite:////absolute/path/feedback.db, sqlite:///relative/path/feedback.db or "
    "postgresql://user:password@host:5432/database (a special character in the password is written as %XX)"
)

T = TypeVar("T")


class Database:
    """A database whose tables are those of this version. `str(database)` shows no password."""

    def __init__(self, url: str) -> None:
        """Connect, and bring the tables to this version.

        Raises:
            FeedbackError: the URL cannot be read, its driver is missing, or the database does not answer.
        """
        self._url = _parse(url)
        self._secrets = _secrets(self._url)
        self._shown = _without_secrets(self._url)
        self._engine = self._make_engine()
        try:
            self._prepare()
        except BaseException:
            self._engine.dispose()
            raise

    def __str__(self) -> str:
        return self._shown

    def __repr__(self) -> str:
        return f"Database({self._shown!r})"

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self._errors(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes: all of it, durably, or nothing when the block fails.

        Raises:
            sqlalchemy.exc.IntegrityError: as it is; another writer may have been faster with the same rows.
        """
        with self._errors(), self._engine.connect() as connection:
            connection = connection.execution_options(**{_WRITES: True})
            with connection.begin():
                yield connection

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction; again when another writer was faster with the same rows."""
        for attempt in range(_ATTEMPTS):
            try:
                with self.writing() as connection:
                    return work(connection)
            except IntegrityError:
                time.sleep(0.001 * min(attempt, 50))
        raise FeedbackError(
            f"the feedback store {self}: the same rows were written elsewhere {_ATTEMPTS} times in "
            "a row, or the tables are not those of this version; nothing was stored, try again"
        )

    def _make_engine(self) -> Engine:
        options: dict[str, Any] = {}
        if self._url.get_backend_name() == "sqlite":
            options = {"timeout": _BUSY_TIMEOUT_S}
        elif self._url.drivername == "postgresql+psycopg" and "connect_timeout" not in self._url.query:
            options = {"connect_timeout": _CONNECT_TIMEOUT_S}
        problem = ""
        try:
            engine = sqlalchemy.create_engine(
                self._url,
                connect_args=options,
                pool_pre_ping=True,
                pool_size=_CONNECTIONS,
                max_overflow=_MORE_CONNECTIONS,
                hide_parameters=True,
            )
        except NoSuchModuleError:
            problem = (
                f"no such kind of database: {self._url.drivername!r}; expected a URL such as {_EXAMPLES}"
            )
        except ImportError as error:
            problem = f"the driver of {self._url.drivername!r} is not installed ({error.name})"
        except (SQLAlchemyError, ValueError, TypeError):
            problem = f"the database URL cannot be used; expected a URL such as {_EXAMPLES}"
        if problem:  # outside the except blocks: not even the context of this error knows the URL
            raise FeedbackError(f"cannot open the feedback store {self._shown}: {problem}")
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _set_up_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _prepare(self) -> None:
        if self._url.get_backend_name() == "sqlite" and not str(self._url.database).startswith("file:"):
            with storage_errors(self._shown):
                _make_parent(Path(str(self._url.database)))
        with self.writing() as connection:
            if connection.dialect.name == "postgresql":
                lock = sqlalchemy.func.pg_advisory_xact_lock(_SCHEMA_LOCK)
                connection.execute(sqlalchemy.select(lock))
            migrate(connection, self._shown)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with storage_errors(self._shown):
            try:
                yield
            except IntegrityError:
                raise
            except DBAPIError as error:
                raise self._error(str(error.orig) or type(error.orig).__name__) from None
            except SQLAlchemyError as error:
                raise self._error(str(error)) from None

    def _error(self, problem: str) -> FeedbackError:
        for secret in self._secrets:
            problem = problem.replace(secret, "***")
        return FeedbackError(f"the feedback store {self._shown}: {' '.join(problem.split())}")


def _parse(text: str) -> URL:
    url: URL | None = None
    with contextlib.suppress(SQLAlchemyError, ValueError, TypeError, AttributeError):
        url = sqlalchemy.make_url(text)
    if url is None:
        raise FeedbackError(
            "the URL of the feedback store cannot be read (it is not shown, as it may hold a password); "
            f"expected a URL such as {_EXAMPLES}"
        )
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "sqlite" and (not url.database or ":memory:" in url.database):
        raise FeedbackError(
            "a feedback store in memory would forget every judgement; expected a file: "
            "sqlite:////absolute/path/feedback.db"
        )
    return url


def _secrets(url: URL) -> list[str]:
    """The texts that must never be shown, as they are and as they are spelled in a URL; longest first."""
    found = {url.password or ""}
    if url.password:
        spelled = url.set(username="u", host="h", query={}).render_as_string(hide_password=False)
        found.add(spelled.partition("://u:")[2].rpartition("@")[0])
    for key, value in url.query.items():
        if "pass" in key.lower():
            found.update([value] if isinstance(value, str) else value)
    return sorted(found - {""}, key=len, reverse=True)


def _without_secrets(url: URL) -> str:
    # Parameters may hold a password too: only the socket's directory is of use to a reader.
    host = url.query.get("host")
    shown = url.set(query={"host": host} if host else {})
    return shown.render_as_string(hide_password=True).replace("%2F", "/")


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise FeedbackError(
            f"cannot make the folder {path.parent} for the feedback store: {error.strerror}"
        ) from None


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    # Python's driver would begin transactions by itself, and later than we need: see _begin_sqlite.
    connection.isolation_level = None
    cursor = connection.cursor()
    # Two processes that open a new file at once: the switch to WAL does not wait for a lock by itself.
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            break
        except Exception as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    cursor.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and then writes is refused, without waiting, when another wrote between.
    # So one that will write takes the lock at its beginning, and waits for it.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
