"""Pixels as the bytes that a client asked for, with the manifest in a PNG."""

from __future__ import annotations

import io

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray
from PIL import Image

from accord.images import encode_png
from accord.v1 import generation_pb2 as pb

MANIFEST_KEY = "accord"


def encode(image_HWC: NDArray[np.uint8], mime_type: str, manifest: pb.ImageManifest) -> bytes:
    """uint8 RGB pixels as image/png, image/jpeg or image/webp."""
    if mime_type == "image/png":
        return encode_png(image_HWC, {MANIFEST_KEY: manifest_text(manifest)})
    buffer = io.BytesIO()
    kind = {"image/jpeg": "JPEG", "image/webp": "WEBP"}[mime_type]
    Image.fromarray(np.ascontiguousarray(image_HWC)).save(buffer, kind, quality=95)
    return buffer.getvalue()


def manifest_text(manifest: pb.ImageManifest) -> str:
    """JSON as protobuf spells it: json_format.Parse reads it back."""
    return json_format.MessageToJson(
        manifest, indent=None, sort_keys=True, preserving_proto_field_name=True, ensure_ascii=False
    )
