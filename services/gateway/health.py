"""grpc.health.v1 through Serve: what probes of Kubernetes and `grpc_health_probe` ask. No token is needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeAlias

from grpc_health.v1 import health_pb2

from services.gateway.errors import Reason, RequestError

SERVICES = ("", "accord.v1.GenerationService", "accord.v1.RewardService", "grpc.health.v1.Health")
POLL_S = 1.0
Status: TypeAlias = Any  # health_pb2.HealthCheckResponse, which has no types


class Health:
    """Serving as soon as models are known; a replica that dies later is a matter of retries, not of
    health."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self._ready = ready
        self._watches = 0
        self.max_watches = 16

    def status(self, service: str) -> Status:
        """Raises RequestError for a service that is not served here."""
        if service not in SERVICES:
            raise RequestError(
                Reason.SERVICE_NOT_FOUND, "no such service here; reflection lists those that are"
            )
        return _status("SERVING" if self._ready() else "NOT_SERVING")

    async def watch(self, service: str) -> AsyncGenerator[Status, None]:
        """The status, and again whenever it changes. Raises RequestError beyond `max_watches` streams."""
        if self._watches >= self.max_watches:
            raise RequestError(
                Reason.WATCHES_LIMITED, "too many streams of Watch are open; use Check", retry_after_s=10.0
            )
        self._watches += 1
        try:
            told = None
            while True:
                now = self.status(service) if service in SERVICES else _status("SERVICE_UNKNOWN")
                if now != told:
                    told = now
                    yield now
                await asyncio.sleep(POLL_S)
        finally:
            self._watches -= 1

    def all(self) -> health_pb2.HealthListResponse:
        return health_pb2.HealthListResponse(statuses={service: self.status(service) for service in SERVICES})


def _status(name: str) -> Status:
    return health_pb2.HealthCheckResponse(status=name)
