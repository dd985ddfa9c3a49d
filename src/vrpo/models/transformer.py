"""The diffusion transformer in its published form, as SiT (t in [0, 1]) and as DiT (steps 0..999)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vrpo.errors import ConfigError
from vrpo.models.layers import (
    Block,
    FinalLayer,
    LabelEmbedding,
    PatchEmbedding,
    RepresentationToken,
    TimeEmbedding,
    position_table,
)
from vrpo.models.taps import NO_TAPS, AttentionTap, Taps, TokenTap

Kind = Literal["SiT", "DiT"]
KINDS: tuple[Kind, ...] = ("SiT", "DiT")


@dataclass(frozen=True)
class Size:
    """Depth in blocks, hidden size and attention heads of a named model."""

    depth: int
    hidden_size: int
    num_heads: int


SIZES = {
    "N": Size(4, 96, 3),
    "Ti": Size(8, 192, 3),
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}
"""S to XL as published (arXiv 2212.09748, table 1); N and Ti are small enough to train on a CPU."""

PATCH_SIZES = (1, 2, 4, 8, 16)


class ModelName(NamedTuple):
    """A model's name in parts: "SiT-S/2" is kind "SiT", size "S", patch size 2."""

    kind: Kind
    size: str
    patch_size: int


MODEL_NAMES = {
    f"{kind}-{size}/{patch}": ModelName(kind, size, patch) for kind in KINDS for size in SIZES for patch in PATCH_SIZES
}


class DiffusionTransformer(nn.Module):
    """A transformer over patches, conditioned on time and class by adaLN-Zero (arXiv 2212.09748, 2401.08740).

    Args:
        input_size: height and width of the input, in pixels or latent cells.
        patch_size: side of a patch; must divide ``input_size``.
        in_channels: channels of the input.
        hidden_size: channels of a token; a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of a block's perceptron over ``hidden_size``.
        num_classes: classes, not counting the null class, which the label table always adds; 0 for none.
        learn_sigma: the output layer has twice the channels. A DiT returns them all (noise, then variance);
            a SiT drops the second half, which only the original SiT checkpoints carry.
        qk_norm: layer-normalise queries and keys.
        kind: "SiT" takes t in [0, 1], "DiT" the integer step 0..999; either enters the sinusoidal embedding
            as it is.
        token_width: channels of a class token that is denoised with the image as one more token (REG, arXiv
            2507.01467); 0 for none. ``add_token`` adds it later.
        checkpoint_blocks: recompute each block in the backward pass instead of keeping its activations; may
            also be set on the built model. Blocks with an attention tap keep theirs: a tap must run once.

    Raises:
        ConfigError: sizes that do not divide.
    """

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int,
        learn_sigma: bool = False,
        qk_norm: bool = False,
        kind: Kind = "SiT",
        token_width: int = 0,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(input_size, patch_size, hidden_size, num_heads)
        self.config: dict[str, Any] = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
            "qk_norm": qk_norm,
            "kind": kind,
            "token_width": 0,
        }
        self.kind = kind
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.checkpoint_blocks = checkpoint_blocks
        self.grid_size = input_size // patch_size

        self.patch_embedding = PatchEmbedding(in_channels, patch_size, hidden_size)
        self.time_embedding = TimeEmbedding(hidden_size)
        self.label_embedding = LabelEmbedding(num_classes, hidden_size) if num_classes else None
        # A function of the sizes, so never saved.
        self.register_buffer("position_table", torch.empty(1, self.num_tokens, hidden_size), persistent=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        layer_channels = in_channels * (2 if learn_sigma else 1)
        self.final = FinalLayer(hidden_size, patch_size**2 * layer_channels)
        self.token_width = 0
        self.representation: RepresentationToken | None = None
        self.initialise()
        if token_width:
            self.add_token(token_width)

    def add_token(self, width: int) -> None:
        """Give the model a representation token of ``width`` channels; its other weights stay as they are.

        Raises:
            ConfigError: the model is a DiT, whose discrete process has no velocity.
        """
        if self.kind == "DiT":
            raise ConfigError("A representation token is denoised by its velocity, which a DiT has not: use a SiT.")
        self.token_width = self.config["token_width"] = width
        self.representation = RepresentationToken(width, self.hidden_size)
        self._initialise_token(self.representation)

    @property
    def num_tokens(self) -> int:
        """Tokens an image is cut into, the representation token not counted."""
        return self.grid_size**2

    @property
    def out_channels(self) -> int:
        """Channels of the output: twice the input's for a DiT that learns its variance."""
        return self.in_channels * (2 if self.learn_sigma and self.kind == "DiT" else 1)

    @torch.no_grad()
    def initialise(self) -> None:
        """Set every weight as published, and fill the position table (needed again after ``to_empty``).

        Modulations and the output layer are zero, so that every block begins as the identity and the model
        returns exactly zero.
        """
        self.get_buffer("position_table").copy_(position_table(self.hidden_size, self.grid_size)[None])
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                # The patch embedding, too, is a linear map: of the flattened patch.
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.time_embedding.expand.weight, std=0.02)
        nn.init.normal_(self.time_embedding.output.weight, std=0.02)
        if self.label_embedding is not None:
            nn.init.normal_(self.label_embedding.table.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, (Block, FinalLayer)):
                nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.final.linear.weight)
        if self.representation is not None:
            self._initialise_token(self.representation)

    @staticmethod
    @torch.no_grad()
    def _initialise_token(token: RepresentationToken) -> None:
        nn.init.xavier_uniform_(token.embedding.weight)
        nn.init.zeros_(token.embedding.bias)
        token.norm.reset_parameters()
        nn.init.zeros_(token.output.weight)
        nn.init.zeros_(token.output.bias)

    @overload
    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, taps: Taps = NO_TAPS) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, taps: Taps = NO_TAPS, *, token: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        taps: Taps = NO_TAPS,
        *,
        token: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the prediction for noised images ``x`` (B, C, H, W) at times ``t`` (B,): (B, C or 2C, H, W).

        ``labels`` (B,) are integers in [0, num_classes], where num_classes is the null class; None stands for
        the null class everywhere, and is the only choice of an unconditional model. A model with a
        representation token takes the noised ``token`` (B, C_c) too, and returns its prediction beside the
        image's. It stands last; token taps see the image's tokens only, attention taps all of them.

        Raises:
            ConfigError: labels given to an unconditional model, a token to a model without one, or none to a
                model with one.
        """
        tokens = self.patch_embedding(x) + self.position_table
        if (token is None) != (self.representation is None):
            have, give = ("a", "its noised class token") if token is None else ("no", "none")
            raise ConfigError(f"The model has {have} representation token: pass {give}.")
        if token is not None and self.representation is not None:
            tokens = torch.cat([tokens, self.representation(token)], dim=1)
        condition = self.time_embedding(t)
        if self.label_embedding is not None:
            if labels is None:
                labels = torch.full_like(t, self.num_classes, dtype=torch.int64)
            condition = condition + self.label_embedding(labels)
        elif labels is not None:
            raise ConfigError("An unconditional model (num_classes 0) takes no labels: pass None.")
        for depth, block in enumerate(self.blocks, start=1):
            tokens = self._run_block(block, tokens, condition, taps.attention.get(depth))
            tap = taps.tokens.get(depth)
            if tap is not None:
                tokens = tap(tokens) if token is None else self._tap_image(tap, tokens)
        if self.representation is None:
            return self._unpatchify(self.final(tokens, condition))[:, : self.out_channels]
        image, last = tokens[:, : self.num_tokens], tokens[:, self.num_tokens :]
        output = self._unpatchify(self.final(image, condition))[:, : self.out_channels]
        return output, self.representation.output(self.final.modulated(last, condition)).squeeze(1)

    def _tap_image(self, tap: TokenTap, tokens: Tensor) -> Tensor:
        image, last = tokens[:, : self.num_tokens], tokens[:, self.num_tokens :]
        tapped = tap(image)
        return tokens if tapped is image else torch.cat([tapped, last.to(tapped.dtype)], dim=1)

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place (``options`` go to ``torch.compile``); token taps stay outside.

        The blocks share one compiled graph. A block whose attention a call taps runs uncompiled in that call.
        """
        for block in self.blocks:
            block.compile(**options)

    def _run_block(self, block: nn.Module, tokens: Tensor, condition: Tensor, tap: AttentionTap | None) -> Tensor:
        if tap is not None:
            # Module.__call__ without the compiled code but with the hooks, which sharding relies on.
            return block._call_impl(tokens, condition, tap)
        if self.checkpoint_blocks and torch.is_grad_enabled():
            # Blocks draw no random numbers, so there is no generator state to restore.
            return checkpoint(block, tokens, condition, use_reentrant=False, preserve_rng_state=False)
        return block(tokens, condition)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        side = self.patch_size
        cells = patches.unflatten(1, (self.grid_size, self.grid_size)).unflatten(-1, (side, side, -1))
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def parameter_count(module: nn.Module) -> int:
    """Return the number of trainable parameters; fixed tables are not counted."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def parse_model_name(name: str) -> ModelName:
    """Return kind, size and patch size of a name such as "SiT-S/2"; letter case is free.

    Raises:
        ConfigError: a name that is not in ``MODEL_NAMES``.
    """
    by_lower = {known.lower(): known for known in MODEL_NAMES}
    if name.lower() in by_lower:
        return MODEL_NAMES[by_lower[name.lower()]]
    stem = name.lower().rpartition("/")[0]
    # Of a known size, the patches that are used most.
    close = (
        [f"{stem}/2", f"{stem}/4"] if f"{stem}/2" in by_lower else difflib.get_close_matches(name.lower(), by_lower, 1)
    )
    hint = "names look like 'SiT-S/2' or 'DiT-XL/2'."
    if close:
        hint = f"did you mean {' or '.join(repr(by_lower[found]) for found in close)}?"
    raise ConfigError(f"There is no model '{name}': {hint}")


def build_transformer(
    name: str,
    *,
    input_size: int,
    in_channels: int,
    num_classes: int,
    qk_norm: bool = False,
    learn_sigma: bool | None = None,
    checkpoint_blocks: bool = False,
) -> DiffusionTransformer:
    """Build a model by name, such as "SiT-XL/2" or "DiT-S/4".

    ``learn_sigma`` None means the kind's habit: True for DiT, False for SiT (as in REPA, arXiv 2410.06940).

    Raises:
        ConfigError: an unknown name, or an input size that the patch size does not divide.
    """
    kind, size, patch_size = parse_model_name(name)
    return DiffusionTransformer(
        input_size=input_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=SIZES[size].hidden_size,
        depth=SIZES[size].depth,
        num_heads=SIZES[size].num_heads,
        num_classes=num_classes,
        learn_sigma=kind == "DiT" if learn_sigma is None else learn_sigma,
        qk_norm=qk_norm,
        kind=kind,
        checkpoint_blocks=checkpoint_blocks,
    )


def _check_sizes(input_size: int, patch_size: int, hidden_size: int, num_heads: int) -> None:
    if input_size % patch_size:
        lower = max(input_size // patch_size, 1) * patch_size
        fits = [side for side in PATCH_SIZES if input_size % side == 0]
        raise ConfigError(
            f"An input of {input_size} x {input_size} cannot be cut into patches of {patch_size}: "
            f"use a size such as {lower}, or a patch size of {' or '.join(map(str, fits))}."
        )
    if hidden_size % num_heads or hidden_size % 4:
        raise ConfigError(
            f"A hidden size of {hidden_size} does not suit {num_heads} heads: "
            "it must be a multiple of 4 and of the number of heads."
        )
