"""What is an image, and decoding it to RGB within a bounded amount of memory."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import numpy as np

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".gif",
    ".avif",
    ".bmp",
    ".ppm",
    ".pgm",
    ".tif",
    ".tiff",
)
"""Extensions of image files. The content decides the format. Of an animation, the first frame is the image."""
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
"""First bytes of JPEG, PNG, GIF and TIFF files."""
NUM_FIRST_BYTES = 32
"""Number of bytes that tell the format of a file without an extension."""
MAX_PIXELS = 178_956_970
"""Maximum number of pixels of an image: pillow's limit, half a gigabyte in RGB."""
MAX_SIDES_RATIO = 100
"""Maximum ratio of the longer to the shorter side. A preprocessing resizes the shorter side to the model's image size,
so that a larger ratio would give more than 100 times the model's pixels."""


def is_image(name: str, first_bytes: Callable[[], bytes]) -> bool:
    """Return whether a file is an image: by its extension, or by its content if it has none.

    Args:
        name: the file's name.
        first_bytes: reads the first :data:`NUM_FIRST_BYTES` bytes. Called only if there is no extension.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix:
        return suffix in EXTENSIONS
    start = first_bytes()
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return start.startswith(SIGNATURES) or is_webp or start[4:12] in (b"ftypavif", b"ftypavis")


def decode_image(data: bytes, upright: bool = False) -> Any:
    """Decode an image to an RGB PIL image.

    Args:
        data: the encoded image.
        upright: turn it as its EXIF orientation says. Otherwise the orientation is ignored, as in open_clip and timm.

    Raises:
        OSError: or another of pillow's errors, if the image is damaged.
        ValueError: its pixel values have no known range, or it is too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise UnidentifiedImageError("its format is not known, or it is damaged at the beginning") from None
    with opened as image:
        _check_size(*image.size)
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # pillow would clip at 255
            return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
        if image.mode == "I" and image.format == "PPM":  # pillow scales every range to 16 bits
            return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(f"its values, pillow's mode {image.mode}, have no known range")
        return image.convert("RGB")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"its {width} × {height} pixels are more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_SIDES_RATIO * min(width, height):
        raise ValueError(f"its sides of {width} and {height} pixels differ by a factor of more than {MAX_SIDES_RATIO}")
