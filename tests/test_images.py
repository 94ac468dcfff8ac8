"""Images: one spelling, careful decoding, a folder that heals and checks itself."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from accord.artifacts import sha256_bytes
from accord.errors import ImageError
from accord.images import ImageFolder, Pixels, decode_image, encode_png


def picture(height: int = 6, width: int = 5, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_png_keeps_every_pixel(height: int, width: int, seed: int) -> None:
    pixels = picture(height, width, seed)
    assert np.array_equal(decode_image(encode_png(pixels)), pixels)


def test_png_is_deterministic_and_carries_metadata() -> None:
    data = encode_png(picture(), {"prompt": "two größe stars", "seed": "7"})
    assert data == encode_png(picture(), {"seed": "7", "prompt": "two größe stars"})
    assert Image.open(io.BytesIO(data)).text == {"prompt": "two größe stars", "seed": "7"}  # type: ignore[attr-defined]
    assert data != encode_png(picture())


def test_png_of_a_view() -> None:
    pixels = picture()[:, ::-1]
    assert np.array_equal(decode_image(encode_png(pixels)), pixels)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (1, 4, 4, 3)])
def test_arrays_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="expected"):
        encode_png(np.zeros(shape, np.uint8))


def test_arrays_of_another_type_are_refused() -> None:
    with pytest.raises(ImageError, match="float32"):
        encode_png(np.zeros((4, 4, 3), np.float32))  # type: ignore[arg-type]


def test_transparency_is_laid_on_white_and_grey_becomes_rgb() -> None:
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert decode_image(encoded(clear, "PNG")).tolist() == [[[255, 255, 255]]]
    grey = Image.new("L", (1, 1), 7)
    assert decode_image(encoded(grey, "PNG")).tolist() == [[[7, 7, 7]]]


def test_the_camera_s_orientation_is_obeyed() -> None:
    image = Image.new("RGB", (2, 1))
    image.putdata([(255, 0, 0), (0, 0, 255)])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode_image(encoded(image, "PNG", exif=exif)).shape == (2, 1, 3)


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60,000 pixels wide and high."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


ANIMATION = encoded(
    Image.new("RGB", (2, 2)),
    "WEBP",
    save_all=True,
    append_images=[Image.new("RGB", (2, 2), "red")],
    lossless=True,
)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"not an image", "no image that we know"),
        (encode_png(picture(64, 64))[:3000], "truncated"),
        (encode_png(picture())[:20], "image"),
        (encoded(Image.fromarray(picture(64, 64)), "JPEG")[:900], "truncated"),
        (encoded(Image.new("RGB", (2, 2)), "BMP"), "no image that we know"),
        (ANIMATION, "animated"),
        (encoded(Image.new("I;16", (2, 2)), "PNG"), "not supported"),
        (bomb(), "pixels"),
        (encoded(Image.new("RGB", (1, 20_000)), "PNG"), "at most 20 times the other"),
    ],
)
def test_bytes_that_are_no_usable_image(data: bytes, expected: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert expected in str(caught.value)


def test_limits() -> None:
    data = encode_png(picture(6, 5))
    with pytest.raises(ImageError, match="at most 10 are allowed"):
        decode_image(data, max_bytes=10)
    with pytest.raises(ImageError, match="5 x 6 pixels; at most 29"):
        decode_image(data, max_pixels=29)
    assert decode_image(data, max_pixels=30).shape == (6, 5, 3)


@given(st.binary(max_size=200), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_damage_gives_an_image_or_an_image_error(noise: bytes, where: int) -> None:
    data = bytearray(encode_png(picture(8, 8)))
    data[where : where + len(noise)] = noise
    try:
        decoded = decode_image(bytes(data))
    except ImageError:
        return
    assert decoded.shape[2] == 3


def test_folder_round_trip(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path / "images")
    data = encode_png(picture())
    digest = folder.put(data)
    assert digest == sha256_bytes(data)
    assert folder.put(data) == digest
    assert folder.get(digest) == data
    assert np.array_equal(folder.load(digest), picture())
    files = [path for path in (tmp_path / "images").rglob("*") if path.is_file()]
    assert files == [tmp_path / "images" / digest[:2] / f"{digest}.png"] == [folder.path(digest)]


def test_folder_contains(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path)
    digest = folder.put(encode_png(picture()))
    assert digest in folder
    assert "0" * 64 not in folder


def test_folder_heals_what_a_power_cut_left(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path)
    data = encode_png(picture())
    digest = folder.put(data)
    folder.path(digest).write_bytes(b"")
    folder.put(data)
    assert folder.get(digest) == data


def test_folder_refuses_damaged_missing_and_other_files(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path)
    data = encode_png(picture())
    digest = folder.put(data)
    folder.path(digest).write_bytes(data[:-1] + b"x")
    with pytest.raises(ImageError, match="damaged"):
        folder.load(digest)
    with pytest.raises(ImageError, match="there is no image"):
        folder.get("0" * 64)
    with pytest.raises(ImageError, match="only PNG"):
        folder.put(b"GIF89a")


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63, "/" * 64])
def test_folder_stays_inside(tmp_path: Path, digest: str) -> None:
    with pytest.raises(ImageError, match="64 hexadecimal digits"):
        ImageFolder(tmp_path).path(digest)
