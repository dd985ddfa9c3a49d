"""Keys and values of an attention layer of any library, read from its own projections by forward hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vrpo.errors import ConfigError

FUSED = "qkv"
SEPARATE = (("k_proj", "v_proj"), ("key", "value"))


class KeyValues:
    """What one forward pass of a block computed: keys and values (B, M, C), heads side by side, M with prefix.

    They are the projections' outputs: before any normalisation of keys and before rotary positions.
    """

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    @property
    def keys(self) -> Tensor:
        """The keys."""
        return self._found["keys"]

    @property
    def values(self) -> Tensor:
        """The values."""
        return self._found["values"]

    def keep(self, name: str, output: Tensor) -> None:
        """Keep a projection's output under ``name``, or all three of a fused one."""
        if name == FUSED:
            _, self._found["keys"], self._found["values"] = output.chunk(3, dim=-1)
        else:
            self._found[name] = output


@contextmanager
def read_keys_values(block: nn.Module, encoder: str) -> Iterator[KeyValues]:
    """Read the keys and values of ``block`` from the forward pass that runs inside this context.

    Raises:
        ConfigError: the block has no projections of its own, or several; the ``encoder`` is named.
    """
    found = KeyValues()

    def keeper(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found.keep(name, output)

        return hook

    hooks = [module.register_forward_hook(keeper(name)) for name, module in _projections(block, encoder).items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _projections(block: nn.Module, encoder: str) -> dict[str, nn.Module]:
    """Return the fused projection under ``qkv``, or those of ``keys`` and ``values``."""
    named: dict[str, list[nn.Module]] = {}
    for path, module in block.named_modules():
        named.setdefault(path.rpartition(".")[2], []).append(module)
    for key, value in SEPARATE:
        if len(named.get(key, ())) == len(named.get(value, ())) == 1:
            return {"keys": named[key][0], "values": named[value][0]}
    fused = named.get(FUSED, [])
    if len(fused) == 1 and isinstance(fused[0], nn.Linear):
        for module in block.modules():
            # timm's EVA adds its biases beside the layer only where asked to; else the layer is never called
            if hasattr(module, "qkv_bias_separate"):
                module.qkv_bias_separate = True  # type: ignore[assignment]
        return {FUSED: fused[0]}
    raise ConfigError(
        f"Encoder '{encoder}' keeps the keys and values of its attention where they cannot be read: choose a plain "
        "vision transformer such as dinov2-vit-b, or a convolutional network, whose tokens serve for both."
    )
