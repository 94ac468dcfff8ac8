"""What the path costs: ScoreImages of a batch of pairs against the reward model in this process, called
without and with the memory for text features that the service has.

python -m benchmarks.scoring --pairs 64 --repeats 15
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from accord.cpu import use_cpu
from accord.images import encode_png
from accord.prompts import load_grammar
from accord.shapes.scene import random_scene, render
from accord.v1 import reward_pb2
from benchmarks.remote import Client, started
from benchmarks.rivals import Settings
from benchmarks.tables import describe, spread, table, write_json
from benchmarks.traffic import PROMPTS

MODEL = "pkg://accord.shapes/weights/diffusion"
REWARD = "pkg://accord.shapes/weights/clip"


def main(
    reward: Annotated[
        str, typer.Option(help="The reward model's directory; it must be the server's.")
    ] = REWARD,
    pairs: Annotated[int, typer.Option(help="In a request.")] = 64,
    repeats: Annotated[int, typer.Option(help="Calls of each, in turn.")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Where to write all numbers.")] = None,
) -> None:
    """Prints a Markdown table: milliseconds for a batch, all ways, and the ratio."""
    from accord.reward.model import open_reward
    from services.reward.messages import ScoreRequest, Scores
    from services.reward.scoring import Perturbations, ServedReward, score_all

    use_cpu(threads)
    random = np.random.default_rng(0)
    images = [render(random_scene(random)) for _ in range(pairs)]
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(pairs)]
    model, perturbations = open_reward(reward), Perturbations(load_grammar("shapes"), 10)
    asked = ScoreRequest(model.digest, tuple(images), tuple(prompts), True)
    message = reward_pb2.ScoreImagesRequest(
        pairs=[
            reward_pb2.ImagePrompt(image=encode_png(image), prompt=prompt)
            for image, prompt in zip(images, prompts, strict=True)
        ]
    )
    with started("accord", Settings(MODEL, threads=threads)) as remote:
        client = Client(remote)

        def served() -> None:
            answer = client.reward.ScoreImages(message, metadata=remote.metadata(), timeout=120)
            if len(answer.scores) != pairs:
                raise SystemExit(f"asked for {pairs} scores, got {len(answer.scores)}")

        def direct(kept: ServedReward) -> Callable[[], None]:
            return lambda: assert_scored(score_all([(kept, asked)], perturbations))

        def assert_scored(scores: list[Scores]) -> None:
            if len(scores[0].rewards) != pairs:
                raise SystemExit(f"asked for {pairs} scores, got {len(scores[0].rewards)}")

        calls: dict[str, Callable[[], None]] = {
            "direct": direct(ServedReward(model, text_cache_size=0)),
            "direct, texts known": direct(ServedReward(model)),
            "served": served,
        }
        times_ms: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(repeats + 2):
            for name, call in calls.items():
                begun_s = time.perf_counter()
                call()
                if repeat >= 2:  # the first ones warm up
                    times_ms[name].append(1e3 * (time.perf_counter() - begun_s))
            print(f"{repeat + 1} of {repeats + 2}", file=sys.stderr)
        client.close()
    print(f"\n{describe('cpu')}; {pairs} pairs of {' x '.join(map(str, images[0].shape[:2]))} pixels\n")
    rows = [
        [name, spread(times), spread([s / t for s, t in zip(times_ms["served"], times, strict=True)])]
        for name, times in times_ms.items()
    ]
    print(table(["", "ms", "served takes as long, times"], rows))
    write_json(json, "cpu", {"pairs": pairs, "repeats": repeats}, times_ms)


if __name__ == "__main__":
    typer.run(main)
