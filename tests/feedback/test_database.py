import logging
import traceback
from pathlib import Path

import psycopg
import pytest

from accord.errors import FeedbackError, StorageError
from accord.feedback import FeedbackStore
from tests.feedback.conftest import PASSWORD, PASSWORD_IN_URL, PostgresServer, make_candidate

SECRET = "hunter2"


def _everything_about(error: BaseException) -> str:
    """The error as it would be printed, and the errors behind it."""
    shown = "".join(traceback.format_exception(error)) + repr(error)
    behind: BaseException | None = error
    while behind is not None:
        shown += str(behind) + repr(behind)
        behind = behind.__cause__ or behind.__context__
    return shown


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://accord:{SECRET}@127.0.0.1:1/accord",  # nobody listens
        f"postgresql://accord:{SECRET}@127.0.0.1:port/accord",
        f"postgresql://accord:{SECRET}@[::1/accord",
        f"postgresql://accord:{SECRET}@/accord?host=/nowhere&connect_timeout=soon",
        f"postgresql://accord@127.0.0.1:1/accord?password={SECRET}",
        f"postgresql://accord@127.0.0.1:1/accord?sslmode=verify-full&sslpassword={SECRET}",
        f"postgresql+nothing://accord:{SECRET}@127.0.0.1/accord",
        f"nothing://accord:{SECRET}@127.0.0.1/accord",
        f"mssql+pyodbc://accord:{SECRET}@127.0.0.1/accord",  # a driver that is not installed
        f"accord:{SECRET}@127.0.0.1",
        f"//accord:{SECRET}",
        # An unescaped "@", ":" and "/" in the password: it spills into the host and the port.
        f"postgresql://accord:x@{SECRET}:y/{SECRET}@127.0.0.1:1/accord",
        f"postgresql://accord:a/{SECRET}@127.0.0.1:1/accord",
    ],
)
def test_no_password_in_errors(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(FeedbackError, match="feedback store") as caught:
        FeedbackStore(url)
    assert SECRET not in _everything_about(caught.value)
    assert SECRET not in caplog.text


def test_no_password_even_when_the_driver_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*arguments: object, **options: object) -> None:
        raise psycopg.OperationalError(f"cannot connect with {options['password']} ({PASSWORD_IN_URL})")

    monkeypatch.setattr(psycopg, "connect", connect)
    with pytest.raises(FeedbackError, match=r"cannot connect with \*\*\* \(\*\*\*\)") as caught:
        FeedbackStore(f"postgresql://accord:{PASSWORD_IN_URL}@127.0.0.1:1/accord")
    shown = "".join(traceback.format_exception(caught.value))
    assert PASSWORD not in shown
    assert PASSWORD_IN_URL not in shown


@pytest.mark.postgres
def test_no_password_in_reprs_nor_after_connecting(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    url = postgres.new_database()
    with caplog.at_level(logging.DEBUG), FeedbackStore(url) as store:
        store.add_candidates([make_candidate(1)])
        shown = repr(store) + str(store) + repr(store._database)
        with store._database.writing() as connection:
            connection.exec_driver_sql("DROP TABLE judgements")
        with pytest.raises(FeedbackError, match='"judgements" does not exist') as caught:
            store.judgements()
    assert "accord:***@" in shown
    everything = shown + _everything_about(caught.value) + caplog.text + "".join(capfd.readouterr())
    assert PASSWORD not in everything
    assert PASSWORD_IN_URL not in everything


@pytest.mark.postgres
def test_wrong_password(postgres: PostgresServer) -> None:
    with pytest.raises(FeedbackError, match="password authentication failed") as caught:
        FeedbackStore(postgres.url("postgres", password=SECRET))
    assert SECRET not in _everything_about(caught.value)


@pytest.mark.parametrize("url", ["", "feedback.db", "sqlite", "postgresql:", None, 7])
def test_url_that_is_none(url: str) -> None:
    with pytest.raises(FeedbackError, match="expected a URL such as sqlite:///"):
        FeedbackStore(url)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_store_in_memory_is_refused(url: str) -> None:
    with pytest.raises(FeedbackError, match="would forget every judgement; expected a file"):
        FeedbackStore(url)


def test_sqlite_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "feedback.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(FeedbackError, match=r"feedback\.db: file is not a database"):
        FeedbackStore(f"sqlite:///{path}")
    assert path.read_bytes() == b"not a database" * 100


def test_missing_folders_are_made_and_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    with FeedbackStore(f"sqlite:///{tmp_path}/a/b/feedback.db") as store:
        assert store.candidates() == []
    with pytest.raises(FeedbackError, match=r"cannot make the folder .*/feedback\.db/c"):
        FeedbackStore(f"sqlite:///{tmp_path}/a/b/feedback.db/c/feedback.db")


def test_full_disk(tmp_path: Path) -> None:
    with FeedbackStore(f"sqlite:///{tmp_path}/feedback.db") as store:
        store.add_candidates([make_candidate(1)])
        with store._database.reading() as connection:  # the pool hands this connection out again
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StorageError, match="database or disk is full"):
            store.add_candidates(make_candidate(number) for number in range(2, 2000))
        assert store.candidates() == [make_candidate(1)]
        with store._database.reading() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        assert store.add_candidates([make_candidate(2)]) == 1


def test_sqlite_is_set_up_to_be_durable(tmp_path: Path) -> None:
    with FeedbackStore(f"sqlite:///{tmp_path}/feedback.db") as store, store._database.reading() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}
