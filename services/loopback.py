"""Keeps Serve on the loopback interface: its gRPC servers listen on all of them, whatever they are told.

Ray's worker_process_setup_hook of `accord serve`: runs at the start of each worker process.
"""

from __future__ import annotations

from typing import Any


def only_loopback() -> None:
    """The gRPC proxy, and the servers by which replicas talk with one another."""
    only_replicas_loopback()
    from ray.serve._private import default_impl

    def add_grpc_address(server: Any, address: str) -> None:
        server.add_insecure_port(_here(address))

    default_impl.add_grpc_address = add_grpc_address  # type: ignore[assignment]


def only_replicas_loopback() -> None:
    """The servers of the replicas; the gRPC proxy listens on all interfaces (--public)."""
    from ray._common import tls_utils

    add_port: Any = tls_utils.add_port_to_grpc_server

    def add_port_to_grpc_server(server: Any, address: str) -> Any:
        return add_port(server, _here(address) if address.startswith("[::]:") else address)

    tls_utils.add_port_to_grpc_server = add_port_to_grpc_server  # before replica.py takes it


def _here(address: str) -> str:
    return f"127.0.0.1:{address.rpartition(':')[2]}"
