"""Text-to-image diffusion: load and save a model directory, sample, encode once, fine-tune.

model.py       a StableDiffusionPipeline directory as one object
sample.py      prompts and seeds -> images, with any diffusers scheduler
encode.py      prompts -> text states, images -> latents (both done once, before fine-tuning)
objectives.py  the paper's mathematics, free of plumbing
finetune.py    the optimisation loop's body: one `step`, everything resumable
checkpoint.py  the fine-tuner's state on disk: all or nothing
settings.py    the typed configs, importable without torch
"""
