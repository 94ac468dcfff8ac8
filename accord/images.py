"""Images as bytes: PNG with one spelling, careful decoding, and a folder of images named by their digest.

Legend: H height and W width in pixels, C the three channels red, green, blue.
"""

import io
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from accord.artifacts import sha256_bytes, write_file
from accord.errors import ImageError

Pixels = npt.NDArray[np.uint8]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
_HEXADECIMAL = frozenset("0123456789abcdef")


def encode_png(image_HWC: Pixels, metadata: Mapping[str, str] | None = None) -> bytes:
    """The PNG of uint8 RGB pixels; the same pixels and metadata give the same bytes.

    Raises:
        ImageError: another shape or type.
    """
    if image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or image_HWC.dtype != np.uint8:
        raise ImageError(
            f"cannot encode an array of shape {image_HWC.shape} and type {image_HWC.dtype}; "
            "expected (height, width, 3) and uint8"
        )
    texts = PngImagePlugin.PngInfo()
    for key in sorted(metadata or {}):
        texts.add_itxt(key, (metadata or {})[key])
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_HWC)).save(
        buffer, "PNG", compress_level=6, optimize=False, pnginfo=texts
    )
    return buffer.getvalue()


def decode_image(
    data: bytes, *, max_bytes: float = 20e6, max_pixels: float = 16e6, max_aspect: float = 20.0
) -> Pixels:
    """The uint8 RGB pixels (HWC) of a PNG, JPEG or WebP. Transparency is laid on white.

    Raises:
        ImageError: no image, truncated, animated, or larger than the limits.
    """
    if len(data) > max_bytes:
        raise ImageError(f"the image has {len(data)} bytes; at most {max_bytes:.0f} are allowed")
    if not data:
        raise ImageError("the image is empty; expected a PNG, JPEG or WebP file")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"the image has {width} x {height} pixels; at most {max_pixels:.0f} are allowed"
                )
            if max(width, height) > max_aspect * min(width, height):
                # CLIP scales the short side up to its own size: a line of pixels would become gigabytes.
                raise ImageError(
                    f"the image is {width} x {height}; one side may be at most {max_aspect:g} times the other"
                )
            if getattr(image, "n_frames", 1) > 1:
                raise ImageError("the image is animated; expected a single picture")
            if image.mode not in _MODES:
                raise ImageError(f"pixels of kind {image.mode!r} are not supported; expected 8-bit colours")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ImageError("the file is no image that we know; expected PNG, JPEG or WebP") from None
    except Image.DecompressionBombError:
        raise ImageError(f"the image has too many pixels; at most {max_pixels:.0f} are allowed") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise ImageError(f"the image is truncated or damaged: {error}") from None


def check_digest(digest: str) -> None:
    """Raises ImageError when it is no SHA-256 in hexadecimal."""
    if len(digest) != 64 or not _HEXADECIMAL.issuperset(digest):
        raise ImageError(f"{digest!r} is no image digest; expected 64 hexadecimal digits")


def resize_and_crop(image_HWC: Pixels, size: int) -> Pixels:
    """The middle square of an image, `size` pixels wide: the shorter side is resized to it (Lanczos)."""
    height, width = image_HWC.shape[:2]
    if height == width == size:
        return image_HWC
    scale = size / min(height, width)
    # One side is exactly `size`; rounding must not make the other shorter.
    scaled = (max(size, round(width * scale)), max(size, round(height * scale)))
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    picture = Image.fromarray(image_HWC).resize(scaled, Image.Resampling.LANCZOS)
    return np.array(picture.crop((left, top, left + size, top + size)), dtype=np.uint8)


class ImageFolder:
    """PNG files named by the SHA-256 of their bytes: `root/ab/abcd....png`. Safe for many writers at once."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, digest: str) -> Path:
        """Where the image with this digest is or would be.

        Raises:
            ImageError: when `digest` is no SHA-256 in hexadecimal.
        """
        check_digest(digest)
        return self.root / digest[:2] / f"{digest}.png"

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, str) and self.path(digest).is_file()

    def put(self, data: bytes) -> str:
        """Store a PNG and return its digest. Storing it again changes nothing.

        Raises:
            ImageError: when `data` is no PNG.
            StorageError: when the disk is full.
        """
        if not data.startswith(PNG_SIGNATURE):
            raise ImageError("only PNG files are kept in an image folder; encode the pixels with encode_png")
        digest = sha256_bytes(data)
        path = self.path(digest)
        # Not waiting for the disk is many times faster. A file of another length is what a power cut left.
        if not path.is_file() or path.stat().st_size != len(data):
            write_file(path, data, durable=False)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of an image, checked against its digest.

        Raises:
            ImageError: when it is missing or damaged.
        """
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except OSError:
            raise ImageError(f"there is no image {digest} in {self.root}") from None
        if sha256_bytes(data) != digest:
            raise ImageError(f"{path} is damaged: its bytes do not have the digest of its name; remove it")
        return data

    def load(self, digest: str) -> Pixels:
        """The uint8 RGB pixels (HWC) of an image.

        Raises:
            ImageError: when it is missing or damaged.
        """
        return decode_image(self.get(digest))


def _to_rgb(image: Image.Image) -> Pixels:
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    return np.array(image.convert("RGB"), dtype=np.uint8)
