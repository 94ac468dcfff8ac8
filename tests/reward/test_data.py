from collections.abc import Sequence

import pandas as pd
import pytest
import torch
from torch import Tensor

from accord.errors import FeedbackError, PromptError
from accord.prompts import Split, load_grammar
from accord.reward.data import RewardData, build_reward_data

GRAMMAR = load_grammar("shapes")


def snapshot(labels: Sequence[float | None]) -> pd.DataFrame:
    prompts = GRAMMAR.all_prompts(split=Split.SEEN)[::7][: len(labels)]
    return pd.DataFrame(
        {
            "image": [f"image{i}" for i in range(len(labels))],
            "prompt": [prompt.text for prompt in prompts],
            "category": [str(prompt.category) for prompt in prompts],
            "split": "seen",
            "label": pd.Series(labels, dtype="float64"),
            "weight": [1.0 + i for i in range(len(labels))],
        }
    )


def image_features(digests: Sequence[str]) -> Tensor:
    return torch.tensor([[float(digest.removeprefix("image")), 1.0] for digest in digests])


def text_features(texts: Sequence[str]) -> Tensor:
    return torch.tensor([[float(len(text)), -1.0] for text in texts])


def build(frame: pd.DataFrame, seed: int = 0, num_prompts: int = 4) -> RewardData:
    return build_reward_data(
        frame,
        GRAMMAR,
        image_features=image_features,
        text_features=text_features,
        num_prompts=num_prompts,
        seed=seed,
    )


def test_rows_keep_their_order_and_unlabelled_ones_are_left_out() -> None:
    frame = snapshot([1.0, None, 0.0, 1.0])
    data = build(frame)
    assert data.image_ND[:, 0].tolist() == [0.0, 2.0, 3.0]
    assert data.label_N.tolist() == [1.0, 0.0, 1.0]
    assert data.weight_N.tolist() == [1.0, 3.0, 4.0]
    assert list(data.category_N) == [frame["category"][i] for i in (0, 2, 3)]
    lengths = [len(frame["prompt"][i]) for i in (0, 2, 3)]
    assert data.text_KD[data.text_index_N, 0].tolist() == lengths


def test_each_image_has_wrong_prompts_that_differ_from_the_right_one() -> None:
    seen: list[str] = []

    def recorded(texts: Sequence[str]) -> Tensor:
        seen.extend(texts)
        return text_features(texts)

    frame = snapshot([1.0, 0.0] * 10)
    data = build_reward_data(
        frame, GRAMMAR, image_features=image_features, text_features=recorded, num_prompts=10, seed=0
    )
    assert len(set(seen)) == len(seen) == len(data.text_KD)  # every prompt is encoded once
    assert data.contrast_index_NM.shape == (20, 9)
    for prompt, wrong in zip(frame["prompt"], data.contrast_index_NM.tolist(), strict=True):
        texts = [seen[index] for index in wrong]
        assert len({prompt, *texts}) == 10
        assert all(GRAMMAR.parse(text).split is Split.SEEN for text in texts)


def test_wrong_prompts_depend_on_seed_and_image_only() -> None:
    frame = snapshot([1.0, 0.0] * 4)
    assert build(frame).fingerprint() == build(frame).fingerprint()
    assert build(frame).fingerprint() != build(frame, seed=1).fingerprint()
    fewer = build(frame[frame["image"] != "image0"])
    both = (data.text_KD[data.contrast_index_NM[-1]].tolist() for data in (build(frame), fewer))
    assert next(both) == next(both)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "holds no labelled image: judge"),
        ([None, None], r"no labelled image \(2 more have no majority, or only skips\)"),
        ([1.0, 1.0, None], r"2 good images and no bad one \(1 more"),
        ([0.0, 0.0, 0.0], "3 bad images and no good one"),
    ],
)
def test_labels_that_teach_nothing(labels: list[float | None], message: str) -> None:
    with pytest.raises(FeedbackError, match=message):
        build(snapshot(labels))


def test_prompt_outside_the_grammar_is_an_error() -> None:
    frame = snapshot([1.0, 0.0])
    frame.loc[1, "prompt"] = "a photo of a dog"
    with pytest.raises(PromptError, match="dog"):
        build(frame)
