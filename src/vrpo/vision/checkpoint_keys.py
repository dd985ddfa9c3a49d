"""Training checkpoints of self-supervised encoders, down to the encoder itself."""

from __future__ import annotations

from typing import Any

# MoCo-v3 saves the encoder that is trained, its momentum copy and a predictor; linear probes the encoder and a head.
MOCO_ENCODER = "base_encoder."
MOCO_OTHERS = ("momentum_encoder.", "predictor.")
# MAE's decoder paints the hidden patches; the encoder does without it.
MAE_DECODER = ("decoder_", "mask_token")


def plain_keys(state: dict[str, Any]) -> dict[str, Any]:
    """Return the encoder's own tensors under their plain names, without decoder, predictor and projection head.

    ``state`` has had its wrappers and the prefix ``module.`` taken off. What is not one of these checkpoints is
    returned as it is.
    """
    if any(key.startswith(MOCO_ENCODER) for key in state):
        own = {key.removeprefix(MOCO_ENCODER): value for key, value in state.items() if not key.startswith(MOCO_OTHERS)}
        return {key: value for key, value in own.items() if not key.startswith("head.")}
    if isinstance(state.get("encoder"), dict):  # I-JEPA: encoder, predictor and optimiser side by side
        return {str(key).removeprefix("module."): value for key, value in state["encoder"].items()}
    if "decoder_pos_embed" in state:
        return {key: value for key, value in state.items() if not key.startswith(MAE_DECODER)}
    return state
