"""A deployment in a process of its own, which answers a line of JSON for each question about its inside."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from accord.config import validate
from services.config import APP_NAME, GATEWAY, GENERATION, LIMITER, REWARD, ServeConfig
from services.local import serving


def answer(question: str, argument: Any) -> Any:
    from ray import serve

    from services.app import application

    def ask(deployment: str, method: str) -> Any:
        handle = serve.get_deployment_handle(deployment, APP_NAME)
        return getattr(handle, method).remote().result(timeout_s=120)

    if question == "engine":
        return ask(GENERATION, "stats")
    if question == "process":
        return {"reward": lambda: ask(REWARD, "process_id"), "gateway": lambda: ask(GATEWAY, "process_id")}[
            argument
        ]()
    if question == "in_use":
        return ask(LIMITER, "in_use")
    if question == "deploy":
        serve.run(
            application(validate(ServeConfig, argument, "test"), versioned=True),
            name=APP_NAME,
            blocking=False,
        )
        return None
    if question == "settled":
        return ask(GENERATION, "settled")
    if question == "replicas":
        deployments = serve.status().applications[APP_NAME].deployments
        return {name: dict(status.replica_states) for name, status in deployments.items()}
    raise ValueError(question)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints must not come between
    config = validate(ServeConfig, json.loads(sys.stdin.readline()), "test")
    tokens, secret = sys.argv[1:]
    with serving(config, tokens_path=tokens, secret_path=secret) as endpoint:
        print(
            json.dumps({"address": endpoint.address, "metrics": endpoint.metrics_address}),
            file=replies,
            flush=True,
        )
        for line in sys.stdin:
            question, argument = json.loads(line)
            try:
                reply = {"value": answer(question, argument)}
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply, default=str), file=replies, flush=True)


if __name__ == "__main__":
    main()
