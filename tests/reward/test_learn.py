"""The reward learner: it learns, any number of workers compute the same, a resumed run too."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from accord.errors import ArtifactError, ConfigError, FeedbackError
from accord.reward.data import RewardData
from accord.reward.learn import RewardConfig, RewardLearner, split

NUM_TEXTS, DIM = 6, 12


def make_data(num_images: int = 96, num_prompts: int = 4, seed: int = 0) -> RewardData:
    """Each image shows one of six things (noisily), and is good when that is what its prompt asks for."""
    generator = torch.Generator().manual_seed(seed)
    text_KD = F.normalize(torch.randn(NUM_TEXTS, DIM, generator=generator), dim=1)
    shown_N = torch.randint(NUM_TEXTS, (num_images,), generator=generator)
    wrong_N = (shown_N + torch.randint(1, NUM_TEXTS, (num_images,), generator=generator)) % NUM_TEXTS
    label_N = (torch.arange(num_images) % 2).float()
    asked_N = torch.where(label_N > 0.5, shown_N, wrong_N)
    noise_ND = 0.1 * torch.randn(num_images, DIM, generator=generator)
    shifts = torch.stack([torch.randperm(NUM_TEXTS - 1, generator=generator) + 1 for _ in range(num_images)])
    return RewardData(
        image_ND=F.normalize(text_KD[shown_N] + noise_ND, dim=1),
        text_KD=text_KD,
        text_index_N=asked_N,
        label_N=label_N,
        weight_N=torch.ones(num_images),
        category_N=("count",) * num_images,
        contrast_index_NM=(asked_N[:, None] + shifts[:, : num_prompts - 1]) % NUM_TEXTS,
    )


def make_config(**changes: Any) -> RewardConfig:
    values: dict[str, Any] = {
        "hidden_size": 16,
        "num_prompts": 4,
        "steps": 60,
        "batch_size": 10,
        "learning_rate": 1e-2,
        "validation_fraction": 0.25,
    }
    return RewardConfig.model_validate(values | changes)


def train(learner: RewardLearner, steps: int) -> list[float]:
    return [learner.step()["loss"].item() for _ in range(steps)]


def weights(learner: RewardLearner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in learner.head.parameters()]


@pytest.mark.parametrize("combine", ["concat", "concat_product"])
def test_learns_a_separable_set_and_does_well_on_held_out_images(combine: str) -> None:
    data = make_data(256)
    learner = RewardLearner(
        data, make_config(combine=combine, steps=300, batch_size=64, hidden_size=64), seed=0
    )
    before = learner.validate()
    losses = train(learner, 300)
    after = learner.validate()
    # All labels met, and rewards of 1 for the true prompt and 0 for the three others: Eq. 1 goes no lower.
    floor = 0.5 * math.log(1 + 3 * math.exp(-1 / 2.0))
    assert losses[-1] == pytest.approx(floor, abs=0.01)
    assert losses[0] > floor + 0.3
    assert before["validation_accuracy"] < 0.8
    assert after["validation_accuracy"] > 0.9
    assert after["validation_mse"] < 0.08 < before["validation_mse"]


def test_auxiliary_loss_raises_the_probability_of_the_true_prompt() -> None:
    # One asked prompt only: the labels alone say nothing of the other prompts.
    data = make_data(128)
    learned = {}
    for auxiliary_weight in (0.0, 0.5):
        config = make_config(auxiliary_weight=auxiliary_weight, steps=80, batch_size=32)
        learner = RewardLearner(data, config, seed=0)
        start = learner.validate()["validation_prompt_probability"]
        train(learner, 80)
        learned[auxiliary_weight] = learner.validate()["validation_prompt_probability"]
        assert start == pytest.approx(0.25, abs=0.05)
    # With rewards in [0, 1] and T = 2 the most that four prompts allow is e^(1/2) / (e^(1/2) + 3) = 0.355.
    assert start < learned[0.0] < learned[0.5] < 0.355


def test_a_step_minimises_the_papers_loss_term_by_term() -> None:
    data, config = make_data(8), make_config(batch_size=8, validation_fraction=0.0)
    data = replace(data, weight_N=torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 1.0, 0.25]))
    learner = RewardLearner(data, config, seed=3)
    head, expected_mse, expected_ce, good_weight = learner.trained_head(), 0.0, 0.0, 0.0
    for n in range(8):  # the batch is the whole set, in whatever order
        weight, label = data.weight_N[n], data.label_N[n]
        reward = head(data.image_ND[n], data.text_KD[data.text_index_N[n]])
        expected_mse += float(weight * (label - reward) ** 2)
        if label > 0.5:
            others = [head(data.image_ND[n], data.text_KD[j]) for j in data.contrast_index_NM[n]]
            scores = torch.stack([reward, *others]) / 2.0
            expected_ce += float(weight * -torch.log(scores[0].exp() / scores.exp().sum()))
            good_weight += float(weight)
    expected_mse, expected_ce = expected_mse / float(data.weight_N.sum()), expected_ce / good_weight
    metrics = learner.backward()
    assert metrics["mse"].item() == pytest.approx(expected_mse, rel=1e-5)
    assert metrics["prompt_classification"].item() == pytest.approx(expected_ce, rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(expected_mse + 0.5 * expected_ce, rel=1e-5)


def test_without_auxiliary_loss_the_wrong_prompts_play_no_part() -> None:
    data, config = make_data(), make_config(auxiliary_weight=0.0)
    first = RewardLearner(data, config, seed=0)
    other = replace(data, contrast_index_NM=data.contrast_index_NM.flip(0))
    second = RewardLearner(other, config, seed=0)
    assert train(first, 5) == train(second, 5)
    assert first.step()["prompt_classification"].item() == 0.0


def test_every_image_is_drawn_once_an_epoch() -> None:
    learner = RewardLearner(make_data(), make_config(batch_size=7), seed=0)
    size = len(learner.train_indices)
    drawn = torch.cat([learner._draw(step).image_index_B for step in range(2 * size)])
    for epoch in range(14):
        assert torch.equal(drawn[epoch * size : (epoch + 1) * size].sort().values, learner.train_indices)
    assert not torch.equal(drawn[:size], drawn[size : 2 * size])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_together_equal_one(world_size: int, dropout: float) -> None:
    data, config = make_data(), make_config(batch_size=11, dropout=dropout)
    data = replace(data, weight_N=torch.linspace(0.5, 2.0, 96))
    alone = RewardLearner(data, config, seed=1)
    team = [RewardLearner(data, config, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(5):
        expected = alone.backward()
        parts = [worker.backward() for worker in team]
        assert sum(part["loss"].item() for part in parts) == pytest.approx(expected["loss"].item(), rel=1e-5)
        columns = list(zip(*(worker.head.parameters() for worker in team), strict=True))
        for single, column in zip(alone.head.parameters(), columns, strict=True):
            # What DistributedDataParallel does: the mean over the workers.
            gradients = [parameter.grad for parameter in column]
            mean = torch.stack([gradient for gradient in gradients if gradient is not None]).mean(dim=0)
            assert single.grad is not None
            assert torch.allclose(mean, single.grad, atol=1e-6)
            for parameter in column:
                parameter.grad = single.grad.clone()
        for learner in (alone, *team):
            learner.update()


def test_wrap_is_what_the_forward_pass_goes_through() -> None:
    calls = []

    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *inputs: Any) -> Any:
            calls.append(1)
            return self.inner(*inputs)

    wrapped = RewardLearner(make_data(), make_config(), seed=0, wrap=Wrapped)
    plain = RewardLearner(make_data(), make_config(), seed=0)
    assert train(wrapped, 3) == train(plain, 3)
    assert len(calls) == 3  # once a step: a distributed wrapper needs exactly one


def test_same_seed_same_bytes_other_seed_other_weights(tmp_path: Path) -> None:
    learners = [RewardLearner(make_data(), make_config(dropout=0.2), seed=seed) for seed in (0, 0, 1)]
    for learner in learners:
        torch.rand(3)  # whatever else draws from torch's global generator
        train(learner, 5)
    digests = [learner.save(tmp_path / str(i)).files for i, learner in enumerate(learners)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("after", [0, 4])
def test_resume_is_bit_identical(tmp_path: Path, after: int, dropout: float) -> None:
    config = make_config(dropout=dropout)
    through = RewardLearner(make_data(), config, seed=0)
    losses = train(through, 9)
    stopped = RewardLearner(make_data(), config, seed=0)
    train(stopped, after)
    stopped.save(tmp_path / "checkpoint")
    resumed = RewardLearner(make_data(), config, seed=0)
    resumed.load(tmp_path / "checkpoint")
    assert resumed.step_index == after
    assert train(resumed, 9 - after) == losses[after:]
    assert all(torch.equal(a, b) for a, b in zip(weights(through), weights(resumed), strict=True))
    assert through.save(tmp_path / "a").digest == resumed.save(tmp_path / "b").digest


def test_checkpoint_goes_on_with_other_reporting_but_no_other_run(tmp_path: Path) -> None:
    learner = RewardLearner(make_data(), make_config(), seed=0)
    train(learner, 2)
    learner.save(tmp_path / "checkpoint")
    RewardLearner(make_data(), make_config(log_every=1), seed=0).load(tmp_path / "checkpoint")
    others: list[tuple[str, Callable[[], RewardLearner]]] = [
        (
            r"temperature \(2.0 -> 1.0\)",
            lambda: RewardLearner(make_data(), make_config(temperature=1.0), seed=0),
        ),
        (r"seed \(0 -> 5\)", lambda: RewardLearner(make_data(), make_config(), seed=5)),
        ("data", lambda: RewardLearner(make_data(seed=9), make_config(), seed=0)),
    ]
    for message, other in others:
        with pytest.raises(ConfigError, match=message):
            other().load(tmp_path / "checkpoint")


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    learner = RewardLearner(make_data(), make_config(), seed=0)
    learner.save(tmp_path / "checkpoint")
    state = tmp_path / "checkpoint" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="changed or damaged"):
        learner.load(tmp_path / "checkpoint")


def test_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    learner = RewardLearner(make_data(), make_config(), seed=0)
    train(learner, 1)
    manifest = learner.save(tmp_path / "checkpoint")
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        "manifest.json",
        "state.safetensors",
    ]
    assert manifest.config["step"] == 1
    assert json.loads((tmp_path / "checkpoint" / "manifest.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.ones(96), "96 good images and no bad one"),
        (torch.zeros(96), "96 bad images and no good one"),
    ],
)
def test_one_kind_of_label_is_refused(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(FeedbackError, match=message):
        RewardLearner(replace(make_data(), label_N=labels), make_config(), seed=0)


def test_empty_data_is_refused() -> None:
    whole = make_data()
    nothing = RewardData(
        image_ND=whole.image_ND[:0],
        text_KD=whole.text_KD,
        text_index_N=whole.text_index_N[:0],
        label_N=whole.label_N[:0],
        weight_N=whole.weight_N[:0],
        category_N=(),
        contrast_index_NM=whole.contrast_index_NM[:0],
    )
    with pytest.raises(FeedbackError, match="no labelled image"):
        RewardLearner(nothing, make_config(), seed=0)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"num_prompts": 5}, 1, "num_prompts is 5, but the data has 3 wrong"),
        ({"batch_size": 2}, 3, "a batch of 2 images is too small for 3 workers"),
    ],
)
def test_configs_that_do_not_fit(changes: dict[str, int], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardLearner(make_data(), make_config(**changes), seed=0, world_size=world_size)


def test_rows_of_another_number_and_bad_weights_are_refused() -> None:
    data = make_data()
    with pytest.raises(ConfigError, match="96 labels, but"):
        RewardLearner(replace(data, weight_N=torch.ones(95)), make_config(), seed=0)
    with pytest.raises(ConfigError, match="finite and at least 0"):
        RewardLearner(replace(data, weight_N=torch.full((96,), -1.0)), make_config(), seed=0)


def test_split_takes_its_share_of_good_and_bad() -> None:
    label_N = torch.tensor([1.0] * 20 + [0.0] * 40)
    train_N, validation_N = split(label_N, 0.25, seed=0)
    assert sorted([*train_N.tolist(), *validation_N.tolist()]) == list(range(60))
    assert int(label_N[validation_N].sum()) == 5
    assert len(validation_N) == 15
    assert torch.equal(validation_N, split(label_N, 0.25, seed=0)[1])
    assert not torch.equal(validation_N, split(label_N, 0.25, seed=1)[1])
    assert len(split(torch.tensor([1.0, 0.0]), 0.5, seed=0)[0]) == 2  # one of a kind is trained on


def test_calibration_needs_validation_images() -> None:
    trained = RewardLearner(make_data(), make_config(), seed=0)
    train(trained, 20)
    platt = trained.calibration()
    assert platt is not None
    assert platt.slope > 0
    without = RewardLearner(make_data(), make_config(validation_fraction=0.0), seed=0)
    assert without.calibration() is None
    assert without.validate() == {}


def test_trained_head_is_a_frozen_copy() -> None:
    learner = RewardLearner(make_data(), make_config(), seed=0)
    head = learner.trained_head()
    before = [parameter.clone() for parameter in head.parameters()]
    train(learner, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in head.parameters())


@pytest.mark.parametrize("method", ["platt", "temperature"])
def test_calibration_looks_at_validation_images_only(method: str) -> None:
    learner = RewardLearner(make_data(256), make_config(calibration=method), seed=0)
    train(learner, 20)
    before, report = learner.calibration(), learner.calibration_report()
    assert before is not None
    assert report is not None
    assert report["images"] == len(learner.validation_indices)
    assert (report["method"], report["slope"], report["intercept"]) == (
        method,
        before.slope,
        before.intercept,
    )
    learner.label_N[learner.train_indices] = 1 - learner.label_N[learner.train_indices]
    assert learner.calibration() == before
    learner.label_N[learner.validation_indices[::3]] = 1 - learner.label_N[learner.validation_indices[::3]]
    assert learner.calibration() != before
