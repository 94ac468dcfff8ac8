"""What fine-tuning learns from: images as latents, prompts as text states, and rewards, in files for all
workers.

Latents and text states are made in pieces of a thousand, each a file that is written whole: memory holds a
piece, an interrupted run makes only the pieces that are missing, and training maps them (accord's
diffusion/rows.py). Pieces and the rewards of captions are kept in the run directory under names that follow
from what they were made from, so that several runs on the same images make them once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from accord.artifacts import load_tensors, read_manifest, save_tensors, sha256_bytes
from accord.captioned import each_png
from accord.cpu import use_cpu
from accord.recipe import RayConfig, Recipe
from ray_jobs import cluster, inputs, sources
from ray_jobs.generation import Source
from ray_jobs.progress import bar
from ray_jobs.score import score_captioned

if TYPE_CHECKING:  # takes seconds to import
    import torch

ENCODED = "work/encoded"
PIECE = 1024
"""Images or texts of a piece: a multiple of the batch that they are encoded in, so that pieces change no
number; at 512 pixels 67 MB of latents, 242 MB of text states."""

Kind = Literal["generated", "pretraining", "texts", "empty"]


@dataclass(frozen=True)
class Piece:
    """What becomes one file of ENCODED. Plain values, for Ray Data."""

    name: str
    """Follows from all that the tensors are made from."""
    kind: Kind
    items: tuple[str, ...] = ()
    """Digests of generated images, or texts."""
    start: int = 0
    stop: int = 0
    """Of pre-training images, those before it."""
    dtype: str = "float32"


def prepare_data(
    recipe: Recipe,
    model: Source,
    run_dir: Path,
    scored: pd.DataFrame,
    path: Path,
    more: Mapping[str, torch.Tensor],
) -> None:
    """Encodes all images and prompts, and writes what fine-tuning.load_data reads to `path`.

    `scored`: columns image (digest), prompt and reward. `more`: further fields of FinetuneData, as they are.
    """
    import torch

    from accord.diffusion.finetune_data import save_data

    captions = sources.captions(run_dir, "pretraining")
    texts = {text: row for row, text in enumerate(dict.fromkeys([*scored["prompt"], *captions]))}
    pieces = _pieces(recipe, model.digest, run_dir, list(scored["image"]), len(captions), list(texts))
    _encode(recipe, model, run_dir, [piece for group in pieces.values() for piece in group])
    empty = load_tensors(_file(run_dir, pieces["empty"][0].name))
    is_xl = "pooled" in empty
    tensors = {
        "text_index_N": torch.tensor([texts[prompt] for prompt in scored["prompt"]]),
        "reward_N": torch.tensor(scored["reward"].to_numpy(), dtype=torch.float32),
        "pretraining_text_index_M": torch.tensor([texts[caption] for caption in captions], dtype=torch.long),
        "pretraining_reward_M": _caption_rewards(recipe, run_dir, captions),
        "empty_text_TD": empty["states"][0],
        **({"empty_pooled_P": empty["pooled"][0]} if is_xl else {}),
        **more,
    }
    files = {kind: [_file(run_dir, piece.name) for piece in group] for kind, group in pieces.items()}
    parts = {
        "latents_NCHW": ("latents", files["generated"]),
        "pretraining_latents_MCHW": ("latents", files["pretraining"]),
        "text_KTD": ("states", files["texts"]),
        **({"pooled_KP": ("pooled", files["texts"])} if is_xl else {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_data(path, tensors, parts)


def _pieces(
    recipe: Recipe, model: str, run_dir: Path, images: list[str], count: int, texts: list[str]
) -> dict[Kind, list[Piece]]:
    """By kind, in order: of generated images (their digests), of `count` pre-training images, of texts."""
    pretraining = read_manifest(run_dir / "pretraining").digest
    half = recipe.finetune.precision == "bfloat16"  # see encode.encode_texts
    dtype = "bfloat16" if half else "float32"

    def name(*made_from: str) -> str:
        return _name(["piece", model, *made_from])

    return {
        "generated": [
            Piece(name("images", *part), "generated", tuple(part)) for part in inputs.batches(images, PIECE)
        ],
        "pretraining": [
            Piece(
                name("pretraining", pretraining, str(start), str(stop)),
                "pretraining",
                start=start,
                stop=stop,
            )
            for start in range(0, count, PIECE)
            for stop in (min(start + PIECE, count),)
        ],
        "texts": [
            Piece(name("texts", dtype, *part), "texts", tuple(part), dtype=dtype)
            for part in inputs.batches(texts, PIECE)
        ],
        "empty": [Piece(name("empty"), "empty", ("",))],
    }


def _encode(recipe: Recipe, model: Source, run_dir: Path, pieces: Sequence[Piece]) -> None:
    """Makes the pieces that are missing."""
    missing = [piece for piece in pieces if not _file(run_dir, piece.name).exists()]
    if not missing:
        return
    (run_dir / ENCODED).mkdir(parents=True, exist_ok=True)
    arguments = {"model": str(model.directory), "run_dir": str(run_dir.resolve())}
    config = recipe.ray
    run = _run_here if config.gpus_per_worker == 0 or config.local else partial(_run_on_actors, config)
    if len(missing) <= 4:  # soon done
        for _ in run(missing, arguments):
            pass
        return
    with bar("Encoding images and captions", PIECE * len(missing), "items") as progress:
        done = 0
        for _ in run(missing, arguments):
            done += PIECE
            progress.update(done)


def _run_here(pieces: Sequence[Piece], arguments: Mapping[str, Any]) -> Iterator[int]:
    encoder = _Encoder(**arguments)
    yield from (encoder.run(piece) for piece in pieces)


def _run_on_actors(config: RayConfig, pieces: Sequence[Piece], arguments: Mapping[str, Any]) -> Iterator[int]:
    """By Ray Data, on as many actors as training has workers; one number a piece as it is committed. A
    piece of an actor that is lost is made by another."""
    cluster.ensure(config)
    import ray

    items = [{"piece": json.dumps(asdict(piece))} for piece in pieces]
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Encoder,
        fn_constructor_kwargs={**arguments, "threads": config.threads_per_worker},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(config.num_workers, len(pieces))),
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker or None,
    )
    for row in results.iter_rows():
        yield int(row["items"])


class _Encoder:
    """Makes pieces with the model's VAE and text encoders. `run_dir` and `model` are paths that all nodes
    reach."""

    def __init__(self, model: str, run_dir: str, threads: int | None = None) -> None:
        import torch

        from accord.diffusion.model import load_diffusion_model

        if threads is not None:
            use_cpu(threads)
        self.run_dir = Path(run_dir)
        self.folder = inputs.image_folder(self.run_dir)
        self.model = load_diffusion_model(model, device="cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, table: dict[str, Any]) -> dict[str, Any]:
        pieces = [json.loads(str(item)) for item in table["piece"]]
        return {"items": [self.run(Piece(**{**piece, "items": tuple(piece["items"])})) for piece in pieces]}

    def run(self, piece: Piece) -> int:
        """Writes the piece's file, all or nothing; how many rows it has."""
        import torch

        from accord.diffusion.encode import encode_pngs, encode_texts

        if piece.kind in ("texts", "empty"):
            dtype: torch.dtype = getattr(torch, piece.dtype)
            negative = piece.kind == "empty"
            tensors = encode_texts(self.model, piece.items, negative=negative, dtype=dtype)
        else:
            tensors = {"latents": encode_pngs(self.model, self._files(piece))}
        save_tensors(_file(self.run_dir, piece.name), tensors)
        return len(next(iter(tensors.values())))

    def _files(self, piece: Piece) -> Iterable[bytes]:
        if piece.kind == "pretraining":
            return each_png(self.run_dir / "pretraining", piece.start, piece.stop)
        return map(self.folder.get, piece.items)


def _caption_rewards(recipe: Recipe, run_dir: Path, captions: list[str]) -> torch.Tensor:
    """Of each pre-training image; zeros when nobody asks for them."""
    import torch

    config = recipe.finetune
    if config.pretraining_threshold is None:
        return torch.zeros(len(captions))
    favourites = config.pretraining_favourites
    digests = [read_manifest(run_dir / name).digest for name in ("reward", "pretraining")]
    return _once(
        run_dir,
        ["rewards", *digests, recipe.grammar, str(favourites)],
        lambda: cluster.on_device(recipe.ray, _score_captions, recipe, run_dir, captions),
    )


def _score_captions(recipe: Recipe, run_dir: Path, captions: list[str]) -> torch.Tensor:
    import torch

    files = each_png(run_dir / "pretraining")
    favourites = recipe.finetune.pretraining_favourites
    return torch.tensor(score_captioned(recipe, run_dir, files, captions, favourites=favourites))


def _once(run_dir: Path, made_from: Sequence[str], make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` gives, kept under a name that follows from what it is made from."""
    path = _file(run_dir, _name(made_from))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"values": make()})
    return load_tensors(path)["values"]


def _name(made_from: Sequence[str]) -> str:
    return sha256_bytes("\0".join(made_from).encode())[:32]


def _file(run_dir: Path, name: str) -> Path:
    return run_dir / ENCODED / f"{name}.safetensors"
