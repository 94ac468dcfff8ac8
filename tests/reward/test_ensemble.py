"""Ensembles of heads: each computes and learns what it would alone, and together they know their doubt."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accord.artifacts import load_tensors
from accord.reward.ensemble import HeadEnsemble, combined, make_head, resampling_weights, uncertainty
from accord.reward.features import ClipEncoder
from accord.reward.head import RewardHead
from accord.reward.learn import RewardLearner
from accord.reward.losses import reward_loss
from accord.reward.model import RewardModel
from accord.reward.settings import Combine
from accord.training import generator_for, scheduled_rate
from tests.reward.test_learn import DIM, make_config, make_data, train
from tests.tiny_clip import tiny_clip_directory

COMBINES: list[Combine] = ["concat", "concat_product", "adapter"]


def heads(combine: Combine, count: int) -> list[RewardHead]:
    """Heads whose parameters are all random: an adapter's start at 0, and so does the last layer of
    others."""
    made = [RewardHead(DIM, 7, 2, combine) for _ in range(count)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for head in made:
            for parameter in head.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def features(count: int, seed: int = 1) -> Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("combine", COMBINES)
def test_an_ensemble_computes_what_its_heads_would(combine: Combine) -> None:
    alone = heads(combine, 3)
    together = HeadEnsemble(alone)
    image_PD, text_PD = features(5), features(5, seed=2)
    rewards_EP = together(image_PD, text_PD)
    expected_EP = torch.stack([head(image_PD, text_PD) for head in alone])
    assert expected_EP.std(dim=0).min() > 1e-3
    torch.testing.assert_close(rewards_EP, expected_EP)
    torch.testing.assert_close(together.member(1)(image_PD, text_PD), expected_EP[1])


def test_each_head_drops_units_of_its_own() -> None:
    alone = heads("concat", 2)
    masks = [
        torch.randint(0, 2, (2, 5, 7), generator=torch.Generator().manual_seed(n)).float() for n in (0, 1)
    ]
    image_PD, text_PD = features(5), features(5, seed=2)
    expected_EP = torch.stack(
        [head(image_PD, text_PD, [mask[number] for mask in masks]) for number, head in enumerate(alone)]
    )
    torch.testing.assert_close(HeadEnsemble(alone)(image_PD, text_PD, masks), expected_EP)


@pytest.mark.parametrize("combine", COMBINES)
def test_pairs_by_rows_have_the_rewards_of_pairs_in_full(combine: Combine) -> None:
    """Also in their gradients, and of an ensemble."""
    image_BD, text_KD = features(4), features(3, seed=2)
    image_P, text_P = torch.tensor([0, 1, 1, 3, 2, 0]), torch.tensor([2, 0, 1, 1, 2, 2])
    for head in (heads(combine, 1)[0], HeadEnsemble(heads(combine, 2))):
        gradients = []
        for rewards in (
            head(image_BD[image_P], text_KD[text_P]),
            head(image_BD, text_KD, None, (image_P, text_P)),
        ):
            head.zero_grad()
            (rewards**2).sum().backward()
            gradients.append([rewards.detach(), *(parameter.grad for parameter in head.parameters())])
        for full, by_rows in zip(*gradients, strict=True):
            torch.testing.assert_close(by_rows, full, atol=1e-5, rtol=1e-4)


def reference_training(learner: RewardLearner, steps: int) -> list[list[Tensor]]:
    """For each head of the learner: the parameters after `steps` steps by a plain loop over its pairs, on its
    own weights, and nothing of the learner's but its data and its order of images."""
    config, trained = learner.config, []
    for number in range(config.ensemble):
        head = RewardHead(
            DIM,
            config.hidden_size,
            config.layers,
            config.combine,
            generator_for(learner.seed, "head", number),
        )
        optimizer = torch.optim.AdamW(
            head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        weight_N = learner.weight_EN[number]
        for step in range(steps):
            drawn = learner._draw(step).image_index_B
            good = drawn[learner.label_N[drawn] > 0.5]
            good_B = torch.nonzero(learner.label_N[drawn] > 0.5).flatten()
            wrong_GM = learner.contrast_index_NM[good]
            images = torch.cat([drawn, good.repeat_interleave(wrong_GM.shape[1])])
            texts = torch.cat([learner.text_index_N[drawn], wrong_GM.flatten()])
            reward_P = head(learner.image_ND[images], learner.text_KD[texts])
            reward_B = reward_P[: len(drawn)]
            loss, _ = reward_loss(
                reward_B,
                learner.label_N[drawn],
                weight_N[drawn],
                torch.cat([reward_B[good_B, None], reward_P[len(drawn) :].reshape(len(good), -1)], dim=1),
                weight_N[good],
                temperature=config.temperature,
                auxiliary_weight=config.auxiliary_weight,
                weight_sum=float(weight_N[drawn].sum()),
                good_weight_sum=float(weight_N[good].sum()),
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for group in optimizer.param_groups:
                group["lr"] = scheduled_rate(config.learning_rate, config.schedule, step, config.steps)
            optimizer.step()
        trained.append([parameter.detach() for parameter in head.parameters()])
    return trained


@pytest.mark.parametrize("combine", COMBINES)
def test_a_single_head_learns_bit_for_bit_as_without_ensembles(combine: Combine) -> None:
    data = replace(make_data(), weight_N=torch.linspace(0.5, 2.0, 96))
    learner = RewardLearner(data, make_config(combine=combine), seed=3)
    (expected,) = reference_training(learner, 6)
    train(learner, 6)
    found = [parameter.detach() for parameter in learner.head.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("combine", ["concat", "adapter"])
def test_every_head_of_an_ensemble_learns_as_it_would_alone(combine: Combine) -> None:
    learner = RewardLearner(make_data(), make_config(combine=combine, ensemble=3), seed=3)
    expected = reference_training(learner, 6)
    train(learner, 6)
    assert isinstance(learner.head, HeadEnsemble)
    for number, parameters in enumerate(expected):
        for found, wanted in zip(learner.head.member(number).parameters(), parameters, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    first = next(iter(learner.head.parameters()))
    assert not torch.allclose(first[0], first[1], atol=1e-3), "heads are seeded apart"


def test_fast_learns_the_same_up_to_rounding() -> None:
    plain, fast = (
        RewardLearner(make_data(), make_config(fast=fast, dropout=0.2), seed=0) for fast in (False, True)
    )
    assert train(fast, 6) == pytest.approx(train(plain, 6), rel=1e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_half_precision_learns_about_the_same(size: int) -> None:
    plain, half = (
        RewardLearner(make_data(), make_config(precision=precision, fast=True, ensemble=size), seed=0)
        for precision in ("float32", "bfloat16")
    )
    expected = train(plain, 30)
    found = train(half, 30)
    assert found == pytest.approx(expected, rel=0.05)
    assert found != expected
    assert {parameter.dtype for parameter in half.head.parameters()} == {torch.float32}
    assert half.validate()["validation_mse"] == pytest.approx(plain.validate()["validation_mse"], abs=0.02)


def test_workers_together_equal_one_on_an_ensemble() -> None:
    data, config = make_data(), make_config(ensemble=2, dropout=0.3, batch_size=11)
    alone = RewardLearner(data, config, seed=1)
    team = [RewardLearner(data, config, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    expected = alone.backward()
    parts = [worker.backward() for worker in team]
    assert sum(part["loss"].item() for part in parts) == pytest.approx(expected["loss"].item(), rel=1e-5)
    for single, *column in zip(*(learner.head.parameters() for learner in (alone, *team)), strict=True):
        mean = torch.stack([parameter.grad for parameter in column]).mean(dim=0)  # type: ignore[misc]
        torch.testing.assert_close(mean, single.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("fast", [False, True])
def test_a_resumed_ensemble_is_bit_identical(tmp_path: Path, fast: bool) -> None:
    def make() -> RewardLearner:
        return RewardLearner(make_data(), make_config(ensemble=2, dropout=0.2, fast=fast), seed=0)

    through, stopped, resumed = make(), make(), make()
    losses = train(through, 8)
    train(stopped, 4)
    stopped.save(tmp_path / "checkpoint")
    resumed.load(tmp_path / "checkpoint")
    assert train(resumed, 4) == losses[4:]
    assert through.save(tmp_path / "a").digest == resumed.save(tmp_path / "b").digest


def test_the_reward_is_the_mean_less_the_penalised_doubt() -> None:
    reward_EP = torch.tensor([[0.2, 0.5, 0.0], [0.6, 0.5, 0.2]])
    std = 0.4 / 2**0.5
    assert combined(reward_EP).tolist() == pytest.approx([0.4, 0.5, 0.1])
    assert combined(reward_EP, 0.5).tolist() == pytest.approx([0.4 - 0.5 * std, 0.5, 0.1 - 0.25 * std])
    assert combined(reward_EP, 2.0).tolist() == pytest.approx([0.0, 0.5, 0.0])  # a reward is at least 0
    assert uncertainty(reward_EP).tolist() == pytest.approx([std, 0.0, std / 2])
    assert combined(reward_EP[:1]) is not None
    assert torch.equal(combined(reward_EP[:1]), reward_EP[0])
    assert uncertainty(reward_EP[:1]).isnan().all()


def test_heads_weigh_the_judgements_each_in_its_own_way() -> None:
    assert torch.equal(resampling_weights(1, 5, seed=0), torch.ones(1, 5))
    weight_EN = resampling_weights(4, 2000, seed=0)
    assert (weight_EN > 0).all()
    assert weight_EN.mean(dim=1).tolist() == pytest.approx([1.0] * 4, abs=0.1)
    assert torch.corrcoef(weight_EN).triu(1).abs().max() < 0.1
    assert torch.equal(weight_EN[:2], resampling_weights(2, 2000, seed=0))


@pytest.mark.parametrize("combine", ["concat", "adapter"])
def test_doubt_is_greater_where_nothing_was_learned(combine: Combine) -> None:
    """Judgements on six prompts say little of others: there the heads differ more."""
    learner = RewardLearner(
        make_data(128), make_config(combine=combine, ensemble=5, steps=150, batch_size=32), seed=0
    )
    train(learner, 150)
    head = learner.trained_head()
    with torch.inference_mode():
        known = head(learner.image_ND, learner.text_KD[learner.text_index_N])
        other = head(features(128, seed=8), features(128, seed=9))
    assert uncertainty(other).mean() > 1.5 * uncertainty(known).mean()


@pytest.fixture(scope="module")
def encoder(session_dir: Path) -> ClipEncoder:
    return ClipEncoder(tiny_clip_directory(session_dir / "clip of ensembles"))


def random_head(dim: int, size: int) -> Any:
    head = make_head(dim, 8, 2, "concat", size, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return head


def test_an_ensemble_is_an_artifact(encoder: ClipEncoder, tmp_path: Path) -> None:
    model = RewardModel(random_head(encoder.dim, 3), encoder, uncertainty_penalty=0.5)
    model.save(tmp_path / "reward", inputs={}, config={}, seed=0)
    loaded = RewardModel.load(tmp_path / "reward", clip=encoder)
    assert (loaded.size, loaded.uncertainty_penalty) == (3, 0.5)
    image_BD, text_BD = torch.randn(2, 6, encoder.dim, generator=torch.Generator().manual_seed(0))
    reward_B, doubt_B = loaded.score_and_doubt(image_BD, text_BD)
    assert torch.equal(reward_B, model.score_features(image_BD, text_BD))
    assert doubt_B.min() > 0
    heads_EB = torch.stack([model.head.member(n)(image_BD, text_BD) for n in range(3)])  # type: ignore[union-attr]
    torch.testing.assert_close(
        reward_B, (heads_EB.mean(0) - 0.5 * heads_EB.std(0)).clamp_min(0).detach(), atol=1e-6, rtol=1e-5
    )
    assert load_tensors(tmp_path / "reward" / "head.safetensors")["stacked.linears.0.weight"].shape[0] == 3


def test_a_single_head_is_saved_as_ever(encoder: ClipEncoder, tmp_path: Path) -> None:
    model = RewardModel(random_head(encoder.dim, 1), encoder)
    model.save(tmp_path / "reward", inputs={}, config={}, seed=0)
    assert "ensemble" not in (tmp_path / "reward" / "config.json").read_text()
    image_BD, text_BD = torch.randn(2, 6, encoder.dim, generator=torch.Generator().manual_seed(0))
    reward_B, doubt_B = model.score_and_doubt(image_BD, text_BD)
    assert torch.equal(reward_B, model.head(image_BD, text_BD))
    assert doubt_B.isnan().all()
