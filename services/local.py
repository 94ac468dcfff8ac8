"""`accord serve`: the whole application on this machine, until Ctrl-C.

Ray, Serve and the gRPC port are started here and end with this process; nothing but this machine can reach
the port.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from accord.artifacts import write_file
from accord.cli.common import within
from accord.config import load_yaml, resolve_path
from accord.errors import AccordError, ConfigError
from accord.local_servers import LocalServer, announced
from accord.tokens import default_secret_path, default_tokens_path, ensure_first_token
from services.config import APP_NAME, SERVICER_FUNCTIONS, ServeConfig
from services.managed import cause, deploy, make_ray_token, write_manage_file
from services.rollout.config import ServeEndpoint

ENVIRONMENTS = Path(__file__).parent / "environments"
READY_TIMEOUT_S = 240.0
OBJECT_STORE_BYTES = 256 * 2**20
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Ray has it so on macOS and Windows: all of its processes listen on the loopback interface alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


@contextlib.contextmanager
def serving(
    config: ServeConfig,
    *,
    port: int = 0,
    public: bool = False,
    tokens_path: str | Path | None = None,
    secret_path: str | Path | None = None,
    manage: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[LocalServer]:
    """Serves during the block. Starts Ray in this process, which must not have it yet.

    Args:
        port: of gRPC; 0 for a free one.
        public: listen on all interfaces; else on 127.0.0.1 alone.
        manage: a file that gets what `accord models promote --serve` needs; Ray's dashboard then runs too.
        say: told of each stage.

    Raises:
        ConfigError: the port is taken, or Ray runs in this process already.
        AccordError: no model could be loaded, and so on.
    """
    tokens_path = Path(tokens_path or config.gateway.tokens or default_tokens_path()).expanduser().absolute()
    secret_path = Path(secret_path or default_secret_path()).expanduser().absolute()
    port = _free_port(port)
    ensure_first_token(tokens_path, secret_path)
    gateway = config.gateway.model_copy(update={"tokens": str(tokens_path)})
    config = config.model_copy(update={"gateway": gateway})
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE", str(gateway.user_config.limits.max_request_bytes + 2**20)
    )
    dashboard_port = _free_port(0) if manage else 0
    ray_token = make_ray_token(manage) if manage else None  # before the import, which reads the environment
    import ray

    if ray.is_initialized():
        raise ConfigError("Ray runs in this process already; serve from a process of its own")
    say("Starting Ray")
    try:
        with _quiet_stderr():
            metrics_address = _start_ray(config, public, dashboard_port)
        say("Loading the models")
        endpoint = LocalServer(
            f"127.0.0.1:{port}",
            str(tokens_path),
            str(secret_path),
            metrics_address,
            os.getpid(),
            f"http://127.0.0.1:{dashboard_port}" if manage else "",
        )
        where = ServeEndpoint(url=endpoint.dashboard, token_file=str(ray_token)) if manage else None
        _start_serve(config, port, where)
        _wait_until_healthy(port)
        if manage and where:
            write_manage_file(manage, where, endpoint.address, endpoint.secret_path)
        yield endpoint
    finally:
        say("Stopping")
        with _quiet_stderr():
            _stop()


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hides what Ray's C++ parts print for Ray's developers; errors still arrive as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _start_ray(config: ServeConfig, public: bool, dashboard_port: int) -> str:
    """Starts a local cluster with room for all replicas; the address of its metrics."""
    import ray

    hook = "only_replicas_loopback" if public else "only_loopback"
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(_cpus(config))),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=dashboard_port > 0,
        dashboard_host="127.0.0.1",
        dashboard_port=dashboard_port or None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"worker_process_setup_hook": f"services.loopback.{hook}"},
    )
    node = ray.nodes()[0]  # type: ignore[no-untyped-call]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _start_serve(config: ServeConfig, port: int, managed: ServeEndpoint | None) -> None:
    from ray import serve

    from services.app import application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "http_options": {"host": "127.0.0.1", "port": _free_port(0)},
        "grpc_options": {"port": port, "grpc_servicer_functions": list(SERVICER_FUNCTIONS)},
    }
    serve.start(proxy_location="HeadOnly", **options)
    if managed is not None:
        deploy(config, managed, options, READY_TIMEOUT_S)
        return
    try:
        serve.run(application(config, versioned=True), name=APP_NAME, blocking=False)
    except RuntimeError as error:
        raise AccordError(f"the application could not be started: {_cause(error)}") from error


def _cause(error: RuntimeError) -> str:
    """The reason why a deployment failed, out of the many lines that Serve makes of it."""
    from ray import serve

    texts: list[str] = []
    with contextlib.suppress(Exception):
        deployments = serve.status().applications[APP_NAME].deployments
        texts = [status.message for status in deployments.values()]
    return cause(texts, str(error) or type(error).__name__)


def _wait_until_healthy(port: int) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    deadline = time.monotonic() + READY_TIMEOUT_S
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0, wait_for_ready=True)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            if time.monotonic() > deadline:
                raise AccordError(f"the application was not healthy after {READY_TIMEOUT_S:.0f} s")
            time.sleep(0.1)


def _stop() -> None:
    import ray
    from ray import serve

    if ray.is_initialized():
        with contextlib.suppress(Exception):
            serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _cpus(config: ServeConfig) -> float:
    parts = (config.generation, config.reward, config.gateway)
    return sum(part.num_cpus * part.autoscaling.max_replicas for part in parts)


def _free_port(port: int) -> int:
    """The port if nobody listens on it, or any free one for 0. Raises ConfigError."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be used ({error.strerror}): something else listens there; stop it, or "
                "give another one: --port NUMBER (0 for any that is free)"
            ) from None
        found: int = probe.getsockname()[1]
        return found


class Stop:
    """SIGINT and SIGTERM, also where the parent ignores them: the first ends the waiting or the starting, the
    second ends the process at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.interrupt = True

    def install(self) -> None:
        """Also after Ray has started, which puts a handler of its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            os._exit(130)
        self._event.set()
        if self.interrupt:
            raise KeyboardInterrupt

    def wait(self) -> None:
        self.interrupt = False
        while not self._event.wait(0.5):
            pass


def environment(
    path: Path | None, overrides: list[str], model: str | None = None, reward_model: str | None = None
) -> ServeConfig:
    """The config of an environment; `model` and `reward_model` are directories that become the defaults.

    Raises ConfigError.
    """
    for section, alias, directory in (("generation", "model", model), ("reward", "reward", reward_model)):
        if directory is not None:
            place = str(Path(directory).expanduser().absolute()) if "://" not in directory else directory
            overrides = [
                *overrides,
                f"{section}.user_config.models.{alias}={json.dumps(place)}",
                f"{section}.user_config.default={alias}",
            ]
    return load_yaml(ServeConfig, path or ENVIRONMENTS / "local.yaml", overrides)


def check_models(config: ServeConfig) -> None:
    """On one machine a model that is not there is an error before anything starts. Raises ConfigError."""
    for section, table in (
        ("generation", config.generation.user_config),
        ("reward", config.reward.user_config),
    ):
        for alias, directory in table.models.items():
            if not resolve_path(directory).is_dir():
                raise ConfigError(
                    f"{section}.user_config.models.{alias}: there is no directory {directory}; "
                    "expected that of a model, such as runs/demo/aligned"
                )


def main(
    environment_file: Annotated[
        Path | None, typer.Option("--environment", help="Serving config [default: the sandbox's weights].")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the config."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Directory of the diffusion model to serve.")] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="Directory of the reward model to score by.")
    ] = None,
    port: Annotated[
        int, typer.Option(callback=within(0, 65535), help="Of gRPC; 0 for any that is free.")
    ] = 9000,
    public: Annotated[
        bool, typer.Option("--public", help="Listen on all interfaces. There is no TLS: see docs/serve.md.")
    ] = False,
    tokens: Annotated[Path | None, typer.Option(help="File of hashed tokens.")] = None,
    secret: Annotated[Path | None, typer.Option(help="Where the first token is put.")] = None,
    manage: Annotated[
        Path | None,
        typer.Option(
            "--manage",
            metavar="FILE",
            help="Written for `accord models promote --serve FILE`, which then changes what serves.",
        ),
    ] = None,
    endpoint_file: Annotated[
        Path | None, typer.Option(help="Gets, once all is healthy, where it is, as JSON.")
    ] = None,
) -> None:
    """Serve scored generations over gRPC on this machine, until Ctrl-C."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    stop = Stop()
    stop.install()
    try:
        config = environment(environment_file, list(set_ or []), model, reward_model)
        check_models(config)
        with serving(
            config,
            port=port,
            public=public,
            tokens_path=tokens,
            secret_path=secret,
            manage=manage.expanduser().absolute() if manage else None,
            say=lambda text: console.print(f"[dim]{text} …[/]"),
        ) as endpoint:
            stop.install()
            _tell(console, endpoint)
            if endpoint_file is not None:
                write_file(endpoint_file, json.dumps(asdict(endpoint), indent=2) + "\n")
            with _found_by_status(endpoint, console):
                stop.wait()
    except KeyboardInterrupt:
        pass
    except AccordError as error:
        console.print(f"[bold red]Error:[/] {error}")
        raise typer.Exit(2) from None
    console.print("Stopped.")


@contextlib.contextmanager
def _found_by_status(endpoint: LocalServer, console: Console) -> Iterator[None]:
    """A home that cannot be written to is no reason not to serve."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(announced(endpoint))
        except OSError as error:
            console.print(f"[dim]`accord status` will not find this server: {error}[/]")
        yield


def _tell(console: Console, endpoint: LocalServer) -> None:
    console.print(
        f"[bold]Serving at {endpoint.address}[/] (gRPC, plaintext); metrics at {endpoint.metrics_address}"
    )
    if Path(endpoint.secret_path).is_file():
        console.print(f"Token: {endpoint.secret_path} (its hash is in {endpoint.tokens_path})")
    else:
        console.print(f"Tokens: those of {endpoint.tokens_path}; `accord token create NAME` makes one more")
    example = 'accord generate "two red stars on grass" -n 4 --candidates 16 -o out/'
    console.print(f"Try: {example} --endpoint {endpoint.address}")
    console.print("Ctrl-C stops it.")


def _run() -> Any:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    return app()


if __name__ == "__main__":
    _run()
