"""Accord at several times its capacity: are refusals quick, is the work done as fast, is it shared fairly?

python -m benchmarks.overload --times 3
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from accord.config import resolve_path
from accord.cpu import use_cpu
from benchmarks.local import measure_ceiling
from benchmarks.processes import memory_mib
from benchmarks.remote import Client, Remote, started
from benchmarks.rivals import Settings
from benchmarks.tables import describe, table, write_json
from benchmarks.traffic import SINGLE

SANDBOX = "pkg://accord.shapes/weights/diffusion"


@dataclass
class Seen:
    """What clients saw of one run."""

    images: list[int] = field(default_factory=lambda: [0, 0])
    """Of each token."""
    refused_s: list[float] = field(default_factory=list)
    """How long each refusal took."""
    without_retry_info: int = 0
    other_errors: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    checks_s: list[float] = field(default_factory=list)
    failed_checks: int = 0
    memory_mib: list[float] = field(default_factory=list)

    @property
    def images_per_s(self) -> float:
        return sum(self.images) / self.seconds if self.seconds else 0.0

    @property
    def jain(self) -> float:
        """Fairness of two tokens (Jain 1984): 1 when both got as much."""
        squares = sum(images**2 for images in self.images)
        return sum(self.images) ** 2 / (len(self.images) * squares) if squares else float("nan")


def main(
    model: Annotated[str, typer.Option(help="A StableDiffusionPipeline directory.")] = SANDBOX,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads of torch for whoever draws.")] = 1,
    times: Annotated[float, typer.Option(help="Arrivals, as a multiple of the ceiling.")] = 3.0,
    seconds: Annotated[float, typer.Option(help="How long requests arrive.")] = 20.0,
    capacity: Annotated[int, typer.Option(help="Candidates that the gateway admits at a time.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Where to write all numbers.")] = None,
) -> None:
    """Prints a Markdown table: at the ceiling's rate, and at several times it."""
    use_cpu(threads)
    ceiling = measure_ceiling(resolve_path(model), device).images_per_s(SINGLE)
    settings = Settings(model, device, threads, capacity=capacity)
    with started("accord", settings) as remote:
        loads = (1.0, times)
        seen = [_overload(remote, load * ceiling, seconds, seed) for load in loads]
    print(f"\n{describe(device)}; ceiling {ceiling:.3g} images/s\n")
    rows = [_row(load, run, seen[0]) for load, run in zip(loads, seen, strict=True)]
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    write_json(json, device, {"times": times, "capacity": capacity, "ceiling": ceiling}, rows)


def _overload(remote: Remote, rate: float, seconds: float, seed: int) -> Seen:
    """Requests of two tokens in turn; the clock runs from the first to the last answer."""
    seen = Seen()
    client = Client(remote)
    client.wait_until_ready()
    lock = threading.Lock()
    requests = SINGLE.requests(rate, int(rate * seconds), seed)
    begun_s = time.perf_counter()
    left = threading.Semaphore(0)

    def answered(token: int, sent_s: float, future: Any) -> None:
        now_s = time.perf_counter()
        with lock:
            error = future.exception()
            if error is None:
                seen.images[token] += 1
                seen.seconds = max(seen.seconds, now_s - begun_s)
            elif error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                seen.refused_s.append(now_s - sent_s)
                seen.without_retry_info += not _has_retry_info(error)
            else:
                name = error.code().name
                seen.other_errors[name] = seen.other_errors.get(name, 0) + 1
        left.release()

    with _watched(remote, seen):
        for number, request in enumerate(requests):
            time.sleep(max(0.0, begun_s + request.arrival_s - time.perf_counter()))
            sent_s, token = time.perf_counter(), number % 2
            client.submit(request, token).add_done_callback(partial(answered, token, sent_s))
        for _ in requests:
            left.acquire()
    client.close()
    return seen


@contextlib.contextmanager
def _watched(remote: Remote, seen: Seen) -> Iterator[None]:
    """Asks for the server's health and looks at its memory, twice a second, during the block."""
    stop = threading.Event()

    def watch() -> None:
        with grpc.insecure_channel(remote.address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            while not stop.wait(0.5):
                asked_s = time.perf_counter()
                try:
                    answer = health.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
                    seen.failed_checks += answer.status != health_pb2.HealthCheckResponse.SERVING
                    seen.checks_s.append(time.perf_counter() - asked_s)
                except grpc.RpcError:
                    seen.failed_checks += 1
                seen.memory_mib.append(memory_mib(remote.process_id))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _has_retry_info(error: Any) -> bool:
    status = rpc_status.from_call(error)
    return status is not None and any(
        detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details
    )


def _row(load: float, run: Seen, peak: Seen) -> dict[str, Any]:
    refused = sorted(run.refused_s)
    return {
        "load / ceiling": load,
        "images/s": run.images_per_s,
        "of the first row's": run.images_per_s / peak.images_per_s if peak.images_per_s else float("nan"),
        "refused": len(refused),
        "refusal, median ms": 1e3 * statistics.median(refused) if refused else "none",
        "refusal, p99 ms": 1e3 * refused[int(0.99 * (len(refused) - 1))] if refused else "none",
        "without RetryInfo": run.without_retry_info,
        "other errors": run.other_errors or "none",
        "Jain": run.jain,
        "health checks failed": f"{run.failed_checks} of {run.failed_checks + len(run.checks_s)}",
        "slowest health check ms": 1e3 * max(run.checks_s, default=float("nan")),
        "memory MiB, first to most": f"{run.memory_mib[0]:.0f} to {max(run.memory_mib):.0f}"
        if run.memory_mib
        else "",
    }


if __name__ == "__main__":
    typer.run(main)
