"""Alignment objectives: what is added to denoising so that the trunk sees what an encoder sees."""
