"""A scorer that asks a gateway's RewardService, over gRPC: a reward that lives elsewhere, such as on a GPU.

In a recipe:

    rewards:
      - {scorer: "accord.reward.remote:remote", options: {target: "grpcs://rewards.example.org:443"}}

gRPC is imported only when a scorer is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from accord.errors import ConfigError
from accord.images import Pixels, encode_png

Output = Literal["reward", "prompt_probability", "clip_similarity"]


def remote(
    *,
    target: str | None = None,
    reward_model: str = "",
    output: Output = "reward",
    token_file: str | None = None,
    timeout_s: float = 120.0,
) -> RemoteScorer:
    """A scorer by one reward model of a running gateway.

    Args:
        target: HOST:PORT, or grpcs://HOST:PORT for TLS; by default $ACCORD_ENDPOINT or localhost:9000.
        reward_model: an alias or a digest; empty for the gateway's default. What an alias means at the first
            call is what every later call asks for.
        output: which of the service's numbers: its reward, the probability of the prompt among its
            perturbations (TextNorm), or CLIP's similarity (which is in [-1, 1]: normalise it).
        token_file: the file of the bearer token; by default $ACCORD_TOKEN. A token itself never stands in a
            recipe, which is kept with every result.
        timeout_s: of a call with all its retries.

    Raises:
        ConfigError: an unknown output, or a target that cannot be.
    """
    if output not in get_args(Output):
        raise ConfigError(f"there is no output {output!r}; expected one of {', '.join(get_args(Output))}")
    from accord.client import Client

    return RemoteScorer(Client(target, token_file=token_file), reward_model, output, timeout_s)


class RemoteScorer:
    """Scores by `client`, an accord.client.Client, whose errors it lets through; see `remote`."""

    def __init__(self, client: Any, reward_model: str, output: Output, timeout_s: float) -> None:
        self._client, self._output, self._timeout_s = client, output, timeout_s
        self._asked, self.identity = reward_model, ""

    def score(self, images: Sequence[Pixels], prompts: Sequence[str]) -> Tensor:
        """score_B, float32 on the CPU.

        Raises:
            ClientError: the gateway cannot be reached, or refuses.
            ConfigError: the service has no probability for a prompt outside its grammar.
        """
        pairs = [(encode_png(image), prompt) for image, prompt in zip(images, prompts, strict=True)]
        found = self._client.score(
            pairs, reward_model=self.identity or self._asked, timeout_s=self._timeout_s
        )
        if found:
            self.identity = found[0].reward_model_digest
        values = [getattr(score, self._output) for score in found]
        if None in values:
            prompt = prompts[values.index(None)]
            raise ConfigError(
                f"{self._client} has no {self._output} for the prompt {prompt!r}: it is not of its grammar; "
                "ask for the output reward"
            )
        return torch.tensor(values, dtype=torch.float32)

    def close(self) -> None:
        """End the connection."""
        self._client.close()
