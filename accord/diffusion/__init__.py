"""Text-to-image diffusion: load and save a model directory, sample, encode once, fine-tune.

model.py       a StableDiffusionPipeline directory as one object
sample.py      prompts and seeds -> images, with any diffusers scheduler
engine.py      in-flight batching, which serves generations; of it are adapters.py (a model as the engine
               sees it), steppers.py (schedulers), batching.py (batches), decoding.py (the VAE's thread),
               ledger.py (counts), cuda.py and seeds.py; process_engine.py (with engine_child.py) is the
               same in a process of its own
encode.py      prompts -> text states, images -> latents (both done once, before fine-tuning)
objectives.py  the paper's mathematics, free of plumbing
finetune_data.py  what is learned from, checked; batches.py draws each step's batch of it from (seed, step)
trainable.py   the network that is trained: the whole UNet, or adapters in it; sharding.py spreads it (FSDP2)
finetune.py    the optimisation loop's body: one `step`, everything resumable
checkpoint.py  the fine-tuner's state on disk: all or nothing
settings.py    the typed configs, importable without torch
"""
