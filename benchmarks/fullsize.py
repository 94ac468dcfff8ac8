"""SD 1.5's real architecture with random weights through everything, on a CPU, each part in a process of its
own: loads and collects; fine-tunes a step with LoRA and in full (EMA off), saves, resumes, hands on a model;
serves it.

    python -m benchmarks.fullsize --directory /somewhere/with/30/GB

Prints what each part took of memory and time. A part that the free memory has no room for is left out, and
the status is then 1.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from accord.artifacts import load_tensors, save_tensors
from accord.diffusion.checkpoint import put_trained
from accord.diffusion.conditioning import encode_conditioning
from accord.diffusion.encode import encode_images
from accord.diffusion.engine import Engine, EngineConfig, SampleSpec
from accord.diffusion.finetune import FinetuneConfig, FinetuneData, Finetuner
from accord.diffusion.model import load_diffusion_model, save_diffusion_model
from accord.diffusion.sample import SamplerConfig, sample_images
from accord.doctor import machine
from accord.doctor.report import in_words
from benchmarks.random_models import write_random_model
from benchmarks.tables import describe, table

PARTS = ("collect", "lora", "lora-resume", "full", "full-resume", "serve")
# What a part was measured to take, and some more; it is not begun with less.
NEEDS = {"collect": 6e9, "lora": 6e9, "lora-resume": 6.5e9, "full": 16e9, "full-resume": 19.5e9, "serve": 6e9}
PROMPTS = ["two red stars on grass", "a blue heart in the sky"]
LIMIT_BYTES = 22e9


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, help="where weights and checkpoints lie; default: temporary"
    )
    parser.add_argument("--size", type=int, default=128, help="pixels, height and width")
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="several times, in order; default: all"
    )
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(arguments)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        arguments.directory = arguments.directory or Path(temporary)
        write_random_model("sd15", arguments.directory / "base")
        rows = [run_part(part, arguments) for part in arguments.part or PARTS]
    print(table(["part", "peak memory", "seconds", ""], rows))
    print(describe("cpu"))
    return 1 if any("left out" in row[-1] or "MORE" in row[-1] for row in rows) else 0


def run_part(part: str, arguments: argparse.Namespace) -> list[str]:
    free = machine.available_memory()
    if free < NEEDS[part]:
        return [part, "", "", f"left out: {in_words(free)} free, needs {in_words(NEEDS[part])}"]
    command = [sys.executable, "-m", "benchmarks.fullsize", "--one", part]
    command += ["--directory", str(arguments.directory), "--size", str(arguments.size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    words = found["words"] if found["peak"] <= LIMIT_BYTES else f"MORE than {in_words(LIMIT_BYTES)}"
    print(f"{part}: {in_words(found['peak'])}, {found['seconds']:.0f} s, {words}", flush=True)
    return [part, in_words(found["peak"]), f"{found['seconds']:.0f}", words]


def run_one(arguments: argparse.Namespace) -> dict[str, Any]:
    work: dict[str, Callable[[Path, int], str]] = {
        "collect": collect,
        "lora": lambda directory, size: train(directory, "lora"),
        "lora-resume": lambda directory, size: resume(directory, "lora"),
        "full": lambda directory, size: train(directory, "full"),
        "full-resume": lambda directory, size: resume(directory, "full"),
        "serve": serve,
    }
    started_s = time.perf_counter()
    words = work[arguments.one](arguments.directory, arguments.size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "seconds": time.perf_counter() - started_s, "words": words}


def collect(directory: Path, size: int) -> str:
    """Images, then their latents and texts, in files."""
    model = load_diffusion_model(directory / "base")
    sampler = SamplerConfig(steps=3, guidance_scale=5.0, height=size, width=size)
    images_BHWC = sample_images(model, PROMPTS, [1, 2], sampler)
    prompts, empty = encode_conditioning(model, PROMPTS), encode_conditioning(model, [""], negative=True)
    save_tensors(
        directory / "data.safetensors",
        {
            "latents_NCHW": encode_images(model, images_BHWC),
            "text_index_N": torch.tensor([0, 1]),
            "reward_N": torch.tensor([1.0, 0.5]),
            "pretraining_latents_MCHW": torch.zeros(0, 4, size // 8, size // 8),
            "pretraining_text_index_M": torch.zeros(0, dtype=torch.long),
            "pretraining_reward_M": torch.zeros(0),
            "text_KTD": prompts["states"],
            "empty_text_TD": empty["states"][0],
        },
    )
    return f"{len(images_BHWC)} images, values {images_BHWC.min()} to {images_BHWC.max()}"


def learner(directory: Path, parameters: Literal["full", "lora"]) -> Finetuner:
    config = FinetuneConfig(
        steps=2,
        batch_size=2,
        pretraining_batch_size=0,
        beta=0.0,
        ema_decay=0.0,
        parameters=parameters,
        learning_rate=1e-4,
    )
    data = FinetuneData(**load_tensors(directory / "data.safetensors"))
    return Finetuner(load_diffusion_model(directory / "base"), data, config, seed=0)


def train(directory: Path, parameters: Literal["full", "lora"]) -> str:
    tuner = learner(directory, parameters)
    loss = float(tuner.step()["loss"])
    tuner.save(directory / f"checkpoint-{parameters}")
    return f"loss {loss:.4f}, saved"


def resume(directory: Path, parameters: Literal["full", "lora"]) -> str:
    """Goes on from the checkpoint to the next, and hands on a model, as a run does."""
    checkpoint = directory / f"checkpoint-{parameters}"
    tuner = learner(directory, parameters)
    tuner.load(checkpoint)
    loss = float(tuner.step()["loss"])
    tuner.save(checkpoint)
    config = tuner.config
    del tuner
    model = load_diffusion_model(directory / "base")
    put_trained(model.unet, checkpoint, model.digest, config)
    save_diffusion_model(model, directory / "aligned", inputs={}, config={}, seed=0)
    shutil.rmtree(checkpoint)
    return f"step 2 of 2, loss {loss:.4f}, model saved"


def serve(directory: Path, size: int) -> str:
    """The engine draws with the model that was handed on: alone and in a batch, the same."""
    model = load_diffusion_model(directory / "aligned")
    specs = [
        SampleSpec("aligned", prompt, seed, 3, 5.0, "DPMSolverMultistepScheduler", size, size)
        for seed, prompt in enumerate(PROMPTS)
    ]
    with Engine(EngineConfig(max_batch=4)) as engine:
        engine.load("aligned", model)
        alone = [engine.submit(spec).future.result() for spec in specs]
        tickets = [engine.submit(spec) for spec in specs]
        together = [ticket.future.result() for ticket in tickets]
    worst = max(
        int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(alone, together, strict=True)
    )
    return f"4 images; alone and together differ by {worst}/255 at most"


if __name__ == "__main__":
    sys.exit(main())
