"""From an encoded image to square uint8 pixels.

Colours are what ``PIL.Image.convert("RGB")`` makes of them, as in the field's loaders: palettes are looked
up, grey is repeated, an alpha channel is dropped without compositing. The EXIF orientation tag is not
applied.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vrpo.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

# PIL's own threshold for a decompression bomb; an image at the limit takes about 1.5 GB while it is
# converted.
MAX_PIXELS = 178_000_000

# Formats whose decoders run no other program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def decode(data: bytes, size: int, max_pixels: int = MAX_PIXELS, exact: bool = False) -> tuple[NDArray[np.uint8], bool]:
    """Decode one image to RGB and centre-crop it to uint8 (3, size, size); the flag says it was upscaled.

    With ``exact`` an image of another size is refused. The dimensions in the header are checked before anything is
    decoded, so memory stays below about eight bytes times ``max_pixels``. Raises DataError with the reason, whatever is
    wrong with the bytes.
    """
    with _opened(data) as image:
        width, height = image.size
        _check_dimensions(width, height, size, max_pixels)
        if exact and (width, height) != (size, size):
            raise DataError(f"it is {width} x {height} pixels and not {size} x {size}")
        pixels = np.asarray(centre_crop(_to_rgb(image), size))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), min(width, height) < size


def decode_whole(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode one image to RGB as it is, uint8 (H, W, 3); limits and errors are those of ``decode``."""
    with _opened(data) as image:
        _check_dimensions(*image.size, 1, max_pixels)
        return np.asarray(_to_rgb(image))


def image_size(data: bytes) -> tuple[int, int]:
    """Return an image's width and height from its header; errors are those of ``decode``."""
    with _opened(data) as image:
        return image.size


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image of a known format; whatever decoding raises becomes a DataError."""
    if not data:
        raise DataError("the file is empty")
    try:
        with _own_pixel_limit(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            yield image
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError("its content is no image of a known format") from error
    except Exception as error:  # decoders raise any type on damaged bytes
        raise DataError(_reason(error)) from error


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central ``size`` x ``size`` square after scaling the shorter side to ``size``.

    The field's definition (guided-diffusion, ``center_crop_arr``): halve with a box filter while the shorter
    side is at least twice the target, then resize bicubically, then crop. Smaller images are scaled up.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def mirror(images: Tensor, flipped: Tensor) -> Tensor:
    """Return images (B, C, H, W) with those left-right reversed where ``flipped`` (B,) is true."""
    return images.flip(-1).where(flipped[:, None, None, None], images)


def _check_dimensions(width: int, height: int, size: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DataError(f"{width} x {height} pixels exceed the limit of {max_pixels:,}; raise --max-pixels to read it")
    # A very long, narrow image would grow without bound when its shorter side is scaled up.
    scale = size / min(width, height)
    if scale > 1 and round(width * scale) * round(height * scale) > max_pixels:
        raise DataError(f"{width} x {height} pixels are too narrow to be scaled up to {size}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # PIL clips 16-bit grey at 255; the high byte is what it keeps of 16-bit colour.
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError("32-bit pixels have no defined range; save it with 8 or 16 bits per channel")
    if image.mode == "RGB":
        return image
    converted = image.convert("RGB")
    image.close()  # both at once are the peak of the memory taken
    return converted


def _reason(error: Exception) -> str:
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error)).strip()  # the same in every run
    return f"it cannot be decoded ({text or type(error).__name__})"


@contextmanager
def _own_pixel_limit() -> Iterator[None]:
    """Lift PIL's process-wide limit: the caller's own limit is checked from the header."""
    previous = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = previous
