"""Databases to test on: a SQLite file, and a PostgreSQL server of our own."""

import dataclasses
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from accord.feedback import Candidate, FeedbackStore, Judgement
from tests.lanes import missing

PASSWORD = "s3cret:p@ss/w%rd"
PASSWORD_IN_URL = "s3cret%3Ap%40ss%2Fw%25rd"


@dataclasses.dataclass(frozen=True)
class PostgresServer:
    """A server that listens on a Unix socket only."""

    directory: Path
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def url(self, database: str, *, password: str = PASSWORD_IN_URL) -> str:
        return f"postgresql://accord:{password}@/{database}?host={self.directory}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{next(self.numbers)}"
        with psycopg.connect(
            host=str(self.directory), user="accord", password=PASSWORD, dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return self.url(name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that asks for a password."""
    binaries = _binaries()
    # Not pytest's directory: that one is closed to other users, and its path may be too long for a socket.
    directory = Path(tempfile.mkdtemp(prefix="accord-pg-"))
    user = _unprivileged_user()
    try:
        if user is not None:
            shutil.chown(directory, user)
        password_file = directory / "password"
        password_file.write_text(PASSWORD)
        password_file.chmod(0o644)

        def run(*command: str) -> None:
            # Into a file: the server inherits the output, and would hold a pipe open.
            with open(directory.with_suffix(".log"), "ab") as log:
                done = subprocess.run(command, cwd=directory, user=user, stdout=log, stderr=log, timeout=600)
            assert done.returncode == 0, directory.with_suffix(".log").read_text()

        data = str(directory / "data")
        login = ("--username=accord", "--auth=scram-sha-256", f"--pwfile={password_file}")
        run(f"{binaries}/initdb", f"--pgdata={data}", *login, "--encoding=UTF8", "--locale=C", "--no-sync")
        options = f"-k {directory} -c listen_addresses='' -c fsync=off"
        wait = ("--wait", "--timeout=300")
        run(f"{binaries}/pg_ctl", "start", *wait, f"--pgdata={data}", f"--options={options}")
        try:
            yield PostgresServer(directory)
        finally:
            run(f"{binaries}/pg_ctl", "stop", "--wait", "--timeout=300", f"--pgdata={data}", "--mode=fast")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        directory.with_suffix(".log").unlink(missing_ok=True)


def _binaries() -> Path:
    """The folder of PostgreSQL's programs; the newest version's."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    versions = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3].split(".")[0])
    )
    if not versions:
        missing("PostgreSQL is not installed (no initdb on the PATH or in /usr/lib/postgresql)")
    return versions[-1].parent


def _unprivileged_user() -> str | None:
    """Whom to run the server as: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    missing("PostgreSQL does not run as root, and there is no user postgres or nobody")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database: each test runs on SQLite and on PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/feedback.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def store(url: str) -> Iterator[FeedbackStore]:
    with FeedbackStore(url) as store:
        yield store


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[FeedbackStore]:
    """For what does not depend on the database."""
    with FeedbackStore(f"sqlite:///{tmp_path}/feedback.db") as store:
        yield store


@pytest.fixture
def candidate() -> Callable[..., Candidate]:
    """Makes the candidate of a number."""
    return make_candidate


@pytest.fixture
def judgement() -> Callable[..., Judgement]:
    """Makes a judgement of the candidate of a number."""
    return make_judgement


def make_candidate(number: int = 0, prompt: str = "red star", category: str = "colour") -> Candidate:
    return Candidate(f"{number:064x}", prompt, category, "seen", seed=number, width=64, height=64)


def make_judgement(
    number: int = 0, verdict: str = "good", rater: str = "ann", prompt: str = "red star", key: str = ""
) -> Judgement:
    key = key or f"{number}/{prompt}/{rater}"
    return Judgement(key, f"{number:064x}", prompt, rater, verdict)
