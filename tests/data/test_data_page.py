"""docs/data.md, followed to the letter: every command that prepares or looks at data runs on small material."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encode, noise_image
from safetensors.torch import save_file
from source_files import table, write_table, write_tar

from latent_sources import write_repa
from test_docs import ROOT, commands
from vrpo.cli import main
from vrpo.data.shards import ShardedDataset, verify_dataset

COUNT = 6
CLASSES = ("bee", "cat")


@pytest.fixture
def material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which everything lies that the page speaks of; the named autoencoder is a small one."""
    from diffusers import AutoencoderKL

    from vrpo.vision import autoencoders

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vrpo.vision.hub._reachable", lambda endpoint: False)
    files = [encode(noise_image(seed, 256, 256)) for seed in range(COUNT)]
    for folder in ("photos", "imagenet/train"):
        for i, content in enumerate(files):
            file = tmp_path / folder / CLASSES[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        members = {}
        for i in range(shard, COUNT, 2):
            members |= {f"{i}.png": files[i], f"{i}.cls": str(i % 2).encode()}
        write_tar(tmp_path / "shards" / f"{shard}.tar", members)
    (tmp_path / "set").mkdir()
    write_table(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", table(files, 0, COUNT))
    shutil.make_archive("photos", "zip", tmp_path / "photos")
    blocks = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    encoder, decoder = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    network = AutoencoderKL(down_block_types=encoder, up_block_types=decoder, latent_channels=4, **blocks)
    network.save_pretrained(tmp_path / "kl")
    monkeypatch.setitem(autoencoders.HUB_NAMES, "sd-vae-ft-ema", str(tmp_path / "kl"))
    write_repa(tmp_path / "repa", files, tmp_path / "kl", size=256)
    (tmp_path / "latents").mkdir()
    for shard in range(2):
        content = {name: torch.randn(3, 32, 16, 16) for name in ("latents", "latents_flip")}
        file = tmp_path / "latents" / f"latents_rank00_shard{shard:03d}.safetensors"
        save_file(content | {"labels": torch.arange(3)}, file)
    return tmp_path


def test_every_command_does_what_the_page_says(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared: list[Path] = []
    page = [words for words in commands(ROOT / "docs" / "data.md") if words[0] == "vrpo" and len(words) > 3]
    for words in sorted(page, key=lambda words: words[1] == "data"):  # what looks at data comes after what makes it
        if words[1] not in ("prepare", "data") or "SOURCE" in words:
            continue
        with pytest.raises(SystemExit) as stop:
            main(words[1:])
        said = capsys.readouterr()
        if any(word.startswith("hf:") for word in words):
            assert stop.value.code == 2
            assert "'hf:OWNER/NAME' cannot be fetched (the hub cannot be reached, and it was not" in said.err
            continue
        assert not stop.value.code, said.err
        if words[1] == "prepare":
            prepared.append(Path(words[3]))
            assert verify_dataset(words[3]).counts.images == COUNT
    assert len(prepared) == len(set(prepared)) == 7, "a folder is named twice"
    for path in prepared:
        dataset = ShardedDataset(path)
        assert dataset.image_size == 256
        labels = dataset.labels()
        assert labels is not None
        assert len(np.unique(labels)) == (3 if path.name in ("repa", "lightning", "parquet") else 2)
    made = ShardedDataset(Path("data/imagenet256")).latents
    assert made is not None
    assert (made.autoencoder, made.channels, made.size, made.pixels) == ("sd-vae-ft-ema", 4, 32, True)
    assert Path("page.html").is_file()


def test_the_command_of_several_processes_is_the_command_of_one() -> None:
    """It differs by its launcher alone, which is tried in test_ranks.py."""
    words = [words for words in commands(ROOT / "docs" / "data.md") if "prepare" in words and "imagenet/train" in words]
    one = next(found for found in words if found[0] == "vrpo")
    several = next(found for found in words if found[0] == "torchrun")
    assert several[several.index("vrpo") :] == one
