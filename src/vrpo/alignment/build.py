"""From a configuration to an alignment objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from vrpo.alignment.image_distance import Distance, WithImageDistance
from vrpo.alignment.objective import Objective
from vrpo.alignment.scaffold import WithScaffold
from vrpo.alignment.static import Contrastive, Irepa, Repa
from vrpo.alignment.token import WithToken
from vrpo.config import AlignConfig
from vrpo.errors import ConfigError
from vrpo.models.transformer import SIZES, DiffusionTransformer, parse_model_name


def default_depth(model_size: str, model_depth: int) -> int:
    """Return the block, counted from 1, after which tokens are aligned by default.

    8 for L and XL, 4 for S and B (arXiv 2410.06940), a third of the blocks for other sizes; never the last
    block, after which none is left to generate.
    """
    depth = {"L": 8, "XL": 8, "S": 4, "B": 4}.get(model_size, round(model_depth / 3))
    return max(1, min(depth, model_depth - 1))


@dataclass(frozen=True)
class TrunkShape:
    """What an objective knows of the transformer: channels, blocks, heads, the N tokens of its grid, its size's letters
    (S, B, L, XL, Ti, N), which decide the default depth.
    """

    hidden_size: int
    depth: int
    num_heads: int
    tokens: int
    size: str = ""

    @classmethod
    def of(cls, trunk: DiffusionTransformer, name: str) -> TrunkShape:
        """Return the shape of a transformer built as ``name``, such as SiT-B/2."""
        _, size, _ = parse_model_name(name)
        return cls(trunk.hidden_size, trunk.depth, SIZES[size].num_heads, trunk.num_tokens, size)


def build_objective(
    config: AlignConfig,
    trunk: TrunkShape,
    encoder_widths: Sequence[int],
    key_value_widths: tuple[int, int] = (0, 0),
    distance: Distance | None = None,
) -> Objective:
    """Return the objective that ``config`` names.

    ``encoder_widths`` are the channels C_e of each encoder, ``key_value_widths`` those of the first encoder's keys and
    values where a scaffold reads them, ``distance`` what ``load_distance`` made of its image distance.

    Raises:
        ConfigError: blocks that the transformer does not have, a grid that the objective cannot use, no encoder.
    """
    supply = config.supply
    if not encoder_widths and (config.side != "none" or config.uses_token or supply != "none"):
        raise ConfigError(
            f"align.objective '{config.objective}' needs an encoder: set encoder.name or align.objective none."
        )
    objective = _build_side(config, trunk, encoder_widths)
    if supply != "none":
        depth = scaffold_depth(config, trunk.size, trunk.depth)
        key_width, value_width = key_value_widths
        objective = WithScaffold(
            objective,
            config.scaffold,
            by_advantage=supply == "advantage",
            depth=depth,
            hidden_size=trunk.hidden_size,
            num_heads=trunk.num_heads,
            key_width=key_width,
            value_width=value_width,
        )
    if config.uses_token:
        objective = WithToken(objective, config.token)
    return objective if distance is None else WithImageDistance(objective, distance, config.perceptual_image)


def scaffold_depth(config: AlignConfig, model_size: str, model_depth: int) -> int:
    """Return the block, counted from 1, whose keys and values are supplied: by default half the alignment depth.

    Raises:
        ConfigError: the model does not have it, or it lies above the first aligned block.
    """
    aligned = min(config.depth or (default_depth(model_size, model_depth),))
    depth = config.scaffold.depth or max(1, aligned // 2)
    check_depths("align.scaffold.depth", (depth,), model_depth)
    if depth > aligned and config.side != "none":
        raise ConfigError(
            f"align.scaffold.depth {depth} lies above block {aligned}, whose tokens are aligned: use {aligned} or less."
        )
    return depth


def _build_side(config: AlignConfig, trunk: TrunkShape, encoder_widths: Sequence[int]) -> Objective:
    """Return the objective of the side head."""
    name = config.side
    if name == "none":
        return Objective()
    depths = config.depth or (default_depth(trunk.size, trunk.depth),)
    check_depths("align.depth", depths, trunk.depth)
    check_depths("align.haste.attention_depths", config.haste.attention_depths, trunk.depth)
    common: dict[str, Any] = {
        "hidden_size": trunk.hidden_size,
        "depths": depths,
        "encoder_widths": encoder_widths,
    }
    if name == "vrpo":
        from vrpo.alignment.vrpo import Vrpo

        return Vrpo(config, tokens=trunk.tokens, **common)
    if name == "haste":
        from vrpo.alignment.haste import Haste

        return Haste(config, num_heads=trunk.num_heads, **common)
    if name == "irepa" and isqrt(trunk.tokens) ** 2 != trunk.tokens:
        raise ConfigError(
            f"align.objective 'irepa' convolves over a square grid but the model has {trunk.tokens} tokens: "
            "use square images, or align.objective repa."
        )
    kind = {"repa": Repa, "irepa": Irepa, "contrastive": Contrastive}[name]
    return kind(config, **common)


def check_depths(field: str, depths: Sequence[int], model_depth: int) -> None:
    """Raise ConfigError where one of ``depths`` is not a block of the model or repeats another."""
    for depth in depths:
        if not 1 <= depth <= model_depth:
            closest = f"{model_depth}, the deepest" if depth > model_depth else "1, the first"
            raise ConfigError(f"{field} {depth} is not a block of this model, which has {model_depth}: use {closest}.")
    if len(set(depths)) < len(depths):
        raise ConfigError(f"{field} {', '.join(map(str, depths))} names a block twice: name each once.")
