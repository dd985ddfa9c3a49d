"""A flipped bit or a cut in any one file of a checkpoint, a data set or a run: found and named, never used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_run import tiny_config

from vrpo.checkpoints import find_checkpoints
from vrpo.errors import CheckpointError, ConfigError, DataError, VrpoError
from vrpo.files import sha256_file
from vrpo.runs import Run
from vrpo.training.trainer import Trainer


def damages(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield a name and the content for each way in which a file is damaged."""
    whole = file.read_bytes()
    for place in sorted({0, 9, len(whole) // 3, len(whole) // 2, len(whole) - 1}):
        if place < len(whole):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            yield f"bit of byte {place}", bytes(flipped)
    yield "half", whole[: len(whole) // 2]
    yield "all but a byte", whole[:-1]
    yield "nothing", b""


def each_damage(file: Path, check: Callable[[str], None]) -> int:
    whole, count = file.read_bytes(), 0
    for what, content in damages(file):
        file.write_bytes(content)
        try:
            check(what)
        finally:
            file.write_bytes(whole)
        count += 1
    return count


def restart(folder: Path, said: list[str] | None = None) -> Trainer:
    tell = (lambda sentence: None) if said is None else said.append
    return Trainer(tiny_config(folder / "data", sample_every=16), folder / "run", resume=True, say=tell)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_every_file_of_a_checkpoint(copy: Path) -> None:
    newest, older = find_checkpoints(copy / "run")
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) >= 5
    for file in files:
        relative = file.relative_to(newest)

        def check(what: str, file: Path = file, relative: Path = relative) -> None:
            from vrpo.training.checkpoint import find_newest

            found = find_newest(copy / "run")
            assert found is not None
            path, complaints = found
            assert path == older, f"{relative} with {what} was used"
            assert any(file.name in complaint for complaint in complaints), (relative, what, complaints)
            aside = newest.with_name(f"damaged-{newest.name}")
            if aside.is_dir():
                aside.rename(newest)

        assert each_damage(file, check) >= 4


def test_sampling_refuses_damaged_weights(copy: Path) -> None:
    import torch

    from vrpo.sampling.source import load_run

    newest = find_checkpoints(copy / "run")[0]
    (weights,) = [path for path in newest.rglob("*.safetensors") if "ema" in path.name]

    def check(what: str) -> None:
        with pytest.raises(CheckpointError, match=weights.name):
            load_run(copy / "run", "ema", torch.device("cpu"))

    each_damage(weights, check)
    load_run(copy / "run", "ema", torch.device("cpu"))


def test_every_file_of_a_data_set_and_its_token_cache(copy: Path) -> None:
    files = sorted(path for path in (copy / "data").rglob("*") if path.is_file())
    names = {path.name for path in files}
    assert {"manifest.json", "shard-00000.safetensors", "shard-00002.safetensors"} <= names
    assert any("tokens" in path.parts for path in files)
    for file in files:

        def check(what: str, file: Path = file) -> None:
            before, told = file.read_bytes(), ""
            try:
                restart(copy)
            except (DataError, CheckpointError) as error:
                told = str(error)
            assert not told or file.name in told, (file, what, told)
            # A part of the cache that is not whole is computed again; its index is rewritten as it was.
            assert told or "tokens" in file.parts or same_meaning(before, file.read_bytes()), (
                f"{file} with {what} was used"
            )

        whole = file.read_bytes()
        each_damage(file, check)
        assert file.read_bytes() == whole
    restart(copy)


def same_meaning(before: bytes, after: bytes) -> bool:
    """Whether both are the same JSON."""
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


def test_a_run_s_own_files(copy: Path) -> None:
    run = copy / "run"

    def refused_on_resume(what: str) -> None:
        with pytest.raises(VrpoError) as caught:
            restart(copy)
        assert "target_means" in str(caught.value), what

    each_damage(run / "target_means.safetensors", refused_on_resume)

    def refused_when_read(what: str) -> None:
        try:
            assert Run(run).config == whole, what
        except DataError as error:
            told.append(str(error))

    told: list[str] = []
    whole = Run(run).config
    each_damage(run / "config.yaml", refused_when_read)
    assert len(told) >= 4
    assert all("config.yaml" in sentence for sentence in told)

    facts = Run(run).info

    def facts_refused(what: str) -> None:
        try:
            assert Run(run).info == facts, what
        except DataError as error:
            told.append(str(error))

    told.clear()
    each_damage(run / "run.json", facts_refused)
    assert len(told) >= 4
    assert all("run.json" in sentence for sentence in told)


def test_a_line_of_telemetry(copy: Path) -> None:
    file = copy / "run" / "metrics.jsonl"
    whole = Run(copy / "run").metrics("train")

    def check(what: str) -> None:
        run = Run(copy / "run")
        kept = run.metrics("train")
        assert all(record in whole for record in kept), what

    each_damage(file, check)
    lines = file.read_bytes().splitlines(keepends=True)
    flipped = lines[1].replace(b'"denoising": 1.', b'"denoising": 3.')
    assert flipped != lines[1]
    file.write_bytes(lines[0] + flipped + b"".join(lines[2:]))
    assert Run(copy / "run").damaged_lines == 1
    said: list[str] = []
    trainer = restart(copy, said)
    trainer.train()
    assert any("1 damaged lines" in sentence and "metrics.jsonl" in sentence for sentence in said)


def test_a_configuration_changed_in_the_folder_is_refused(copy: Path) -> None:
    file = copy / "run" / "config.yaml"
    file.write_text(file.read_text().replace("weight: 0.5", "weight: 0.7", 1))
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read .*differs from its seal"):
        restart(copy)


def test_data_that_are_not_verified_on_request(copy: Path) -> None:
    shard = copy / "data" / "shard-00001.safetensors"
    digest = sha256_file(shard)
    content = bytearray(shard.read_bytes())
    content[-700] ^= 1
    shard.write_bytes(content)
    assert sha256_file(shard) != digest
    config = tiny_config(copy / "data", sample_every=16)
    unchecked = config.model_copy(update={"data": config.data.model_copy(update={"verify": False})})
    Trainer(unchecked, copy / "run", resume=True, say=lambda sentence: None)
    with pytest.raises(DataError, match="shard-00001"):
        restart(copy)
