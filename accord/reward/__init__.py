"""The reward r(image, prompt): learned from people's judgements on top of a frozen CLIP.

features.py     images and prompts -> CLIP features, computed once and cached
head.py         features -> reward, a small MLP
ensemble.py     several heads at once, and their doubt
losses.py       the paper's mathematics, free of plumbing (Eq. 1)
data.py         a feedback snapshot as tensors
learn.py        the optimisation loop's body: one `step`, everything resumable
calibration.py  how far a reward can be read as a probability
model.py        the reward model as an artifact: load, save, score
textnorm.py     how far a reward stands above that of other prompts
scorers.py      the plug for other rewards, and the weighted mean of several
remote.py       a scorer behind a RewardService, over gRPC
settings.py     the typed config, importable without torch
"""
