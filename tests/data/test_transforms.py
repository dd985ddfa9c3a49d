"""Decoding, the centre crop and the pixel conversions, against references written from their definitions."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from pictures import encode, noise_image
from PIL import Image

from vrpo.data.transforms import centre_crop, decode, mirror
from vrpo.errors import DataError
from vrpo.pixels import to_float, to_uint8


def resample_matrix(source: int, target: int, kernel, radius: float) -> np.ndarray:
    """Weights (target, source) of antialiased resampling by a kernel stretched by the scale."""
    stretch = max(source / target, 1.0)
    centres = (np.arange(target)[:, None] + 0.5) * (source / target)
    # As PIL writes it, because a sample on the very edge of a box is decided by the last bit.
    distances = (np.arange(source)[None] - centres + 0.5) * (1.0 / stretch)
    weights = np.where(np.abs(distances) <= radius, kernel(distances), 0.0)
    return weights / weights.sum(1, keepdims=True)


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x):
    x, a = np.abs(x), -0.5
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def resize(image: np.ndarray, height: int, width: int, kernel, radius: float, order: str) -> np.ndarray:
    """Resample in two passes, "hw" the vertical first, with bytes after each, halves rounded up."""
    weights = {
        "h": ("hwc,xh->xwc", resample_matrix(image.shape[0], height, kernel, radius)),
        "w": ("hwc,xw->hxc", resample_matrix(image.shape[1], width, kernel, radius)),
    }
    for axis in order:
        product, matrix = weights[axis]
        image = np.clip(np.floor(np.einsum(product, image.astype(float), matrix) + 0.5), 0, 255)
    return image


def adm_crops(image: np.ndarray, size: int) -> list[np.ndarray]:
    """The crop by every order of passes, which the definition leaves open and PIL chooses by cost."""
    height, width = image.shape[:2]
    if min(height, width) >= 2 * size:
        halves = [resize(image, height // 2, width // 2, box, 0.5, order) for order in ("hw", "wh")]
        return [crop for half in halves for crop in adm_crops(half, size)]
    scale = size / min(height, width)
    height, width = round(height * scale), round(width * scale)
    y, x = (height - size) // 2, (width - size) // 2
    resized = [resize(image, height, width, cubic, 2.0, order) for order in ("hw", "wh")]
    return [result[y : y + size, x : x + size] for result in resized]


@pytest.mark.parametrize(
    ("width", "height"),
    [(16, 16), (31, 33), (32, 32), (37, 103), (129, 65), (250, 16), (17, 64), (9, 14), (1, 1)],
)
def test_centre_crop_is_adms(width, height):
    image = noise_image(width + height, width, height)
    cropped = np.asarray(centre_crop(image, 16)).astype(float)
    assert cropped.shape == (16, 16, 3)
    differences = min((np.abs(cropped - crop) for crop in adm_crops(np.asarray(image), 16)), key=np.mean)
    # PIL's weights are fixed-point numbers, so a value close to a half may be rounded to the other side.
    assert differences.max() <= 1
    assert differences.mean() < 0.01


def adm_crop_by_pil(image, size):
    """ADM's crop from its definition: box halving down to less than twice the size, bicubic to the size, the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def test_centre_crop_is_adms_to_the_bit_on_200_odd_shapes():
    shapes = np.random.default_rng(0).integers(1, 260, (200, 2))
    for number, (width, height) in enumerate(shapes.tolist()):
        image, size = noise_image(number, width, height), (8, 16, 32, 33)[number % 4]
        assert np.array_equal(np.asarray(centre_crop(image, size)), adm_crop_by_pil(image, size)), (width, height, size)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (1024, 683), (2048, 1365), (511, 1025)])
def test_centre_crop_of_a_photograph_is_adms_to_the_bit(width, height):
    image = noise_image(width, width, height)
    cropped = np.asarray(centre_crop(image, 256))
    assert cropped.shape == (256, 256, 3)
    assert np.array_equal(cropped, adm_crop_by_pil(image, 256))


def test_image_of_the_target_size_is_untouched():
    image = noise_image(3, 32, 32)
    pixels, upscaled = decode(encode(image), 32)
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), np.asarray(image))
    assert not upscaled


def test_one_pixel_is_scaled_up():
    pixels, upscaled = decode(encode(Image.new("RGB", (1, 1), (9, 99, 199))), 8)
    assert upscaled
    assert (pixels == np.array([9, 99, 199]).reshape(3, 1, 1)).all()


def test_colour_modes_become_rgb():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    rgba = np.dstack([grey, grey // 2, 255 - grey, np.full_like(grey, 7)])
    palette = Image.fromarray(rgba[..., :3]).quantize(64)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 256 + 200)
    expected = np.broadcast_to(grey, (3, 8, 8))
    np.testing.assert_array_equal(decode(encode(Image.fromarray(grey)), 8)[0], expected)
    np.testing.assert_array_equal(decode(encode(sixteen), 8)[0], expected)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(rgba)), 8)[0], rgba[..., :3].transpose(2, 0, 1))
    np.testing.assert_array_equal(decode(encode(palette), 8)[0], np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    bits = Image.fromarray(grey > 100)
    np.testing.assert_array_equal(decode(encode(bits), 8)[0][0], np.where(grey > 100, 255, 0))


def test_orientation_tag_is_not_applied():
    image = noise_image(1, 8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    np.testing.assert_array_equal(decode(stream.getvalue(), 8)[0].transpose(1, 2, 0), np.asarray(image))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"just some text, and no image", "no image of a known format"),
        (encode(noise_image(0, 64, 64), "JPEG")[:-600], "cannot be decoded .*[Tt]runcated"),
        (encode(noise_image(0, 64, 64))[:-400], "cannot be decoded"),
        (encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "32-bit"),
        (encode(noise_image(0, 4, 4), "EPS"), "no image of a known format"),
    ],
    ids=["empty", "text", "jpeg", "png", "float", "eps"],
)
def test_bytes_that_cannot_be_used_give_a_stable_reason(data, words):
    with pytest.raises(DataError, match=words) as caught:
        decode(data, 8)
    assert "0x" not in str(caught.value)


def huge_png(side: int) -> bytes:
    """A valid 1-bit PNG of side x side black pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compressobj(1)
    line = bytes(1 + (side + 7) // 8)
    content = b"".join(rows.compress(line) for _ in range(side)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_huge_image_is_refused_from_its_header(tmp_path):
    file = tmp_path / "huge.png"
    file.write_bytes(huge_png(20_000))
    script = f"""
from pathlib import Path
from vrpo.data.transforms import decode
try:
    decode(Path({str(file)!r}).read_bytes(), 64)
except Exception as error:
    print(type(error).__name__, error)
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    message, megabytes = done.stdout.splitlines()
    assert message.startswith("DataError 20000 x 20000 pixels exceed the limit of 178,000,000")
    assert "--max-pixels" in message
    assert int(megabytes) < 200


def test_pixel_limit_is_the_callers_and_not_pils(monkeypatch):
    data = encode(noise_image(0, 20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode(data, 8, max_pixels=400)[0].shape == (3, 8, 8)
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(DataError, match="exceed the limit of 399"):
        decode(data, 8, max_pixels=399)


def test_narrow_image_cannot_fill_the_memory():
    with pytest.raises(DataError, match="too narrow"):
        decode(encode(Image.new("L", (60_000, 1))), 256)


def test_float_and_uint8_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8)
    images = to_float(pixels)
    assert images.dtype == torch.float32
    assert images[0] == -1
    assert images[-1] == 1
    torch.testing.assert_close(images.double(), torch.arange(256).double() / 127.5 - 1, atol=1e-7, rtol=0)
    assert torch.equal(to_uint8(images), pixels)


def test_to_uint8_is_the_floor_and_clamps():
    images = torch.tensor([-9.0, -1.01, -128 / 127.5, 0.0, 0.5 / 127.5 - 1e-6, 0.5 / 127.5 + 1e-5, 1.0, 9.0])
    assert to_uint8(images).tolist() == [0, 0, 0, 128, 128, 128, 255, 255]
    assert to_uint8(torch.tensor([0.999 / 127.5, 1.001 / 127.5])).tolist() == [128, 129]


def test_mirror_reverses_flagged_images_only():
    images = torch.arange(2 * 3 * 2 * 4).reshape(2, 3, 2, 4)
    mirrored = mirror(images, torch.tensor([False, True]))
    assert torch.equal(mirrored[0], images[0])
    assert mirrored[1].tolist() == [[row[::-1] for row in channel] for channel in images[1].tolist()]
