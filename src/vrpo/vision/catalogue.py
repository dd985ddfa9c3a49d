"""The encoders that have a short name: where their weights are published, and what their tokens are."""

from __future__ import annotations

from dataclasses import dataclass

from vrpo.vision.backbone import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Entry:
    """One encoder.

    Attributes:
        timm: its name in timm, by which it is built.
        hub: its repository in the layout of transformers, or "" for none.
        patch: side of a patch in pixels.
        width, depth: channels of a token, and blocks.
        licence: of the weights.
        heads: attention heads where timm's architecture of that name has another number.
        statistics: mean and std where they are not timm's of that name.
        published: whether timm can fetch the weights; a local file is needed where not.
    """

    timm: str
    hub: str
    patch: int
    width: int
    depth: int
    licence: str
    heads: int | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    published: bool = True

    def input_size(self, grid: int) -> int:
        """Return the side in pixels at which its tokens are ``grid`` x ``grid``."""
        return grid * self.patch


APACHE, MIT, NON_COMMERCIAL, DINOV3 = "Apache-2.0", "MIT", "CC-BY-NC-4.0", "DINOv3 License"


def _dinov2(letter: str, size: str, width: int, depth: int) -> dict[str, Entry]:
    name, hub = f"dinov2-vit-{letter}", f"facebook/dinov2-{size}"
    timm, registers = f"vit_{size}_patch14_dinov2.lvd142m", f"vit_{size}_patch14_reg4_dinov2.lvd142m"
    return {
        name: Entry(timm, hub, 14, width, depth, APACHE),
        f"{name}-reg": Entry(registers, hub.replace("dinov2", "dinov2-with-registers"), 14, width, depth, APACHE),
    }


def _dinov3(size: str, hub: str, width: int, depth: int) -> Entry:
    repository = f"facebook/dinov3-{hub}-pretrain-lvd1689m"
    return Entry(f"vit_{size}_patch16_dinov3.lvd1689m", repository, 16, width, depth, DINOV3)


def _siglip2(size: str, hub: str, width: int, depth: int) -> Entry:
    repository = f"google/siglip2-{hub}-patch16-256"
    return Entry(f"vit_{size}_patch16_siglip_256.v2_webli", repository, 16, width, depth, APACHE)


def _mocov3(size: str, width: int, depth: int, heads: int | None = None) -> Entry:
    """An architecture that timm knows with other weights; the published files are converted on loading."""
    timm = f"vit_{size}_patch16_224"
    statistics = (IMAGENET_MEAN, IMAGENET_STD)
    return Entry(timm, "", 16, width, depth, NON_COMMERCIAL, heads, statistics, published=False)


ENCODERS: dict[str, Entry] = {
    **_dinov2("s", "small", 384, 12),
    **_dinov2("b", "base", 768, 12),
    **_dinov2("l", "large", 1024, 24),
    **_dinov2("g", "giant", 1536, 40),
    "dinov3-vit-s": _dinov3("small", "vits16", 384, 12),
    "dinov3-vit-b": _dinov3("base", "vitb16", 768, 12),
    "dinov3-vit-l": _dinov3("large", "vitl16", 1024, 24),
    "dinov3-vit-h": _dinov3("huge_plus", "vith16plus", 1280, 32),
    "dinov3-vit-7b": _dinov3("7b", "vit7b16", 4096, 40),
    # The released CLIP models compute GELU by its sigmoid approximation; timm's plain names do not.
    "clip-vit-b": Entry("vit_base_patch16_clip_quickgelu_224.openai", "openai/clip-vit-base-patch16", 16, 768, 12, MIT),
    "clip-vit-l": Entry(
        "vit_large_patch14_clip_quickgelu_224.openai", "openai/clip-vit-large-patch14", 14, 1024, 24, MIT
    ),
    "siglip2-vit-b": _siglip2("base", "base", 768, 12),
    "siglip2-vit-l": _siglip2("large", "large", 1024, 24),
    "siglip2-vit-so400m": _siglip2("so400m", "so400m", 1152, 27),
    "siglip2-vit-g": _siglip2("giantopt", "giant-opt", 1536, 40),
    "mae-vit-b": Entry("vit_base_patch16_224.mae", "facebook/vit-mae-base", 16, 768, 12, NON_COMMERCIAL),
    "mae-vit-l": Entry("vit_large_patch16_224.mae", "facebook/vit-mae-large", 16, 1024, 24, NON_COMMERCIAL),
    "mae-vit-h": Entry("vit_huge_patch14_224.mae", "facebook/vit-mae-huge", 14, 1280, 32, NON_COMMERCIAL),
    "ijepa-vit-h": Entry(
        "vit_huge_patch14_gap_224.in1k_ijepa", "facebook/ijepa_vith14_1k", 14, 1280, 32, NON_COMMERCIAL
    ),
    "ijepa-vit-g": Entry(
        "vit_giant_patch16_gap_224.in22k_ijepa", "facebook/ijepa_vitg16_22k", 16, 1408, 40, NON_COMMERCIAL
    ),
    # MoCo-v3's ViT-S has twice the usual heads (arXiv 2104.02057, section 5).
    "mocov3-vit-s": _mocov3("small", 384, 12, heads=12),
    "mocov3-vit-b": _mocov3("base", 768, 12),
    "mocov3-vit-l": _mocov3("large", 1024, 24),
}

TABLE_HEAD = "| name | built by timm as | transformers | input, tokens at 256 px | width | licence of the weights |"


def table() -> str:
    """Return the table of docs/encoders.md: what each short name stands for, for a trunk of 16 x 16 tokens."""
    lines = [TABLE_HEAD, "|---|---|---|---|---|---|"]
    for name, entry in ENCODERS.items():
        size = entry.input_size(16)
        hub = f"`{entry.hub}`" if entry.hub else "none"
        lines.append(f"| `{name}` | `{entry.timm}` | {hub} | {size} px, 16 x 16 | {entry.width:,} | {entry.licence} |")
    return "\n".join(lines)
