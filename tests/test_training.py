"""Learning rates by hand, random streams that never meet, checkpoints of another run."""

from __future__ import annotations

import pytest
import torch

from accord.errors import ConfigError
from accord.training import generator_for, refuse_another_run, scheduled_rate


def test_warm_up_then_constant() -> None:
    rates = [scheduled_rate(0.8, "constant", step, 10, warmup_steps=3) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_cosine_to_zero() -> None:
    rates = [scheduled_rate(1.0, "cosine", step, 8) for step in (0, 2, 4, 8, 9)]
    assert rates == pytest.approx([1.0, 0.853553, 0.5, 0.0, 0.0], abs=1e-6)


def test_streams_are_their_own_and_repeatable() -> None:
    streams = [(0,), (1,), (0, 1), (0, "head", 0), (0, "epoch", 0), (1, "head", 0)]
    first = [torch.rand(4, generator=generator_for(*stream)) for stream in streams]
    again = [torch.rand(4, generator=generator_for(*stream)) for stream in streams]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(values.tolist()) for values in first}) == len(streams)


def test_another_run_is_refused_by_name() -> None:
    refuse_another_run({"steps": 10, "seed": 1}, {"seed": 1, "steps": 10}, "here")
    with pytest.raises(ConfigError, match=r"here: .*seed \(1 -> 2\), steps \(10 -> None\)"):
        refuse_another_run({"steps": 10, "seed": 1}, {"seed": 2}, "here")
