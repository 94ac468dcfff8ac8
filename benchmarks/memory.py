"""`accord doctor`'s memory beside what is measured: real architectures, random weights, a process a case.

    python -m benchmarks.memory                       # SD 1.5: load, generate, LoRA and full fine-tuning
    python -m benchmarks.memory --model sdxl --dtype bfloat16 --case load --case generate

Measured is the highest resident memory of the process; the estimate begins with what Python and the libraries
take in that process before the model is there. A case that would not fit into the free memory is left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers  # noqa: F401 - in memory before it is measured
import open_clip  # noqa: F401
import torch

from accord.diffusion.conditioning import encode_conditioning
from accord.diffusion.finetune import FinetuneConfig, FinetuneData, Finetuner
from accord.diffusion.model import DiffusionModel, load_diffusion_model
from accord.diffusion.sample import SamplerConfig, sample_images
from accord.doctor import machine, memory
from accord.doctor.memory import DTYPES, Model, Need
from accord.doctor.report import in_words
from benchmarks.random_models import MODELS, write_random_model
from benchmarks.tables import describe, write_json

SPARE = 1.1
"""How much more than the estimate must be free before a case is run."""
CASES = ("load", "generate", "lora", "full")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="sd15")
    parser.add_argument(
        "--directory", type=Path, help="where the random weights are kept; default: temporary"
    )
    parser.add_argument("--case", action="append", choices=CASES, help="several times; default: all")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of load and generate")
    parser.add_argument("--size", type=int, default=128, help="pixels, height and width")
    parser.add_argument("--batch", type=int, default=2, help="images at once")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(arguments)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        arguments.directory = arguments.directory or Path(temporary) / arguments.model
        stored = torch.float32 if arguments.dtype == "float32" else DTYPES[arguments.dtype]
        write_random_model(arguments.model, arguments.directory, stored)
        print("| model | case | estimate | measured | ratio |\n| --- | --- | --- | --- | --- |", flush=True)
        rows = [row for case in arguments.case or CASES if (row := run_case(case, arguments))]
    print(describe("cpu"))
    write_json(arguments.json, "cpu", {"size": arguments.size, "batch": arguments.batch}, rows)


def run_case(case: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Prints a row of the table, or why there is none."""
    expected = estimate(case, arguments, machine.resident_memory()).total
    free = machine.available_memory()
    if expected * SPARE > free:
        print(f"{case}: left out: needs {in_words(expected)}, free are {in_words(free)}", flush=True)
        return None
    command = [sys.executable, "-m", "benchmarks.memory", "--one", case]
    for name in ("model", "directory", "dtype", "size", "batch"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    ratio = row["estimate"] / row["measured"]
    print(
        f"| {arguments.model} | {case} | {in_words(row['estimate'])} | {in_words(row['measured'])} | "
        f"{ratio:.2f} |",
        flush=True,
    )
    return row


def estimate(case: str, arguments: argparse.Namespace, runtime: int) -> Need:
    model = Model.of(MODELS[arguments.model])
    if case == "load":
        return memory.load(model, runtime, DTYPES[arguments.dtype])
    if case == "generate":
        return memory.generate(model, runtime, sampler(arguments), arguments.batch, DTYPES[arguments.dtype])
    return memory.finetune(
        model, runtime, finetune_config(case, arguments), height=arguments.size, width=arguments.size
    )


def run_one(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: does the work, and says what it took."""
    runtime = machine.resident_memory()
    work: dict[str, Callable[[], Any]] = {
        "load": lambda: load(arguments),
        "generate": lambda: generate(arguments),
        "lora": lambda: finetune(arguments),
        "full": lambda: finetune(arguments),
    }
    work[arguments.one]()
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    need = estimate(arguments.one, arguments, runtime)
    return {
        "model": arguments.model,
        "case": arguments.one,
        "measured": measured,
        "estimate": need.total,
        "parts": dict(need.parts),
    }


def load(arguments: argparse.Namespace) -> DiffusionModel:
    return load_diffusion_model(arguments.directory, dtype=DTYPES[arguments.dtype])


def sampler(arguments: argparse.Namespace) -> SamplerConfig:
    return SamplerConfig(steps=2, guidance_scale=5.0, height=arguments.size, width=arguments.size)


def generate(arguments: argparse.Namespace) -> None:
    prompts = ["a red star"] * arguments.batch
    sample_images(load(arguments), prompts, range(arguments.batch), sampler(arguments))


def finetune_config(case: str, arguments: argparse.Namespace) -> FinetuneConfig:
    return FinetuneConfig(
        steps=2,
        batch_size=arguments.batch,
        pretraining_batch_size=0,
        beta=0.0,
        ema_decay=0.0,
        parameters="lora" if case == "lora" else "full",
    )


def finetune(arguments: argparse.Namespace) -> None:
    """Two steps: from the second on, the optimiser's state is there during the backward pass."""
    tuner = make_finetuner(arguments)
    for _ in range(2):
        tuner.step()


def make_finetuner(arguments: argparse.Namespace) -> Finetuner:
    model = load_diffusion_model(arguments.directory)
    channels, cell = model.latent_channels, model.vae_scale_factor
    prompts, empty = encode_conditioning(model, ["a star"]), encode_conditioning(model, [""], negative=True)
    side = arguments.size // cell
    data = FinetuneData(
        latents_NCHW=torch.randn(arguments.batch, channels, side, side),
        text_index_N=torch.zeros(arguments.batch, dtype=torch.long),
        reward_N=torch.ones(arguments.batch),
        pretraining_latents_MCHW=torch.zeros(0, channels, side, side),
        pretraining_text_index_M=torch.zeros(0, dtype=torch.long),
        pretraining_reward_M=torch.zeros(0),
        text_KTD=prompts["states"],
        empty_text_TD=empty["states"][0],
        pooled_KP=prompts.get("pooled"),
        empty_pooled_P=empty["pooled"][0] if "pooled" in empty else None,
    )
    return Finetuner(model, data, finetune_config(arguments.one, arguments), seed=0)


if __name__ == "__main__":
    main()
