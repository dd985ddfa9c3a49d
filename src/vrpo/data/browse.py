"""A page of random samples of a data set, to see with one's own eyes what a model will learn from."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from vrpo.data.shards import ShardedDataset
from vrpo.files import write_text
from vrpo.untrusted import printable

_SHOWN = 160  # pixels of the page
_STYLE = f"""
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }}
h1 {{ overflow-wrap: anywhere }}
main {{ display: flex; flex-wrap: wrap; gap: 12px }}
figure {{ margin: 0; width: {_SHOWN}px }}
img {{ width: {_SHOWN}px; display: block }}
img.small {{ image-rendering: pixelated }}
figcaption {{ color: #555; font-size: 12px }}
figcaption b, figcaption span {{ display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3;
  overflow: hidden; overflow-wrap: anywhere; unicode-bidi: isolate }}
figcaption b {{ color: #222 }}
"""

Decode = Callable[[Tensor], Tensor]
"""From stored latents float16 (B, C, h, w) to uint8 images (B, 3, H, W)."""


def browse(dataset: ShardedDataset, out: Path, *, count: int, seed: int, decode: Decode | None = None) -> int:
    """Write an HTML page of ``count`` random rows with class and key, and return how many there are.

    With ``decode`` the images are those of the stored latents, with the pixels beside them where there are any;
    without it they are the pixels. The page holds its images, and nothing in it is taken for markup or code. Long names
    are cut off after three lines, and whole where the pointer rests on them.
    """
    rows = np.sort(np.random.default_rng(seed).choice(len(dataset), min(count, len(dataset)), replace=False))
    labels = dataset.labels()
    shown: list[Tensor] = []
    if dataset.holds_pixels:
        shown.append(dataset.read(rows)[0])
    if decode is not None:
        shown.append(decode(dataset.read_latents(rows)))
    figures = []
    for place, row in enumerate(rows.tolist()):
        name = "" if labels is None else _text("b", dataset.class_names[int(labels[row])])
        images = "".join(_image(part[place]) for part in shown)
        figures.append(f"<figure>{images}<figcaption>{name}{_text('span', dataset.key(row))}</figcaption></figure>")
    title = html.escape(printable(f"{dataset.manifest.source.name}: {len(rows)} of {len(dataset):,} samples"))
    about = html.escape(f"{dataset.image_size} px; fingerprint {dataset.fingerprint[:16]}; seed {seed}")
    what = "" if decode is None else " The images are decoded from the latents."
    if len(shown) == 2:
        what = " Above the stored pixels, below the decoded latents."
    write_text(
        out,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head>\n<body><h1>{title}</h1><p>{about}.{what}</p>\n<main>\n"
        + "\n".join(figures)
        + "\n</main></body></html>\n",
    )
    return len(rows)


def _text(tag: str, text: str) -> str:
    """Return text of the data as an element, with control characters shown as what they are."""
    escaped = html.escape(printable(text).replace("\n", "\\n"))
    return f'<{tag} title="{escaped}">{escaped}</{tag}>'


def _image(pixels: Tensor) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(stream, "PNG")
    small = ' class="small"' if pixels.shape[-1] < _SHOWN else ""
    return f'<img alt=""{small} src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'
