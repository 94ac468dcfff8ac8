"""The application: gateway, generation, reward and limiter, from one `ServeConfig`.

In a Serve config file: `import_path: services.app:build`, with `args: {environment: FILE}` or the config
itself as args.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from accord.config import load_yaml, validate
from services.config import GATEWAY, GENERATION, LIMITER, REWARD, ServeConfig
from services.gateway.ingress import Gateway
from services.gateway.limits import Limiter
from services.generation.deployment import Generation
from services.reward.deployment import Reward

# Ray's types of it take the decorator for a function.
deployment: Any = serve.deployment


def application(config: ServeConfig) -> Application:
    """All deployments, bound. Their code must be importable on every node."""
    generation = deployment(Generation).options(
        name=GENERATION,
        user_config=config.generation.user_config.model_dump(mode="json"),
        **config.generation.options(),
    )
    reward = deployment(Reward).options(
        name=REWARD,
        user_config=config.reward.user_config.model_dump(mode="json"),
        **config.reward.options(),
    )
    limiter = deployment(Limiter).options(
        name=LIMITER,
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        user_config=config.gateway.user_config.limits.model_dump(mode="json"),
    )
    gateway = deployment(Gateway).options(
        name=GATEWAY,
        user_config=config.gateway.user_config.model_dump(mode="json"),
        **config.gateway.options(),
    )
    app: Application = gateway.bind(
        generation.bind(config.generation.model_dump(mode="json")),
        reward.bind(config.reward.model_dump(mode="json")),
        limiter.bind(),
        config.gateway.model_dump(mode="json"),
    )
    return app


def build(args: dict[str, Any]) -> Application:
    """For `import_path`: args are {"environment": FILE} or the content of such a file."""
    if set(args) == {"environment"}:
        return application(load_yaml(ServeConfig, str(args["environment"])))
    return application(validate(ServeConfig, dict(args), "args of services.app:build"))
