"""A planted reward that loves saturation, on the sandbox's own weights: the guards stop it and say why."""

import pytest
import torch

from accord.guards.rule import decide
from accord.guards.settings import Bound, GuardsConfig
from benchmarks.guards import Plan, hack


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_reward_that_loves_saturation_is_stopped_and_the_log_says_why() -> None:
    torch.set_num_threads(1)
    plan = Plan(
        rounds=3, steps=16, prompts=12, batch_size=16, learning_rate=5e-4, guard_prompts=10, sampler_steps=5
    )
    log: list[str] = []
    outcome = hack(0, plan, GuardsConfig(every=16, patience=1), log.append)
    print("\n".join(log))  # shown where this fails
    before, after = outcome.at(0), outcome.at(48)
    # Without guards: the reward is had, and what the images were for is lost.
    assert after.mean("saturation") > before.mean("saturation") + 0.03
    assert after.mean("held_out") < before.mean("held_out") - 0.02
    assert after.mean("reference_distance") > before.mean("reference_distance") == 0.0
    # With guards: ended, with numbers, and what is kept was not worse than the base model.
    assert outcome.decision.tripped
    kept = outcome.at(outcome.decision.best_step)
    assert kept.mean("held_out") >= before.mean("held_out")
    (line,) = [line for line in log if "the guards stop it" in line]
    assert "the held-out reward fell by" in line
    assert "while the training reward rose by" in line
    # A bound on saturation alone would have said so too.
    bounded = GuardsConfig(every=16, patience=99, bounds={"saturation": Bound(most_ratio=1.05)})
    assert "its bound is 1.05 times" in decide(outcome.measured, bounded).reason
