import pytest
import torch

from accord.errors import ArtifactError
from accord.reward.head import RewardHead
from accord.reward.settings import RewardConfig


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_reward_lies_between_0_and_1_and_keeps_leading_dimensions() -> None:
    head = RewardHead(4, hidden=8, generator=generator())
    reward = head(torch.randn(5, 3, 4), torch.randn(5, 3, 4))
    assert reward.shape == (5, 3)
    assert reward.min() > 0
    assert reward.max() < 1


def test_computes_relu_layers_and_a_sigmoid() -> None:
    head = RewardHead(1, hidden=1, layers=1, combine="concat_product", generator=generator())
    with torch.no_grad():
        head.linears[0].weight.copy_(torch.tensor([[1.0, 2.0, 4.0]]))
        head.linears[0].bias.fill_(0.5)
        head.linears[1].weight.fill_(-2.0)
        head.linears[1].bias.fill_(1.0)
    image, text = torch.tensor([[0.5], [-1.0]]), torch.tensor([[0.25], [1.0]])
    # 0.5 + 2 * 0.25 + 4 * 0.125 + 0.5 = 2 -> 1 - 2 * 2 = -3 ; -1 + 2 - 4 + 0.5 < 0 -> relu 0 -> 1
    assert head.logits(image, text).tolist() == pytest.approx([-3.0, 1.0])
    assert head(image, text).tolist() == pytest.approx(torch.sigmoid(torch.tensor([-3.0, 1.0])).tolist())


@pytest.mark.parametrize(("combine", "inputs"), [("concat", 8), ("concat_product", 12)])
def test_combine_decides_what_the_first_layer_sees(combine: str, inputs: int) -> None:
    head = RewardHead(4, hidden=8, layers=2, combine=combine, generator=generator())  # type: ignore[arg-type]
    assert [tuple(linear.weight.shape) for linear in head.linears] == [(8, inputs), (8, 8), (1, 8)]


def test_initial_weights_come_from_the_generator_alone() -> None:
    torch.manual_seed(1)
    first = RewardHead(4, hidden=8, generator=generator())
    torch.manual_seed(2)
    second = RewardHead(4, hidden=8, generator=generator())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_masks_switch_hidden_units_off() -> None:
    head = RewardHead(4, hidden=8, layers=2, generator=generator())
    image, text = torch.randn(2, 4), torch.randn(2, 4)
    nothing = [torch.zeros(2, 8), torch.zeros(2, 8)]
    bias = head.linears[-1].bias.item()
    assert head.logits(image, text, nothing).tolist() == pytest.approx([bias, bias])


def test_features_of_another_clip_are_refused() -> None:
    with pytest.raises(ArtifactError, match="features of 4 numbers, got 6 for the image and 4"):
        RewardHead(4, hidden=8)(torch.randn(2, 6), torch.randn(2, 4))


def test_an_adapter_starts_as_clip_s_own_similarity() -> None:
    head = RewardHead(8, combine="adapter")
    image, text = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    torch.testing.assert_close(head.logits(image, text), 10 * (image * text).sum(-1) - 3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(0.1)
    by_hand = [
        11 * ((x + 0.01 * x.sum()) * (z + 0.01 * z.sum())).sum() + 0.5 * (x.sum() + z.sum()) - 2
        for x, z in zip(image, text, strict=True)
    ]
    torch.testing.assert_close(head.logits(image, text), torch.stack(by_hand))
    many = head(image[:, None], text[None])
    assert many.shape == (5, 5)
    torch.testing.assert_close(many.diagonal(), head(image, text))


def test_an_adapter_cannot_drop_units() -> None:
    with pytest.raises(ValueError, match=r"set dropout to 0, not 0\.3"):
        RewardConfig(combine="adapter", dropout=0.3)
