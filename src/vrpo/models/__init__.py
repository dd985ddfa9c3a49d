"""The diffusion transformers and their weights."""
