"""The options with which every command that talks to a gateway says where it is and who asks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accord.cli.common import within

if TYPE_CHECKING:  # gRPC takes a moment to import, and most commands need none
    from accord.client import Client

_PANEL = "Connection"

EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="HOST:PORT",
        help="The gateway; grpcs://HOST:PORT for TLS. Without it, $ACCORD_ENDPOINT or localhost:9000.",
        rich_help_panel=_PANEL,
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help="A file with the token and nothing else. Without it, $ACCORD_TOKEN or what `accord serve` left.",
        rich_help_panel=_PANEL,
    ),
]
CaFileOption = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        help="PEM of the authorities to trust; switches TLS on. Without it, $ACCORD_CA_FILE.",
        rich_help_panel=_PANEL,
    ),
]
CertificateOption = Annotated[
    Path | None,
    typer.Option("--certificate", help="PEM of this client's certificate (mTLS).", rich_help_panel=_PANEL),
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="PEM of the certificate's key.", rich_help_panel=_PANEL)
]
TimeoutOption = Annotated[
    float,
    typer.Option(
        "--timeout",
        help="Seconds for the whole call, with retries.",
        callback=within(0.001),
        rich_help_panel=_PANEL,
    ),
]


def connect(
    endpoint: str | None,
    token_file: Path | None,
    ca_file: Path | None,
    certificate: Path | None,
    key: Path | None,
) -> "Client":
    """The client that the options describe.

    Raises:
        AccordError: options that contradict one another, or files that cannot be read.
    """
    from accord.client import TLS, Client

    tls = None
    if ca_file or certificate or key:
        tls = TLS(ca_file=ca_file, certificate_file=certificate, key_file=key)
    return Client(endpoint, token_file=token_file, tls=tls)
