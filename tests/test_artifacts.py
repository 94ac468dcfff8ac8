"""Artifacts: whole or not at all, and never a pickle."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import accord
from accord.artifacts import (
    artifact_writer,
    canonical_json,
    check_model_directory,
    code_version,
    load_tensors,
    read_manifest,
    save_tensors,
    sha256_bytes,
    sha256_file,
    storage_errors,
    verify,
    write_file,
)
from accord.errors import ArtifactError, StorageError

ROOT = Path(accord.__file__).resolve().parent.parent


def make(directory: Path, value: float = 1.0, *, seed: int = 0, note: str = "") -> None:
    with artifact_writer(
        directory, "thing", inputs={"a": "b"}, config={"note": note}, seed=seed
    ) as temporary:
        save_tensors(temporary / "sub" / "w.safetensors", {"w": torch.full((4,), value)})
        (temporary / "config.json").write_text("{}")


def listing(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, "abc"
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_bytes(b"abc") == sha256_file(tmp_path / "abc") == known


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": (1, 2), "a": {"é": Path("x/y")}}) == '{"a":{"é":"x/y"},"b":[1,2]}'
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})
    with pytest.raises(TypeError):
        canonical_json({"a": object()})


def test_written_artifact_verifies(tmp_path: Path) -> None:
    make(tmp_path / "art")
    manifest = verify(tmp_path / "art", "thing")
    assert sorted(manifest.files) == ["config.json", "sub/w.safetensors"]
    assert manifest.inputs == {"a": "b"}
    assert listing(tmp_path) == [
        "art",
        "art/config.json",
        "art/manifest.json",
        "art/sub",
        "art/sub/w.safetensors",
    ]


def test_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    make(tmp_path / "one", seed=1, note="x")
    make(tmp_path / "two", seed=2, note="y")
    make(tmp_path / "other", 2.0, seed=1, note="x")
    digests = [read_manifest(tmp_path / name).digest for name in ("one", "two", "other")]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        artifact_writer(tmp_path / "a", "k", inputs={}, config={}, seed=0) as temporary,
    ):
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert listing(tmp_path) == []


def test_an_error_leaves_the_older_artifact(tmp_path: Path) -> None:
    make(tmp_path / "art", 1.0)
    before = verify(tmp_path / "art").digest
    with (
        pytest.raises(KeyboardInterrupt),
        artifact_writer(tmp_path / "art", "k", inputs={}, config={}, seed=0),
    ):
        raise KeyboardInterrupt
    assert verify(tmp_path / "art", "thing").digest == before


def test_a_newer_artifact_replaces_the_older(tmp_path: Path) -> None:
    make(tmp_path / "art", 1.0)
    (tmp_path / "art" / "extra.txt").write_text("x")
    make(tmp_path / "art", 2.0)
    verify(tmp_path / "art", "thing")
    assert load_tensors(tmp_path / "art" / "sub" / "w.safetensors")["w"].tolist() == [2.0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["art"]


def test_a_killed_writer_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    code = f"""
        import os, signal
        from accord.artifacts import artifact_writer
        with artifact_writer({str(tmp_path / "art")!r}, "k", inputs={{}}, config={{}}, seed=0) as temporary:
            (temporary / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "art").exists()
    assert len(list(tmp_path.iterdir())) == 1
    make(tmp_path / "art")
    assert [path.name for path in tmp_path.iterdir()] == ["art"]


def test_a_writer_killed_between_its_renames_is_undone(tmp_path: Path) -> None:
    make(tmp_path / "art", 1.0)
    (tmp_path / "art").rename(tmp_path / ".art.replaced")
    with pytest.raises(RuntimeError), artifact_writer(tmp_path / "art", "k", inputs={}, config={}, seed=0):
        raise RuntimeError
    assert verify(tmp_path / "art", "thing").seed == 0


def damage_file(art: Path) -> None:
    path = art / "sub" / "w.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove_file(art: Path) -> None:
    (art / "config.json").unlink()


def add_pickle(art: Path) -> None:
    (art / "sub" / "model.PT").write_bytes(b"x")


def edit_manifest(art: Path) -> None:
    manifest = json.loads((art / "manifest.json").read_text())
    manifest["files"]["config.json"] = "0" * 64
    (art / "manifest.json").write_text(json.dumps(manifest))


def cut_manifest(art: Path) -> None:
    (art / "manifest.json").write_text('{"kind": "thing"')


def remove_manifest(art: Path) -> None:
    (art / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (damage_file, "w.safetensors was changed or damaged"),
        (remove_file, "config.json is missing"),
        (add_pickle, "can run code"),
        (edit_manifest, "changed by hand"),
        (cut_manifest, "is damaged"),
        (remove_manifest, "is no artifact"),
    ],
)
def test_verify_refuses(tmp_path: Path, harm: object, expected: str) -> None:
    make(tmp_path / "art")
    assert callable(harm)
    harm(tmp_path / "art")
    with pytest.raises(ArtifactError, match=re.escape(expected)):
        verify(tmp_path / "art")


def test_verify_refuses_another_kind(tmp_path: Path) -> None:
    make(tmp_path / "art")
    with pytest.raises(ArtifactError, match="is a 'thing'; expected a 'reward_model'"):
        verify(tmp_path / "art", "reward_model")


def test_verify_stays_inside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    make(tmp_path / "art")
    manifest = json.loads((tmp_path / "art" / "manifest.json").read_text())
    manifest["files"] = {"../secret": sha256_file(tmp_path / "secret")}
    manifest["digest"] = sha256_bytes(canonical_json({"kind": "thing", "files": manifest["files"]}).encode())
    (tmp_path / "art" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="outside the artifact"):
        verify(tmp_path / "art")


def test_tensors_round_trip_with_the_same_bytes(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "b": shared,
        "a": shared.t(),
        "n": torch.tensor([1, 2]),
        "h": torch.ones(2, dtype=torch.bfloat16),
    }
    metadata = {f"key{number}": "é" * number for number in range(12)}
    save_tensors(tmp_path / "one", tensors, metadata)
    save_tensors(tmp_path / "two", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = load_tensors(tmp_path / "one")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    from safetensors import safe_open

    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata() == metadata


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    save_tensors(
        tmp_path / "w.safetensors", {"fine": torch.ones(2), "unet.w": torch.tensor([1.0, bad], dtype=dtype)}
    )
    for check in (lambda: load_tensors(tmp_path / "w.safetensors"), lambda: check_model_directory(tmp_path)):
        with pytest.raises(ArtifactError, match=r"'unet\.w' holds NaN or infinity"):
            check()


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "w.safetensors", {"w": torch.ones(100)})
    whole = (tmp_path / "w.safetensors").read_bytes()
    for content in (whole[:-8], whole[:20], b"", b"\x80\x04pickle" + b"x" * 100):
        (tmp_path / "w.safetensors").write_bytes(content)
        with pytest.raises(ArtifactError, match="no whole safetensors file"):
            load_tensors(tmp_path / "w.safetensors")
        with pytest.raises(ArtifactError, match="no whole safetensors file"):
            check_model_directory(tmp_path)
    with pytest.raises(ArtifactError, match="no file"):
        load_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["model.bin", "w.pt", "w.pth", "v1-5.CKPT", "data.pkl"])
def test_model_directories_with_pickles_are_refused(tmp_path: Path, name: str) -> None:
    save_tensors(tmp_path / "unet" / "w.safetensors", {"w": torch.ones(1)})
    check_model_directory(tmp_path)
    (tmp_path / "unet" / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ArtifactError, match="pickle format"):
        check_model_directory(tmp_path)


def test_directories_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no \*.safetensors"):
        check_model_directory(tmp_path)
    with pytest.raises(ArtifactError, match="there is no model directory"):
        check_model_directory(tmp_path / "none")


def test_code_version() -> None:
    assert re.fullmatch(re.escape(accord.__version__) + r"(\+g[0-9a-f]{7,}(-dirty)?)?", code_version())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x"),
        OSError(errno.EFBIG, "x"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_has_one_error(error: Exception) -> None:
    with pytest.raises(StorageError, match="Nothing was changed"), storage_errors("there"):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(PermissionError), storage_errors("there"):
        raise PermissionError(errno.EACCES, "x")


def test_write_file_replaces_and_leaves_no_rest(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "f", "one")
    write_file(tmp_path / "a" / "f", b"two")
    assert (tmp_path / "a" / "f").read_bytes() == b"two"
    assert listing(tmp_path) == ["a", "a/f"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for 256 KiB, or a skip where one may not be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = (
            os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
        )
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no file system may be mounted here; the file-size limit is tested instead")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_really_full_disk_in_the_middle_of_an_artifact(small_disk: Path) -> None:
    make(small_disk / "art", 1.0)
    before = listing(small_disk)
    with (
        pytest.raises(StorageError, match="the disk is full"),
        artifact_writer(small_disk / "art", "thing", inputs={}, config={}, seed=0) as temporary,
    ):
        (temporary / "first.txt").write_text("fits")
        save_tensors(temporary / "big.safetensors", {"w": torch.ones(300_000)})
    assert listing(small_disk) == before
    verify(small_disk / "art", "thing")


def test_a_really_full_disk_under_a_plain_file(small_disk: Path) -> None:
    write_file(small_disk / "f", b"old")
    with pytest.raises(StorageError):
        write_file(small_disk / "f", b"x" * 1_000_000)
    assert (small_disk / "f").read_bytes() == b"old"
    assert listing(small_disk) == ["f"]


def test_a_file_size_limit_in_the_middle_of_an_artifact(tmp_path: Path) -> None:
    make(tmp_path / "art", 1.0)
    before = listing(tmp_path)
    code = f"""
        import torch
        from accord.artifacts import artifact_writer, save_tensors
        from accord.errors import StorageError
        art = {str(tmp_path / "art")!r}
        try:
            with artifact_writer(art, "k", inputs={{}}, config={{}}, seed=0) as temporary:
                save_tensors(temporary / "big.safetensors", {{"w": torch.ones(300_000)}})
        except StorageError as error:
            print("refused:", error)
    """

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself does: the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("refused: no room to write"), done.stderr
    assert listing(tmp_path) == before
    verify(tmp_path / "art", "thing")
