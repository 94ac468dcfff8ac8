"""The reward r(image, prompt): learned from people's judgements on top of a frozen CLIP.

features.py     images and prompts -> CLIP features, computed once and cached
head.py         features -> reward, a small MLP
losses.py       the paper's mathematics, free of plumbing (Eq. 1)
data.py         a feedback snapshot as tensors
learn.py        the optimisation loop's body: one `step`, everything resumable
calibration.py  how far a reward can be read as a probability
model.py        the reward model as an artifact: load, save, score
settings.py     the typed config, importable without torch
"""
