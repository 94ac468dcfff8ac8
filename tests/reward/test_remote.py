"""The scorer that asks a RewardService: a real gRPC server on a real port."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from accord.client import ClientError
from accord.errors import ConfigError
from accord.images import decode_image, encode_png
from accord.reward.remote import RemoteScorer
from accord.reward.scorers import open_scorer, scores_of
from tests.client import server

PICTURES = list(np.random.default_rng(0).integers(0, 256, (300, 4, 4, 3), dtype=np.uint8))


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[server.Faulty]:
    for name in ("ACCORD_ENDPOINT", "ACCORD_CA_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCORD_HOME", str(tmp_path))
    monkeypatch.setenv("ACCORD_TOKEN", server.TOKEN)
    with server.serve() as servicer:
        yield servicer


def scorer_of(faulty: server.Faulty, **options: str) -> RemoteScorer:
    made = open_scorer("accord.reward.remote:remote", {"target": faulty.target, **options})
    assert isinstance(made, RemoteScorer)
    return made


def test_images_are_scored_where_the_reward_lives(faulty: server.Faulty) -> None:
    scorer = scorer_of(faulty, output="clip_similarity")
    prompts = [f"picture {n}" for n in range(300)]
    found = scores_of(scorer, "remote", PICTURES, prompts)
    expected = [len(encode_png(image)) / 100 for image in PICTURES]  # what this server says of an image
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    sent = [pair for request in faulty.requests for pair in request.pairs]
    assert [pair.prompt for pair in sent] == prompts
    assert np.array_equal(decode_image(sent[7].image), PICTURES[7])
    scorer.close()


def test_one_model_scores_all_whatever_its_alias_comes_to_mean(faulty: server.Faulty) -> None:
    scorer = scorer_of(faulty, reward_model="best")
    assert scorer.identity == ""
    assert scorer.score(PICTURES[:2], ["a star", "star"]).tolist() == [0.5, 0.5]
    assert scorer.identity == server.REWARD_MODEL
    scorer.score(PICTURES[:1], ["a star"])
    assert [request.reward_model for request in faulty.requests] == ["best", server.REWARD_MODEL]
    scorer.close()


def test_a_prompt_without_probability_is_named(faulty: server.Faulty) -> None:
    scorer = scorer_of(faulty, output="prompt_probability")
    assert scorer.score(PICTURES[:1], ["a star"]).tolist() == [0.25]
    with pytest.raises(ConfigError, match="has no prompt_probability for the prompt 'star'"):
        scorer.score(PICTURES[:2], ["a star", "star"])
    scorer.close()


def test_what_the_gateway_refuses_is_an_error_of_the_client(
    faulty: server.Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCORD_TOKEN", "another")
    scorer = scorer_of(faulty)
    with pytest.raises(ClientError, match="token"):
        scorer.score(PICTURES[:1], ["a star"])
    scorer.close()


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no output 'beauty'; expected one of reward,"):
        open_scorer("accord.reward.remote:remote", {"output": "beauty"})


def test_rewards_do_not_load_grpc_until_they_are_asked_for_over_it() -> None:
    program = (
        "import sys, accord.reward.remote, accord.reward.scorers, accord.reward.textnorm; "
        "sys.exit('grpc' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], stdin=subprocess.DEVNULL, timeout=300).returncode == 0
    )
