"""Killed at any moment, a preparation of data with latents goes on, and ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_preparations.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_a_preparation_with_latents_survives_every_kill(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["differing"] == []
    assert record["half_final"] == [], "a file under its final name is not whole"
    assert record["kills"] >= 60
    assert record["resumed"] >= record["kills"], "finished shards were made again"
    # Shards, their notes and the manifests were each cut in half, and each rename and flush was once the last thing.
    for moment in ("half of a write", "before fsync", "before replace", "before unlink"):
        assert record["moments"][moment] >= 10, moment
