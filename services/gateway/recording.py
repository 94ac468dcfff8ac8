"""Sends a share of the served images to the feedback service, so that clients can rate them.

All of it happens off the path of requests, in one thread: when the feedback service is slow or away, images
are dropped and counted, and no request waits or fails.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from accord.client.connection import TLS, Endpoint
from accord.diffusion.seeds import candidate_seed
from accord.errors import AccordError
from accord.v1 import feedback_pb2, feedback_pb2_grpc
from accord.v1 import generation_pb2 as pb
from services.config import RecordSettings
from services.gateway.canary import draw
from services.gateway.pictures import encode
from services.metrics import GatewayMetrics

logger = logging.getLogger("ray.serve")

ATTEMPTS = 4
BACKOFF_S = 0.5
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)


@dataclass(frozen=True)
class Served:
    """An image as it was served: pixels are HWC, `png` is empty when it was served in another format."""

    image_id: str
    pixels: NDArray[np.uint8]
    png: bytes
    manifest: pb.ImageManifest


class Recorder:
    """Of a gateway replica."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._settings: RecordSettings | None = None
        self._waiting: queue.Queue[Served | None] = queue.Queue()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def configure(self, settings: RecordSettings | None) -> None:
        """From now on by these settings; what waits already is sent by them too."""
        self._settings = settings
        if settings is not None and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends the thread; what waits is not sent."""
        self._settings = None
        self._ended.set()
        self._waiting.put_nowait(None)

    def wants(self, image_id: str) -> bool:
        """Whether this image is of the share."""
        return self._settings is not None and draw(image_id, "record") < self._settings.share

    def offer(self, served: Served) -> None:
        """Takes an image to be sent, or drops it when too many wait; at once in either case."""
        settings = self._settings
        if settings is None:
            return
        if self._waiting.qsize() >= settings.queue_images:
            self._metrics.recorded.inc(tags={"outcome": "dropped"})
            return
        self._waiting.put_nowait(served)

    def _work(self) -> None:
        door: _Door | None = None
        while not self._ended.is_set():
            served = self._waiting.get()
            settings = self._settings
            if settings is None or served is None:
                continue
            try:
                if door is None or door.settings != settings:
                    if door is not None:
                        door.close()
                    door = _Door(settings)
                outcome = door.send(served, self._ended)
            except AccordError as error:
                logger.warning("served images are not recorded: %s", error)
                outcome = "failed"
            except Exception as error:  # the thread must go on
                logger.warning("a served image was not recorded: %s", type(error).__name__)
                outcome = "failed"
            if outcome == "failed" and door is not None:
                door.close()  # the next one reads the token's file again
                door = None
            self._metrics.recorded.inc(tags={"outcome": outcome})


class _Door:
    """A connection to the feedback service."""

    def __init__(self, settings: RecordSettings) -> None:
        """Raises AccordError: a file cannot be read."""
        self.settings = settings
        tls = TLS(ca_file=settings.ca_file) if settings.ca_file else None
        self._endpoint = Endpoint.find(settings.url, token_file=settings.token_file, tls=tls)
        self._channel = self._endpoint.channel(aio=False)
        self._stub = feedback_pb2_grpc.FeedbackServiceStub(self._channel)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._channel.close()

    def send(self, served: Served, ended: threading.Event) -> str:
        """The outcome, sent or failed; tries again while the service is away, and no more once `ended`."""
        manifest = served.manifest
        request = feedback_pb2.RecordServedImageRequest(
            image_id=served.image_id,
            image=served.png or encode(served.pixels, "image/png", manifest),
            prompt=manifest.prompt,
            model_digest=manifest.model_digest,
            seed=candidate_seed(manifest.seed, manifest.candidate),
        )
        for attempt in range(ATTEMPTS):
            try:
                self._stub.RecordServedImage(
                    request, metadata=self._endpoint.metadata(), timeout=self.settings.timeout_s
                )
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                if ended.is_set():
                    return "failed"
                if code not in AWAY or attempt == ATTEMPTS - 1:
                    logger.warning("the image %s was not recorded: %s", served.image_id, code.name)
                    return "failed"
                ended.wait(BACKOFF_S * 2**attempt)
            else:
                return "sent"
        raise AssertionError("the last attempt returns")
