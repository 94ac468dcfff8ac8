"""Keeps Serve's gRPC proxy on the loopback interface: Serve itself always listens on all of them."""

from __future__ import annotations

from typing import Any


def only_loopback() -> None:
    """Ray's worker_process_setup_hook of `accord serve`; runs at the start of each worker process."""
    from ray.serve._private import default_impl

    def add_grpc_address(server: Any, address: str) -> None:
        server.add_insecure_port(f"127.0.0.1:{address.rpartition(':')[2]}")

    default_impl.add_grpc_address = add_grpc_address  # type: ignore[assignment]
