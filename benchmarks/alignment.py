"""Success against samples drawn and CPU time, of Accord's fine-tuning and of rivals that say what they cost.

python -m benchmarks.alignment ours --seed 1 --run-dir runs/alignment/seed-1
python -m benchmarks.alignment export runs/alignment/seed-1 --out runs/alignment/seed-1/export
python -m benchmarks.alignment measure runs/alignment/*/result.json RIVALS/*/result.json
python -m benchmarks.alignment speed runs/alignment/seed-1 --rival "python rival_loop.py"

Costs are CPU time of the process and its children, not time on the clock, which varies with other work on the
machine.
"""

from __future__ import annotations

import contextlib
import json as json_module
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from accord.artifacts import load_tensors
from accord.config import resolve_path
from accord.diffusion.finetune import Finetuner
from accord.diffusion.finetune_data import load_data
from accord.diffusion.model import load_diffusion_model
from accord.errors import AccordError
from accord.feedback.snapshot import load_snapshot
from accord.recipe import Recipe, load_recipe
from benchmarks.alignment_results import (
    BASE,
    Measured,
    measure_models,
    name_of,
    read_results,
    render,
    rows_of,
)
from benchmarks.tables import describe, spread, table, write_json
from ray_jobs import collect, finetune, inputs, judge, learn_reward, score, sources
from ray_jobs.stages import write_json as write_json_file

RECIPE = Path(__file__).with_name("alignment.yaml")
COSTS = "costs.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
RecipeOption = Annotated[Path, typer.Option("--recipe", help="The recipe of all runs.", dir_okay=False)]
SetOption = Annotated[list[str], typer.Option("--set", help="A change of the recipe, section.key=value.")]
RunDirectory = Annotated[Path, typer.Argument(help="The run directory of `ours`.", file_okay=False)]


def cpu_s() -> float:
    """CPU time of this process and of its ended children, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@app.command()
def ours(
    seed: Annotated[int, typer.Option(help="Of the run.")],
    run_dir: Annotated[Path, typer.Option(help="Where the run and its result.json go.", file_okay=False)],
    recipe: RecipeOption = RECIPE,
    overrides: SetOption = [],  # noqa: B006
    configuration: Annotated[str, typer.Option(help="What was varied, for the table.")] = "",
    arm: Annotated[str, typer.Option(help="Its name in the table.")] = "accord",
) -> None:
    """Our side: draws images, asks the raters, learns the reward, fine-tunes; writes result.json."""
    torch.set_num_threads(1)
    settings = _load(recipe, seed, overrides)
    sources.run(settings, run_dir, "pretraining")  # data at hand: it costs nobody anything
    costs = _read_costs(run_dir)
    costs["start"] = max(costs.get("start", 0.0), time.process_time())
    for stage in (collect, judge, learn_reward, score, finetune):
        with _counted(costs, stage.__name__.rpartition(".")[2], run_dir):
            stage.run(settings, run_dir)
    samples = len(collect.load_index(run_dir))
    checkpoint = {"model": "aligned", "samples": samples, "cpu_s": round(sum(costs.values()), 2)}
    result = {"arm": arm, "seed": seed, "configuration": configuration, "checkpoints": [checkpoint]}
    write_json_file(run_dir / "result.json", result)
    print(json_module.dumps({"samples": samples, **costs}))


@app.command()
def export(
    run_dir: RunDirectory,
    out: Annotated[Path, typer.Option(help="A folder for the folders of images.", file_okay=False)],
    threshold: Annotated[float, typer.Option(help="Least reward of a chosen pair.")] = 0.5,
) -> None:
    """For rivals: image folders with metadata.jsonl, good (as judged), pretraining, both, chosen (by reward);
    and prompts.txt, the prompts that images were judged on."""
    snapshot, folder = load_snapshot(run_dir / "snapshot"), inputs.image_folder(run_dir)
    judged = snapshot[snapshot["label"] == 1]
    good = [(folder.get(row.image), row.prompt) for row in inputs.records(judged)]
    pairs = list(zip(*sources.read(run_dir, "pretraining"), strict=True))
    rewards = load_tensors(run_dir / "work" / "aligned" / "data.safetensors")["pretraining_reward_M"].tolist()
    chosen = [pair for pair, reward in zip(pairs, rewards, strict=True) if reward >= threshold]
    for name, images in {"good": good, "pretraining": pairs, "both": good + pairs, "chosen": chosen}.items():
        _write_folder(out / name, images)
        print(f"{name}: {len(images)} images")
    prompts = sorted(set(collect.load_index(run_dir)["prompt"]))
    (out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


@app.command()
def measure(
    results: Annotated[list[Path], typer.Argument(help="result.json of each run.", dir_okay=False)],
    work: Annotated[Path, typer.Option(help="Where images are kept.", file_okay=False)] = Path(
        "runs/alignment-work"
    ),
    recipe: RecipeOption = RECIPE,
    overrides: SetOption = [],  # noqa: B006
    tuning: Annotated[bool, typer.Option(help="By the raters, on prompts that no claim is made on.")] = False,
    json: Annotated[Path | None, typer.Option(help="Where to write all numbers.")] = None,
) -> None:
    """Prints a Markdown table: success of every checkpoint at its best guidance against what it cost."""
    torch.set_num_threads(1)
    runs = read_results(results)
    measured: dict[int, dict[str, Measured]] = {}
    for seed in sorted({run.seed for run in runs}):
        settings = _load(recipe, seed, overrides)
        models = {BASE: resolve_path(settings.model).resolve()}
        for run in (run for run in runs if run.seed == seed):
            models |= {name_of(run, number): c.model for number, c in enumerate(run.checkpoints)}
        measured[seed] = measure_models(settings, models, work / f"seed-{seed}", tuning=tuning)
        for name, found in measured[seed].items():
            print(f"seed {seed}, {name}: {100 * found.success:.1f}% at {found.guidance}", file=sys.stderr)
    rows = rows_of(runs, measured)
    print(f"\n{describe('cpu')}\n\n{render(rows)}")
    write_json(json, "cpu", {"recipe": recipe.name, "set": overrides, "tuning": tuning}, rows)


@app.command()
def speed(
    run_dir: RunDirectory,
    rival: Annotated[
        list[str], typer.Option(help='A command whose last line is {"samples": , "cpu_s": , "wall_s": }.')
    ] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Measured steps; three more warm up.")] = 12,
    repeats: Annotated[int, typer.Option(help="Of each, in turn.")] = 3,
    recipe: RecipeOption = RECIPE,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Training samples a second of one thread: our fine-tuner's steps, and rivals' loops, in turn."""
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {"accord": [], **{command: [] for command in rival}}
    for number in range(repeats):
        found["accord"].append(_our_steps(_load(recipe, 0, overrides), run_dir, steps))
        for command in rival:
            done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True, check=True)
            found[command].append(json_module.loads(done.stdout.strip().splitlines()[-1]))
        print(f"{number + 1} of {repeats}", file=sys.stderr)
    rows = []
    for name, runs in found.items():
        by_cpu, by_clock = ([run["samples"] / run[key] for run in runs] for key in ("cpu_s", "wall_s"))
        faster = [
            our["samples"] / our["cpu_s"] * their["cpu_s"] / their["samples"]
            for our, their in zip(found["accord"], runs, strict=True)
        ]
        rows.append([name, spread(by_cpu), spread(by_clock), "" if name == "accord" else spread(faster)])
    print(f"\n{describe('cpu')}\n")
    headings = ["", "samples per CPU-second", "samples per second", "accord is faster by (CPU time)"]
    print(table(headings, rows))


def _our_steps(recipe: Recipe, run_dir: Path, steps: int) -> dict[str, float]:
    data = load_data(run_dir / "work" / "aligned" / "data.safetensors")
    model = load_diffusion_model(resolve_path(recipe.model))
    tuner = Finetuner(model, data, recipe.finetune, recipe.seed)
    for _ in range(3):
        tuner.step()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        tuner.step()
    samples = steps * (tuner.batches.num_model + tuner.batches.num_pretraining)
    return {
        "samples": samples,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
    }


def _load(recipe: Path, seed: int, overrides: list[str]) -> Recipe:
    return load_recipe(recipe, [*overrides, f"seed={seed}"])


def _read_costs(run_dir: Path) -> dict[str, float]:
    path = run_dir / COSTS
    return dict(json_module.loads(path.read_text())) if path.exists() else {}


@contextlib.contextmanager
def _counted(costs: dict[str, float], name: str, run_dir: Path) -> Iterator[None]:
    """Adds the CPU time inside to `costs`, and writes them; so a run that goes on counts all of its parts."""
    before_s = cpu_s()
    try:
        yield
    finally:
        costs[name] = round(costs.get(name, 0.0) + cpu_s() - before_s, 2)
        write_json_file(run_dir / COSTS, costs)


def _write_folder(directory: Path, images: list[tuple[bytes, Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (data, text) in enumerate(images):
        name = f"{number:05d}.png"
        (directory / name).write_bytes(data)
        lines.append(json_module.dumps({"file_name": name, "text": text}))
    (directory / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        app()
    except AccordError as error:
        sys.exit(f"error: {error}")
