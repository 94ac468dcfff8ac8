"""Bearer tokens: who is let in, what the files say and who can read them."""

import datetime
import json
import logging
import multiprocessing
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from accord import tokens
from accord.cli import app
from accord.errors import TokenError
from accord.tokens import Principal, TokenFile


@pytest.fixture(params=["tokens.yaml", "tokens.json"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_opens_what_its_scopes_say_and_no_other_does(path: Path) -> None:
    token = tokens.add(path, "web", ["generate", "score"])
    other = tokens.add(path, "raters", ["rate"])
    file = TokenFile.load(path)
    assert file.authenticate(token) == Principal("web", frozenset({"generate", "score"}))
    assert file.authenticate(other) == Principal("raters", frozenset({"rate"}))
    for wrong in ("", token[:-1], token + "x", token.upper(), "x" * 10_000, "\ud800", file.records[0].sha256):
        assert file.authenticate(wrong) is None


def test_the_file_is_its_owner_s_alone_and_never_holds_a_token(path: Path) -> None:
    umask = os.umask(0)  # the widest
    try:
        token = tokens.add(path, "web", ["generate"])
    finally:
        os.umask(umask)
    assert mode(path) == 0o600
    assert token not in path.read_text()
    assert len(token.removeprefix("accord_")) == 43  # 256 bits
    if path.suffix == ".json":
        assert json.loads(path.read_text())["tokens"][0]["scopes"] == ["generate"]


def test_a_running_service_sees_changes(path: Path) -> None:
    first = tokens.add(path, "first", ["generate"])
    file = TokenFile.load(path)
    second = tokens.add(path, "second", ["score"])
    assert file.authenticate(second) == Principal("second", frozenset({"score"}))
    tokens.remove(path, "first")
    assert file.authenticate(first) is None
    assert file.authenticate(second) is not None
    path.unlink()
    assert file.authenticate(second) is None


def test_an_editing_accident_locks_nobody_out(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = tokens.add(path, "web", ["generate"])
    file = TokenFile.load(path)
    whole = path.read_text()
    path.write_text("tokens: [{name: ")
    with caplog.at_level(logging.WARNING):
        assert file.authenticate(token) is not None
    assert "stay as they were" in caplog.text
    path.write_text(whole)
    assert file.authenticate(token) is not None


def test_the_file_is_not_read_again_while_it_stays_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tokens.add(path, "web", ["generate"])
    file = TokenFile.load(path)
    monkeypatch.setattr(tokens, "_read", lambda path: pytest.fail("the file was read again"))
    assert file.authenticate(token) is not None


def test_a_secret_that_is_a_link_is_followed(tmp_path: Path) -> None:
    """Kubernetes mounts a Secret as links into a folder, and changes it by turning one of them."""
    old = tokens.add(tmp_path / "1" / "tokens.yaml", "web", ["generate"])
    new = tokens.add(tmp_path / "2" / "tokens.yaml", "web", ["generate"])
    link = tmp_path / "tokens.yaml"
    link.symlink_to("1/tokens.yaml")
    file = TokenFile.load(link)
    assert file.authenticate(old)
    (tmp_path / "next").symlink_to("2/tokens.yaml")
    (tmp_path / "next").rename(link)
    assert file.authenticate(new)
    assert file.authenticate(old) is None


def test_an_expired_token_is_refused(path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    past = tokens.add(path, "past", ["generate"], expires=now - datetime.timedelta(seconds=1))
    future = tokens.add(path, "future", ["generate"], expires=now + datetime.timedelta(hours=1))
    file = TokenFile.load(path)
    assert file.authenticate(past) is None
    assert file.authenticate(future) is not None


def test_a_day_written_by_hand_is_its_first_moment(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    record = f"{{name: a, sha256: {'0' * 63}a, scopes: [score], expires: 2027-01-31}}"
    path.write_text(f"tokens:\n  - {record}\n")
    (found,) = TokenFile.load(path).records
    assert found.expires == datetime.datetime(2027, 1, 31, tzinfo=datetime.UTC)


SHA = "a" * 64


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"tokens: [{{name: a, sha256: {SHA}, scopes: [generat]}}]", "generate"),
        (f"tokens: [{{name: a, sha256: {SHA}, scopes: []}}]", "scopes"),
        (f"tokens: [{{name: a b, sha256: {SHA}, scopes: [score]}}]", "letters, digits"),
        (f"tokens: [{{name: a, sha256: {SHA}}}]", "scopes"),
        (f"tokens: [{{name: a, sha256: {SHA}, scope: [score]}}]", "did you mean 'scopes'"),
        (f"tokens: [{{name: a, sha256: {SHA}, scopes: [score], expires: 2027-01-01T00:00:00}}]", "timezone"),
        ("tokens: [{name: a, sha256: abc, scopes: [score]}]", "64 lower-case hexadecimal"),
        (f"tokens: [{{name: a, sha256: {SHA}, scopes: [score]}}, "
         f"{{name: a, sha256: {SHA}, scopes: [score]}}]", "same name: a"),
        ("- a", "mapping"),
    ],
)  # fmt: skip
def test_a_file_that_says_something_else_is_refused_with_words_that_teach(
    content: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(content)
    with pytest.raises(TokenError, match=re.escape(words)) as caught:
        TokenFile.load(path)
    assert str(path) in str(caught.value)


def test_a_token_in_the_wrong_place_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    token = tokens.add(tmp_path / "other.yaml", "a", ["score"])
    for content in (
        f"tokens: [{{name: a, sha256: {token}, scopes: [score]}}]",
        f"tokens: [{{name: {token}, sha256: {SHA}, scopes: [score]}}]",
        f"tokens: [{{name: a, token: {token}, scopes: [score]}}]",
        f"tokens: [{token}: {{",
    ):
        path.write_text(content)
        with pytest.raises(TokenError) as caught:
            TokenFile.load(path)
        assert token not in str(caught.value)
        assert token not in repr(caught.value)
        assert caught.value.__cause__ is None


def test_neither_tokens_nor_hashes_are_in_a_repr(path: Path) -> None:
    token = tokens.add(path, "web", ["generate"])
    file = TokenFile.load(path)
    shown = repr(file) + repr(file.records) + repr(file.authenticate(token))
    assert token not in shown
    assert file.records[0].sha256 not in shown


def test_names_are_unique_and_scopes_known(path: Path) -> None:
    tokens.add(path, "web", ["generate"])
    before = path.read_text()
    with pytest.raises(TokenError, match="revoke web"):
        tokens.add(path, "web", ["generate"])
    with pytest.raises(TokenError, match="'generat'; scopes are: generate"):
        tokens.add(path, "other", ["generat"])
    with pytest.raises(TokenError, match="needs a scope"):
        tokens.add(path, "other", [])
    with pytest.raises(TokenError, match="letters"):
        tokens.add(path, "a b", ["generate"])
    with pytest.raises(TokenError, match="it has: web"):
        tokens.remove(path, "wbe")
    assert path.read_text() == before
    with pytest.raises(TokenError, match="accord token create"):
        TokenFile.load(path.with_name("none.yaml"))


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TokenError, match="cannot write"):
        tokens.add(tmp_path / "file" / "tokens.yaml", "web", ["generate"])


def add_some(path: Path, prefix: str) -> None:
    for number in range(5):
        tokens.add(path, f"{prefix}{number}", ["score"])


def test_two_who_add_at_once_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add_some, args=(path, prefix)) for prefix in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(TokenFile.load(path).records) == 15


def test_the_first_token_may_do_all_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    path, secret = tmp_path / "state" / "tokens.yaml", tmp_path / "state" / "token"
    assert tokens.ensure_first_token(path, secret)
    token = tokens.read_secret(secret)
    assert mode(secret) == mode(path) == 0o600
    assert TokenFile.load(path).authenticate(token) == Principal("first", frozenset(tokens.SCOPES))
    assert not tokens.ensure_first_token(path, secret)
    assert tokens.read_secret(secret) == token


def test_tokens_that_were_all_revoked_stay_so(tmp_path: Path) -> None:
    path, secret = tmp_path / "tokens.yaml", tmp_path / "token"
    tokens.ensure_first_token(path, secret)
    tokens.remove(path, "first")
    assert not tokens.ensure_first_token(path, secret)
    assert TokenFile.load(path).records == ()


def start_first(path: Path, secret: Path, barrier: Any, made: Any) -> None:
    barrier.wait(60)
    made.put(tokens.ensure_first_token(path, secret))


def test_of_several_starters_one_makes_the_token_and_it_works(tmp_path: Path) -> None:
    path, secret = tmp_path / "tokens.yaml", tmp_path / "token"
    context = multiprocessing.get_context("fork")
    barrier, made = context.Barrier(6), context.Queue()
    workers = [context.Process(target=start_first, args=(path, secret, barrier, made)) for _ in range(6)]
    for worker in workers:
        worker.start()
    answers = [made.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert sorted(answers) == [False] * 5 + [True]
    assert TokenFile.load(path).authenticate(tokens.read_secret(secret)) is not None


def test_a_secret_file_with_something_else_is_refused(tmp_path: Path) -> None:
    for content in ("", "two words", "x" * 300):
        (tmp_path / "token").write_text(content)
        with pytest.raises(TokenError, match="holds no token"):
            tokens.read_secret(tmp_path / "token")
    with pytest.raises(TokenError, match="No such file"):
        tokens.read_secret(tmp_path / "none")


def test_state_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("ACCORD_HOME", raising=False)
    assert tokens.default_tokens_path() == tmp_path / "accord" / "tokens.yaml"
    monkeypatch.setenv("ACCORD_HOME", str(tmp_path / "home"))
    assert tokens.default_secret_path() == tmp_path / "home" / "token"


def test_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    there = ["--file", str(path)]
    made = CliRunner().invoke(
        app, ["token", "create", "web", "--scope", "generate", "--scope", "score", "--days", "7", *there]
    )
    assert made.exit_code == 0, made.output
    token = made.stdout.strip()
    principal = TokenFile.load(path).authenticate(token)
    assert principal == Principal("web", frozenset({"generate", "score"}))
    listed = CliRunner().invoke(app, ["token", "list", *there]).stdout
    assert re.search(r"web +generate, score +20\d\d-", listed)
    assert token not in listed
    wrong = CliRunner().invoke(app, ["token", "revoke", "wbe", *there])
    assert wrong.exit_code == 2
    assert "it has: web" in wrong.stderr
    assert CliRunner().invoke(app, ["token", "revoke", "web", *there]).exit_code == 0
    assert TokenFile.load(path).authenticate(token) is None


def test_a_token_that_would_outlive_the_calendar_is_refused(tmp_path: Path) -> None:
    arguments = [
        "token",
        "create",
        "a",
        "--scope",
        "score",
        "--days",
        "1e9",
        "--file",
        str(tmp_path / "t.yaml"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "beyond the calendar" in done.stderr


def test_tokens_need_neither_torch_nor_grpc() -> None:
    code = "import sys, accord.tokens, accord.cli; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
