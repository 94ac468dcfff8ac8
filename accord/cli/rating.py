"""`accord rate`: whether a served image was right."""

from typing import Annotated, Literal

import typer

from accord.cli.common import errors_shown
from accord.cli.connection import CaFileOption, TokenFileOption


def rate(
    image_id: Annotated[str, typer.Argument(help="The image_id that came with the image.")],
    verdict: Annotated[Literal["good", "bad", "skip"], typer.Argument(help="good, bad or skip.")],
    rater: Annotated[str, typer.Option(help="Whose verdict it is: letters, digits, - and _.")] = "client",
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            metavar="HOST:PORT",
            help="The feedback service's gRPC. Without it, $ACCORD_FEEDBACK_ENDPOINT or localhost:8081.",
        ),
    ] = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
) -> None:
    """Say whether a served image was right. Gateways record a share of what they serve."""
    from accord.client import TLS, FeedbackClient  # gRPC takes a moment to import

    with (
        errors_shown(),
        FeedbackClient(
            endpoint, token_file=token_file, tls=TLS(ca_file=ca_file) if ca_file else None
        ) as client,
    ):
        counted = client.rate(image_id, verdict, rater=rater)
        typer.echo("Counted." if counted else "Was counted before.")
