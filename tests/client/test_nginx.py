"""The client through a real nginx that terminates TLS with the config of the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from accord import client as api
from accord.client import TLS, Client
from tests.client import nginx, server
from tests.client.certificates import Authority
from tests.client.server import ACTOR_DIED, Fault, Faulty, rich_fault

pytestmark = pytest.mark.nginx

Connect = Callable[..., Client]


@pytest.fixture(scope="module")
def behind() -> Iterator[Faulty]:
    with server.serve() as servicer:
        yield servicer


@pytest.fixture(autouse=True)
def _no_faults(behind: Faulty) -> None:
    behind.faults.clear()
    behind.cancelled.clear()
    behind.delay_s = 0.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, authority: Authority, behind: Faulty) -> Iterator[int]:
    with nginx.terminating_tls(
        tmp_path_factory.mktemp("nginx"), authority.sign("localhost"), behind.port
    ) as found:
        yield found


@pytest.fixture
def through(connect: Connect, port: int, authority: Authority) -> Client:
    return connect(f"grpcs://localhost:{port}", tls=TLS(ca_file=authority.file))


def test_calls_and_streams_come_through(through: Client) -> None:
    assert [image.rank for image in through.generate("x", num_images=2, candidates=4).images] == [1, 2]
    events = list(through.stream("x", candidates=3))
    assert isinstance(events[0], api.Accepted)
    assert isinstance(events[-1], api.Generation)
    assert through.score([(b"1234", "a star")])[0].clip_similarity == pytest.approx(0.04)


def test_large_messages_come_through(through: Client, behind: Faulty) -> None:
    image = bytes(20_000_000)
    assert len(through.score([(image, "p"), (image, "p")])) == 2
    assert len(behind.requests[-1].pairs[1].image) == 20_000_000


def test_a_message_above_the_proxy_s_limit_is_refused_in_grpc_s_words(through: Client) -> None:
    with pytest.raises(api.InvalidRequest, match="larger than the proxy allows"):
        through.score([(bytes(70_000_000), "p")])


def test_rich_errors_come_through(through: Client, behind: Faulty) -> None:
    bad = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field="spec.steps", description="x" * 200)
        ]
    )
    behind.faults = [rich_fault(grpc.StatusCode.INVALID_ARGUMENT, "bad", "FIELD_INVALID", bad)]
    with pytest.raises(api.InvalidRequest) as caught:
        through.generate("x")
    assert caught.value.violations[0].field == "spec.steps"
    assert caught.value.reason == "FIELD_INVALID"


def test_a_dead_replica_is_tried_again(through: Client, behind: Faulty) -> None:
    behind.faults = [
        Fault(grpc.StatusCode.INTERNAL, ACTOR_DIED),
        Fault(grpc.StatusCode.INTERNAL, ACTOR_DIED, after=3),
    ]
    assert through.generate("x").images
    behind.faults = [Fault(grpc.StatusCode.INTERNAL, ACTOR_DIED, after=3)]
    assert isinstance(list(through.stream("x", candidates=3))[-1], api.Generation)


def test_cancelling_comes_through(through: Client, behind: Faulty) -> None:
    behind.delay_s = 0.02
    events = through.stream("x", candidates=200)
    next(events)
    events.close()
    assert behind.cancelled.wait(60)


def test_an_untrusted_certificate_says_so(connect: Connect, port: int, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "other")
    with pytest.raises(api.UntrustedCertificate, match="not trusted"):
        connect(f"localhost:{port}", tls=TLS(ca_file=other.file)).models()


def test_a_client_without_tls_is_told_of_it(connect: Connect, port: int) -> None:
    with pytest.raises(api.Unavailable, match=r"wants TLS \(grpcs://"):
        connect(f"localhost:{port}").models()


def test_no_gateway_behind_it_is_unavailable(connect: Connect, authority: Authority, tmp_path: Path) -> None:
    with server.serve() as gone:
        pass
    signed = authority.sign("localhost")
    with (
        nginx.terminating_tls(tmp_path / "nginx", signed, gone.port) as port,
        pytest.raises(api.Unavailable, match="no gateway answers"),
    ):
        connect(f"localhost:{port}", tls=TLS(ca_file=authority.file)).models()


def test_client_certificates(connect: Connect, authority: Authority, behind: Faulty, tmp_path: Path) -> None:
    mine = authority.sign("client.example")
    with nginx.terminating_tls(
        tmp_path / "nginx", authority.sign("localhost"), behind.port, clients=authority.file
    ) as port:
        both = TLS(ca_file=authority.file, certificate_file=mine.certificate, key_file=mine.key)
        assert connect(f"localhost:{port}", tls=both).models()
        with pytest.raises(api.ClientError, match="certificate"):
            connect(f"localhost:{port}", tls=TLS(ca_file=authority.file)).models()
