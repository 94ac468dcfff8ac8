"""The comparison of base, control and aligned model: pure, and the same numbers for the same seed.

plan.py            which prompts and seeds
protocols.py       what measures images, and who judges them
statistics.py      intervals, ranking quality
fidelity.py        Fréchet distance, KID, diversity
votes.py           raters' wins and losses
guidance.py        the frontier over guidance scales, each model's best one
bestof.py          best of n by reward
reward_quality.py  the reward against labels
summary.py         all of it as summary.json
verdict.py         what it says in plain sentences
config.py          the typed config of a recipe's `evaluate` section
report/            all of it for people
"""
