"""Comparing runs: speed-up at equal quality, intervals over seeds, and one self-contained HTML report."""
