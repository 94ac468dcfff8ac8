"""Where the client goes, what it shows there, and what it says when TLS fails."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from accord import client as api
from accord import tokens
from accord.client import TLS, Client
from accord.client.connection import Endpoint
from accord.errors import ConfigError, TokenError
from tests.client import server
from tests.client.certificates import Authority, Signed


def test_arguments_come_before_the_environment_and_that_before_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert Endpoint.find() == Endpoint("localhost:9000", None, None)
    tokens.ensure_first_token(tokens.default_tokens_path(), tokens.default_secret_path())
    first = tokens.default_secret_path().read_text().strip()
    assert Endpoint.find().token == first
    monkeypatch.setenv("ACCORD_ENDPOINT", "grpcs://example.org:443")
    monkeypatch.setenv("ACCORD_TOKEN", "from-the-environment")
    assert Endpoint.find() == Endpoint("example.org:443", TLS(), "from-the-environment")
    (tmp_path / "token").write_text("from-a-file\n")
    assert Endpoint.find("127.0.0.1:1", token_file=tmp_path / "token", tls=False) == Endpoint(
        "127.0.0.1:1", None, "from-a-file"
    )
    assert Endpoint.find(token="given").token == "given"


def test_the_local_token_goes_to_no_other_machine() -> None:
    tokens.ensure_first_token(tokens.default_tokens_path(), tokens.default_secret_path())
    for here in (
        "localhost:9000",
        "127.0.0.1:9000",
        "[::1]:9000",
        "unix:/run/accord.sock",
        "grpc://localhost:1",
    ):
        assert Endpoint.find(here).token, here
    for elsewhere in (
        "example.org:9000",
        "localhost.example.org:9000",
        "10.0.0.1:9000",
        "127.0.0.1.example.org:1",
    ):
        assert Endpoint.find(elsewhere).token is None, elsewhere


def test_a_ca_file_in_the_environment_switches_tls_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCORD_CA_FILE", "ca.pem")
    assert Endpoint.find("a:1").tls == TLS(ca_file="ca.pem")
    assert Endpoint.find("grpc://a:1").tls is None
    assert Endpoint.find("a:1", tls=False).tls is None


def test_settings_that_contradict_one_another_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one"):
        Endpoint.find("grpc://a:1", tls=TLS())
    with pytest.raises(ConfigError, match="choose one"):
        Endpoint.find(token="a", token_file="b")
    with pytest.raises(ConfigError, match="both or neither"):
        TLS(certificate_file="a")
    with pytest.raises(ConfigError, match="no address"):
        Endpoint.find("a b")
    with pytest.raises(ConfigError, match=r"cannot read .*none"):
        Client("a:1", tls=TLS(ca_file=tmp_path / "none"))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ConfigError, match="holds no certificate"):
        Client("a:1", tls=TLS(ca_file=tmp_path / "text"))
    with pytest.raises(TokenError, match="cannot read a token"):
        Client("a:1", token_file=tmp_path / "none")
    with pytest.raises(ConfigError, match="one word") as caught:
        Client("a:1", token="hid den")
    assert "hid" not in str(caught.value)


def test_a_token_is_in_no_repr() -> None:
    client = Client("a:1", token="accord_hidden")
    assert "hidden" not in repr(client) + repr(client.endpoint) + repr(vars(client))
    client.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@contextmanager
def tls_server(signed: Signed, clients: Path | None = None) -> Iterator[server.Faulty]:
    credentials = grpc.ssl_server_credentials(
        [(signed.key.read_bytes(), signed.certificate.read_bytes())],
        root_certificates=clients.read_bytes() if clients else None,
        require_client_auth=clients is not None,
    )
    with server.serve(credentials) as servicer:
        yield servicer


@pytest.fixture(scope="module")
def secure(authority: Authority) -> Iterator[server.Faulty]:
    with tls_server(authority.sign("localhost")) as servicer:
        yield servicer


Connect = Callable[..., Client]


def test_a_trusted_certificate_is_enough(
    connect: Connect, secure: server.Faulty, authority: Authority
) -> None:
    assert connect(secure.target, tls=TLS(ca_file=authority.file)).models()
    assert connect(f"grpcs://127.0.0.1:{secure.port}", tls=TLS(ca_file=authority.file)).models()


def test_an_untrusted_certificate_says_so_and_is_not_tried_again(
    connect: Connect, secure: server.Faulty, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other", "other")
    for tls in (TLS(ca_file=other.file), True):
        with pytest.raises(api.UntrustedCertificate, match=r"not trusted.*--ca-file") as caught:
            connect(secure.target, tls=tls).models()
        assert "no server" not in str(caught.value)


def test_a_certificate_for_another_name_says_so(connect: Connect, authority: Authority) -> None:
    with tls_server(authority.sign("elsewhere.example")) as servicer:
        tls = TLS(ca_file=authority.file)
        with pytest.raises(api.UntrustedCertificate, match="for another name"):
            connect(servicer.target, tls=tls).models()
        named = TLS(ca_file=authority.file, server_name="elsewhere.example")
        assert connect(servicer.target, tls=named).models()


def test_tls_to_a_plain_server_says_so(connect: Connect, faulty: server.Faulty, authority: Authority) -> None:
    with pytest.raises(api.UntrustedCertificate, match="no TLS"):
        connect(faulty.target, tls=TLS(ca_file=authority.file)).models()


def test_plain_to_a_tls_server_hints_at_tls(connect: Connect, secure: server.Faulty) -> None:
    with pytest.raises(api.Unavailable, match=r"wants TLS \(grpcs://"):
        connect(secure.target).models()


def test_a_server_that_asks_for_a_client_certificate(connect: Connect, authority: Authority) -> None:
    mine = authority.sign("client.example")
    with tls_server(authority.sign("localhost"), clients=authority.file) as servicer:
        both = TLS(ca_file=authority.file, certificate_file=mine.certificate, key_file=mine.key)
        assert connect(servicer.target, tls=both).models()
        with pytest.raises(api.Unavailable, match="wants a certificate of this client"):
            connect(servicer.target, tls=TLS(ca_file=authority.file)).models()


def test_cancelling_the_task_stops_the_drawing(faulty: server.Faulty) -> None:
    faulty.delay_s = 0.02

    async def scenario() -> None:
        started = asyncio.Event()
        async with api.AsyncClient(faulty.target, token=server.TOKEN) as client:
            task = asyncio.create_task(
                client.generate("p", candidates=200, on_progress=lambda progress: started.set())
            )
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(scenario())
    assert faulty.cancelled.wait(60)


def test_many_calls_share_one_asynchronous_client(faulty: server.Faulty) -> None:
    async def scenario() -> list[api.Generation]:
        async with api.AsyncClient(faulty.target, token=server.TOKEN) as client:
            calls = [client.generate("p", seed=number, candidates=2) for number in range(20)]
            return await asyncio.gather(*calls)

    assert [made.summary.seed for made in asyncio.run(scenario())] == list(range(20))


def test_the_client_needs_neither_torch_nor_ray() -> None:
    code = "import sys, accord.client; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
