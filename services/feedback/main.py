"""`python -m services.feedback serve` runs the service; `invite` makes a rater's link."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from prometheus_client import start_http_server
from rich.console import Console

from accord.artifacts import write_file
from accord.cli.common import errors_shown
from accord.config import load_yaml, redact_url, validate
from accord.errors import ConfigError
from accord.tokens import default_secret_path, read_secret
from services.feedback.app import create_app
from services.feedback.backend import Backend
from services.feedback.config import FeedbackServiceConfig
from services.feedback.grpc_server import GrpcServer
from services.feedback.operator_page import invite_link

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="A YAML file with the service's settings.", dir_okay=False)
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replaces a setting of the file.")
]
UrlOption = Annotated[str | None, typer.Option("--url", help="The store: sqlite:////path or postgresql://…")]
ImagesOption = Annotated[
    str | None,
    typer.Option("--images", help="The images to judge: a folder, or s3://bucket/images and the like."),
]
StateOption = Annotated[
    Path | None, typer.Option("--state-dir", help="Where the secret that signs links is kept.")
]


@app.command()
def serve(
    config: ConfigOption = None,
    overrides: SetOption = [],  # noqa: B006 - typer reads the default and never changes it
    url: UrlOption = None,
    images: ImagesOption = None,
    state_dir: StateOption = None,
    endpoint_file: Annotated[
        Path | None, typer.Option("--endpoint-file", help="Gets, once it serves, its addresses, as JSON.")
    ] = None,
) -> None:
    """Serve the rating page, gRPC and metrics until Ctrl-C or SIGTERM."""
    with errors_shown():
        settings = read_config(config, overrides, url=url, images=images, state_dir=state_dir)
        asyncio.run(Service(settings, endpoint_file).run())


@app.command()
def invite(
    campaign: Annotated[str, typer.Argument(help="The campaign's id.")],
    raters: Annotated[list[str], typer.Argument(help="Names of raters: letters, digits, - and _.")],
    config: ConfigOption = None,
    overrides: SetOption = [],  # noqa: B006
    url: UrlOption = None,
    images: ImagesOption = None,
    state_dir: StateOption = None,
    hours: Annotated[float | None, typer.Option("--hours", help="How long the links are good.")] = None,
) -> None:
    """Make an invite link for each rater. Each opens once; give it to nobody else."""
    with errors_shown():
        settings = read_config(config, overrides, url=url, images=images, state_dir=state_dir)
        with Backend(settings) as backend:
            for rater in raters:
                typer.echo(f"{rater}\t{invite_link(backend, campaign, rater, hours)['url']}")


@app.command()
def rate(
    campaign: Annotated[str, typer.Argument(help="The campaign's id.")],
    address: Annotated[str, typer.Option("--address", help="The service's gRPC port, HOST:PORT.")],
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="A file with a token that has the scope rate.")
    ] = None,
    certificates: Annotated[
        Path | None, typer.Option("--certificates", help="PEM certificates to trust, for TLS.")
    ] = None,
    grammar: Annotated[str, typer.Option("--grammar", help="The grammar of the prompts.")] = "shapes",
    seed: Annotated[int, typer.Option("--seed", help="Of what the raters say.")] = 0,
    panel: Annotated[
        str, typer.Option("--panel", help="The factory of simulated raters, as a recipe names it.")
    ] = "accord.shapes.raters:panel",
    names: Annotated[
        list[str], typer.Option("--rater", metavar="NAME", help="Only these of its raters.")
    ] = [],  # noqa: B006
) -> None:
    """Have simulated raters judge a campaign over gRPC, all of them at once."""
    from services.feedback.raters import Door, rate_campaign, raters_of  # torch: seconds that only this needs

    with errors_shown():
        raters = raters_of(panel, names)
        token = read_secret(token_file or default_secret_path())
        door = Door(address, token, certificates.read_bytes() if certificates else None)
        console = Console(stderr=True)
        with console.status("Raters are judging …") as status:
            total = rate_campaign(
                door,
                campaign,
                raters=raters,
                grammar=grammar,
                seed=seed,
                on_answer=lambda count: status.update(f"Raters are judging: {count} answers"),
            )
        typer.echo(f"{total} answers")


def read_config(path: Path | None, overrides: list[str], **options: Any) -> FeedbackServiceConfig:
    """The settings of a file, of "key=value" overrides, and of options, the later ones first.

    Raises:
        ConfigError: naming what is wrong or missing.
    """
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    if path is not None:
        return load_yaml(FeedbackServiceConfig, path, [*overrides, *given])
    values: dict[str, Any] = {}
    for override in [*overrides, *given]:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"{redact_url(override)!r} is not of the form key=value")
        values[key] = value
    return validate(FeedbackServiceConfig, values, "the options")


class Service:
    """The page, gRPC and the metrics in one process. `run` ends on SIGINT and SIGTERM."""

    def __init__(self, config: FeedbackServiceConfig, endpoint_file: Path | None = None) -> None:
        self._config = config
        self._endpoint_file = endpoint_file
        self._stop = asyncio.Event()
        self.serving = threading.Event()
        """Set when it answers on all of its ports."""
        self.addresses: dict[str, str] = {}
        """Where it listens: of "page", "gRPC" and "metrics"."""
        self.port = 0
        """The page's port on this machine."""

    def stop(self) -> None:
        """Begin to end, from within the event loop."""
        self._stop.set()

    async def run(self, *, handle_signals: bool = True) -> None:
        """Serve until told to stop; then let what is under way end.

        Raises:
            ConfigError, FeedbackError: a port is taken, the database is away, ...: nothing is served then.
        """
        with _listening(self._config) as page_socket:
            config = _with_site(self._config, page_socket)
            with Backend(config) as backend:
                grpc_server = GrpcServer(backend)
                page = _PageServer(_page_config(backend))
                with _metrics(backend) as metrics_port:
                    if handle_signals:
                        self._handle_signals()
                    await grpc_server.start()
                    self._say(config, grpc_server.port, metrics_port)
                    serving = asyncio.create_task(page.serve(sockets=[page_socket]))
                    await asyncio.wait(
                        [serving, asyncio.create_task(self._stop.wait())], return_when=asyncio.FIRST_COMPLETED
                    )
                    page.should_exit = True
                    await asyncio.gather(serving, grpc_server.stop(config.shutdown_s))

    def _handle_signals(self) -> None:
        # Set here, also when whoever started us ignored SIGINT, as shells do for jobs in the background.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)

    def _say(self, config: FeedbackServiceConfig, grpc_port: int, metrics_port: int) -> None:
        self.port = config.port
        self.addresses = {
            "page": config.site,
            "gRPC": f"{config.host}:{grpc_port}",
            "metrics": f"http://{config.host}:{metrics_port}/metrics",
        }
        print(f"Rating page  {config.site}  (operators: {config.site}/operator)")
        print(f"gRPC         {self.addresses['gRPC']}")
        print(f"Metrics      {self.addresses['metrics']}", flush=True)
        if self._endpoint_file is not None:
            write_file(self._endpoint_file, json.dumps(self.addresses) + "\n")
        self.serving.set()


class _PageServer(uvicorn.Server):
    """uvicorn without its signal handlers: the service has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _page_config(backend: Backend) -> uvicorn.Config:
    config = backend.config
    return uvicorn.Config(
        create_app(backend),
        log_level="warning",
        access_log=False,  # addresses of invites are secrets
        server_header=False,
        timeout_graceful_shutdown=int(config.shutdown_s) or None,
        lifespan="off",
    )


@contextlib.contextmanager
def _listening(config: FeedbackServiceConfig) -> Iterator[socket.socket]:
    """The page's socket; taken first, so that a second start fails before it touches anything."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
            listener.listen(256)
        except OSError as error:
            raise _cannot_listen("the page", config.host, config.port, "port", error) from None
        yield listener


@contextlib.contextmanager
def _metrics(backend: Backend) -> Iterator[int]:
    config = backend.config
    try:
        server, thread = start_http_server(
            config.metrics_port, addr=config.host, registry=backend.metrics.registry
        )
    except OSError as error:
        raise _cannot_listen("metrics", config.host, config.metrics_port, "metrics_port", error) from None
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _cannot_listen(what: str, host: str, port: int, key: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen for {what} on {host}:{port}: {error.strerror}. Stop the program that has it (is the "
        f"service running already?), or choose another: --set {key}=…"
    )


def _with_site(config: FeedbackServiceConfig, listener: socket.socket) -> FeedbackServiceConfig:
    """The config with the port that the system chose."""
    return config.model_copy(update={"port": listener.getsockname()[1]})


def main() -> None:
    """`python -m services.feedback`: with options alone it serves."""
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith("-") and arguments[0] != "--help":
        arguments = ["serve", *arguments]
    app(arguments, prog_name="accord feedback")
