"""What Serve's gRPC proxy is told to serve: the services' methods, with requests handed on as bytes.

The generated `add_..._to_server` would parse a request in the proxy, where bytes that are no message end as
an INTERNAL with a text of grpc's own. Handed on as bytes they are parsed in the gateway, which answers
INVALID_ARGUMENT.
"""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from accord.v1 import generation_pb2, reward_pb2


def add_generation(servicer: Any, server: Any) -> None:
    _add(generation_pb2.DESCRIPTOR.services_by_name["GenerationService"], servicer, server)


def add_reward(servicer: Any, server: Any) -> None:
    _add(reward_pb2.DESCRIPTOR.services_by_name["RewardService"], servicer, server)


def add_health(servicer: Any, server: Any) -> None:
    _add(health_pb2.DESCRIPTOR.services_by_name["Health"], servicer, server)


def _add(service: Any, servicer: Any, server: Any) -> None:
    handlers = {}
    for method in service.methods:
        streams = bool(method.server_streaming)
        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = make(getattr(servicer, method.name))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
