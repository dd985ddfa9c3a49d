"""Scores of generated images: distances and coverage in a feature network, each with its protocol."""
