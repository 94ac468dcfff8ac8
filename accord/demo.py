"""What `accord demo` does after the loop: serves the run's models, and asks them for images over gRPC.

`services.local` runs as a process of its own, with a config made in the run directory and a token that lives
as long as it does. The answers are kept in `served/`, and become a section of the report.
"""

import contextlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from accord.artifacts import read_manifest, write_file
from accord.children import child, wait_for_file
from accord.client import Client, GeneratedImage, Generation, manifest_json
from accord.config import resolve_path
from accord.errors import AccordError
from accord.evaluation.plan import TEST, draw_prompts
from accord.evaluation.report import BestOfCard, RankedImage, Served, replace_served
from accord.prompts import Category, Split, load_grammar
from accord.recipe import Recipe

DIRECTORY = "served"
ANSWERS = "served.json"
CONFIG = "serve.yaml"
LOG = "serve.log"
CANDIDATES = 16
MODELS = ("base", "aligned")
START_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 120.0

console = Console(stderr=True, highlight=False, soft_wrap=True)


def serve_run(recipe: Recipe, run_dir: Path) -> None:
    """Serve base and aligned model of a finished run, ask both, and put what they answer into the report.

    What was asked of these very models before is kept.

    Raises:
        AccordError: the server does not start, or refuses; the run's results are not touched by that.
    """
    digests = _digests(run_dir)
    served = load_served(run_dir)
    if served is None:
        directory = run_dir / DIRECTORY
        directory.mkdir(exist_ok=True)
        write_file(directory / CONFIG, yaml.safe_dump(serving_config(recipe, run_dir), sort_keys=False))
        guidance = json.loads((run_dir / "summary.json").read_text())["guidance"]
        with (
            console.status("Starting the server with the run's models") as status,
            local_server(directory / CONFIG, directory / LOG) as (address, token),
            Client(address, token=token) as client,
        ):
            console.print(f"Serving at {address}")
            answers = []
            for number, prompt in enumerate(prompts(recipe), start=1):
                for model in MODELS:
                    status.update(f"Asking the {model} model for the best of {CANDIDATES}: {prompt}")
                    made = _ask(client, recipe, prompt, model, guidance.get(model))
                    answers.append(_keep(made, directory, prompt, model, number))
            status.update("Stopping the server")
        content = {"digests": digests, "answers": answers}
        write_file(directory / ANSWERS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        served = load_served(run_dir)
    report = run_dir / "report.html"
    html = report.read_text(encoding="utf-8")
    write_file(report, replace_served(html, served))
    console.print(f"Served over gRPC: a section of {report}\nTo serve them again:  {_command(run_dir)}")


def load_served(run_dir: Path) -> Served | None:
    """What the run's models answered; None when they were not asked, or have been made anew since."""
    path = run_dir / DIRECTORY / ANSWERS
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if content["digests"] != _digests(run_dir):
        return None
    cards = []
    for answer in content["answers"]:
        images = [
            RankedImage((path.parent / image["file"]).read_bytes(), image["reward"], None)
            for image in answer["images"]
        ]
        cards.append(BestOfCard(answer["prompt"], answer["model"], images))
    seconds = [answer["elapsed_s"] for answer in content["answers"]]
    note = (
        f"Each was asked for the best of {CANDIDATES} by the reward that the run has learned, at its own "
        f"guidance scale, and answered within {max(seconds):.1f} s. The outlined image is what a client "
        f"gets. Every PNG in {DIRECTORY}/ carries its manifest: accord replay makes it again."
    )
    return Served(cards, note, _command(Path(os.path.relpath(run_dir)))) if cards else None


def serving_config(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """The config of `services.local` for the run's models, as plain data."""
    sampler = recipe.evaluate.sampler
    models = {"base": resolve_path(recipe.model).resolve(), "aligned": (run_dir / "aligned").resolve()}
    return {
        "generation": {
            "num_cpus": 1,
            "user_config": {
                "models": {alias: str(path) for alias, path in models.items()},
                "default": "aligned",
            },
        },
        "reward": {
            "num_cpus": 0.5,
            "grammar": recipe.grammar,
            "user_config": {"models": {"reward": str((run_dir / "reward").resolve())}, "default": "reward"},
        },
        "gateway": {
            "num_cpus": 0.25,
            "user_config": {
                "sampler": {
                    "steps": sampler.steps,
                    "guidance_scale": sampler.guidance_scale,
                    "scheduler": sampler.scheduler,
                }
            },
        },
    }


def prompts(recipe: Recipe) -> list[str]:
    """The first test prompt that combines things, of the words that were judged and of new combinations.

    A rule that looks at no picture. On these prompts nothing was chosen and nothing was learned.
    """
    drawn = draw_prompts(recipe.evaluate, load_grammar(recipe.grammar), recipe.seed)[TEST]
    chosen = []
    for split in (Split.SEEN, Split.UNSEEN_COMBINATION):
        of_split = [prompt for prompt in drawn if prompt.split == split]
        of_split.sort(key=lambda prompt: prompt.category != Category.COMBINATION)  # stable
        chosen += [prompt.text for prompt in of_split[:1]]
    return chosen or [drawn[0].text]


@contextlib.contextmanager
def local_server(config: Path, log: Path) -> Iterator[tuple[str, str]]:
    """Runs `services.local` during the block; yields its address and a token for it.

    Raises:
        AccordError: it ends or is silent instead of serving; says what its log says.
    """
    with tempfile.TemporaryDirectory(prefix="accord-demo-") as private:
        secret, endpoint = Path(private) / "token", Path(private) / "endpoint.json"
        command = [sys.executable, "-m", "services.local", "--environment", str(config), "--port", "0"]
        command += ["--tokens", str(Path(private) / "tokens.yaml"), "--secret", str(secret)]
        command += ["--endpoint-file", str(endpoint)]
        with child(command, log) as process:
            try:
                wait_for_file(process, endpoint, START_TIMEOUT_S, "the server", log)
            except AccordError as error:
                raise AccordError(f"{error}; --skip-serving leaves it out") from None
            yield json.loads(endpoint.read_bytes())["address"], secret.read_text().strip()


def _ask(client: Client, recipe: Recipe, prompt: str, model: str, guidance: float | None) -> Generation:
    """The best of 16 for one prompt. All 16 are returned, since the report shows them."""
    options: Mapping[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    return client.generate(
        prompt,
        num_images=CANDIDATES,
        candidates=CANDIDATES,
        seed=recipe.seed,
        model=model,
        timeout_s=REQUEST_TIMEOUT_S,
        **options,
    )


def _keep(made: Generation, directory: Path, prompt: str, model: str, number: int) -> dict[str, Any]:
    images = [
        _keep_image(image, directory / f"{model}-{number}-{image.rank:02d}.png") for image in made.images
    ]
    return {
        "prompt": prompt,
        "model": model,
        "model_digest": made.summary.model_digest,
        "reward_model_digest": made.summary.reward_model_digest,
        "elapsed_s": round(made.summary.elapsed_s, 3),
        "images": images,
    }


def _keep_image(image: GeneratedImage, path: Path) -> dict[str, Any]:
    image.save(path)
    return {
        "file": path.name,
        "rank": image.rank,
        "reward": round(image.reward, 6),
        "manifest": json.loads(manifest_json(image.manifest)),
    }


def _digests(run_dir: Path) -> dict[str, str]:
    return {name: read_manifest(run_dir / name).digest for name in ("aligned", "reward")}


def _command(run_dir: Path) -> str:
    return shlex.join(
        ["accord", "serve", "--model", str(run_dir / "aligned"), "--reward-model", str(run_dir / "reward")]
    )
