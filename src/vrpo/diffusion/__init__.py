"""Interpolation paths between data and noise, denoising losses, and samplers."""
