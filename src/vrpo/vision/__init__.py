"""Frozen networks that see: encoders to align to, feature networks to score with."""
