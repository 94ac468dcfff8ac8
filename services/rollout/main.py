"""`python -m services.rollout --config FILE`."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from prometheus_client import start_http_server

from accord.cli.common import errors_shown
from accord.config import load_yaml
from accord.errors import ConfigError
from accord.registry.registry import Registry
from accord.registry.rollout import Observed
from accord.registry.settings import registry_uri
from services.rollout.config import RolloutConfig
from services.rollout.metrics import RolloutMetrics
from services.rollout.serving import open_serving
from services.rollout.sources import Feedback, Gateway, Prometheus
from services.rollout.watch import Rollout


class LiveSources:
    """Prometheus, the gateway and, when there is one, the feedback service."""

    def __init__(self, config: RolloutConfig) -> None:
        """Raises AccordError: a token's file cannot be read."""
        self._window_s = config.window_s
        self._prometheus = Prometheus(config.prometheus)
        self._gateway = Gateway(config.gateway)
        self._feedback = Feedback(config.feedback) if config.feedback is not None else None

    def digests(self) -> dict[str, str]:
        return self._gateway.digests()

    def observe(self, champion: str, canary: str) -> tuple[Observed, Observed]:
        seen = {
            champion: self._prometheus.requests("champion", champion, self._window_s),
            canary: self._prometheus.requests("canary", canary, self._window_s),
        }
        if self._feedback is not None:
            seen = self._feedback.add_verdicts(seen, self._window_s)
        return seen[champion], seen[canary]


def main(
    config: Annotated[
        Path, typer.Option("--config", help="A YAML file: see docs/operate.md.", dir_okay=False)
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replaces a value of the file.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Look and act once, and end.")] = False,
) -> None:
    """Watch the canary until Ctrl-C or SIGTERM: make it champion, or take it out."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("accord.client").setLevel(logging.WARNING)
    with errors_shown():
        settings = load_yaml(RolloutConfig, config, list(set_ or []))
        if not settings.prometheus:
            raise ConfigError(
                f"{config}: prometheus is missing: where the gateway's metrics are (http://...)"
            )
        metrics = RolloutMetrics()
        registry = (
            Registry(registry_uri(settings.registry.url.get_secret_value() or None))
            if settings.registry
            else None
        )
        rollout = Rollout(
            settings.policy,
            LiveSources(settings),
            open_serving(settings.serve),
            registry,
            settings.registry.model if settings.registry else "",
            metrics=metrics,
        )
        if once:
            decision = rollout.step()
            typer.echo(f"{decision.action}: {decision.why}" if decision else "no canary is loaded")
            return
        if settings.metrics_port:
            _serve_metrics(settings, metrics)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        rollout.run(settings.every_s, stop)


def _serve_metrics(settings: RolloutConfig, metrics: RolloutMetrics) -> None:
    try:
        start_http_server(settings.metrics_port, settings.metrics_host, metrics.registry)
    except OSError as error:
        raise ConfigError(
            f"metrics_port {settings.metrics_port} on {settings.metrics_host} cannot be used: "
            f"{error.strerror}"
        ) from None


def run() -> Any:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    return app(prog_name="python -m services.rollout")
