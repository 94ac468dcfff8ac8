"""What fine-tuning learns from, in files that are mapped: the same rows, and the same training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accord.artifacts import save_tensors
from accord.diffusion.encode import encode_pngs, encode_texts
from accord.diffusion.finetune import FinetuneData, Finetuner
from accord.diffusion.finetune_data import load_data, save_data
from accord.diffusion.model import DiffusionModel
from accord.diffusion.rows import MappedRows, open_rows
from accord.errors import ArtifactError, ImageError
from accord.images import encode_png
from tests.diffusion.test_encode import make_images
from tests.diffusion.tuning import config, make_data, state


def in_pieces(directory: Path, name: str, rows: torch.Tensor, size: int) -> list[Path]:
    files = []
    for start in range(0, len(rows), size):
        files.append(directory / f"{name}-{start}.safetensors")
        save_tensors(files[-1], {name: rows[start : start + size]})
    return files


def written(directory: Path, data: FinetuneData, dtype: torch.dtype = torch.float32) -> Path:
    """As the jobs write it: what is large in pieces of two."""
    fields = {"latents_NCHW": data.latents_NCHW, "pretraining_latents_MCHW": data.pretraining_latents_MCHW}
    fields |= {"text_KTD": data.text_KTD.to(dtype)}
    parts = {name: (name, in_pieces(directory, name, rows, 2)) for name, rows in fields.items()}
    small = {
        name: value
        for name, value in vars(data).items()
        if name not in fields and value is not None and value.numel()
    }
    path = directory / "work" / "data.safetensors"
    save_data(path, small, parts)
    return path


def trained(model: DiffusionModel, data: FinetuneData, **changes: object) -> list[torch.Tensor]:
    finetuner = Finetuner(model, data, config(**changes), seed=0)
    for _ in range(3):
        finetuner.step()
    return state(finetuner)


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_mapped_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    whole = torch.randn(7, 3, 2)
    files = in_pieces(tmp_path, "x", whole, 3)
    rows = open_rows(files, "x", held_bytes=0)
    assert isinstance(rows, MappedRows)
    assert (rows.shape, rows.ndim, len(rows), rows.nbytes) == (whole.shape, 3, 7, whole.nbytes)
    index = torch.tensor([6, 0, 2, 3, 3, 5])
    assert torch.equal(rows[index], whole[index])
    assert rows[index[:0]].shape == (0, 3, 2)
    assert torch.equal(rows.whole(), whole)
    for outside in (7, -1):
        with pytest.raises(IndexError, match="there are 7 rows"):
            rows[torch.tensor([outside])]
    held = open_rows(files, "x", held_bytes=whole.nbytes)
    assert isinstance(held, torch.Tensor)
    assert torch.equal(held, whole)


def test_rows_that_are_missing_damaged_or_of_another_size(tmp_path: Path) -> None:
    files = in_pieces(tmp_path, "x", torch.randn(4, 3), 2)
    save_tensors(tmp_path / "other.safetensors", {"x": torch.randn(2, 5)})
    with pytest.raises(ArtifactError, match=r"encoded rows are \[3\] .* in one file and \[5\]"):
        open_rows([*files, tmp_path / "other.safetensors"], "x")
    with pytest.raises(ArtifactError, match="no whole safetensors file with 'y'"):
        open_rows(files, "y")
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="is no whole safetensors file"):
        open_rows(files, "x")
    files[0].unlink()
    with pytest.raises(ArtifactError, match=r"there is no file .* start again"):
        open_rows(files, "x")


def test_memory_is_not_filled_by_opening(tmp_path: Path) -> None:
    def resident() -> int:
        """Bytes of files and of memory of our own."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    size = 100 * 2**20
    files = in_pieces(tmp_path, "x", torch.zeros(100, 2**18), 50)
    before = resident()
    rows = open_rows(files, "x", held_bytes=0)
    assert rows[torch.tensor([3, 70])].sum() == 0
    assert rows.nbytes == size
    assert resident() - before < size // 4


def test_training_from_mapped_files_is_that_from_memory(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    data = make_data(tiny_model)
    path = written(tmp_path, data)
    mapped, held = load_data(path, held_bytes=0), load_data(path)
    assert isinstance(mapped.text_KTD, MappedRows)
    assert isinstance(mapped.pretraining_latents_MCHW, MappedRows)
    assert isinstance(held.text_KTD, torch.Tensor)
    assert mapped.fingerprint() == held.fingerprint() == data.fingerprint()
    expected = trained(tiny_model, data)
    assert same(trained(tiny_model, mapped), expected)
    assert same(trained(tiny_model, held), expected)
    other = replace(data, text_KTD=data.text_KTD.flip(0))
    assert not same(trained(tiny_model, other), expected)


def test_in_bfloat16_training_is_the_same_from_texts_in_bfloat16(
    tiny_model: DiffusionModel, tmp_path: Path
) -> None:
    data = make_data(tiny_model)
    half = load_data(written(tmp_path, data, torch.bfloat16), held_bytes=0)
    assert half.text_KTD.dtype == torch.bfloat16
    dropless = {"condition_dropout": 0.5}
    exact = trained(tiny_model, data, precision="bfloat16", **dropless)
    assert same(trained(tiny_model, half, precision="bfloat16", **dropless), exact)
    assert not same(trained(tiny_model, half, **dropless), trained(tiny_model, data, **dropless))


def test_a_run_can_be_copied(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    written(tmp_path / "a", make_data(tiny_model))
    (tmp_path / "a").rename(tmp_path / "b")
    assert len(load_data(tmp_path / "b" / "work" / "data.safetensors", held_bytes=0).text_KTD) == 3


def test_png_files_are_encoded_as_their_pixels_are(tiny_model: DiffusionModel) -> None:
    images = make_images(3)
    files = (encode_png(image) for image in images)  # one by one
    assert encode_pngs(tiny_model, files, batch_size=2).shape == (3, 4, 8, 8)
    uneven = [encode_png(images[0]), encode_png(images[1][:32])]
    for batch_size in (1, 2):
        with pytest.raises(ImageError, match=r"64 x 32 pixels, others have 64 x 64; .* option size"):
            encode_pngs(tiny_model, uneven, batch_size=batch_size)
    states = encode_texts(tiny_model, ["red star"], dtype=torch.bfloat16)["states"]
    assert torch.equal(states, encode_texts(tiny_model, ["red star"])["states"].bfloat16())
