"""A full disk or a damaged file while data with latents is prepared, and after: nothing is lost or used unseen."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from latent_preparation import KINDS, contents, make
from test_damage import damages, each_damage, same_meaning
from test_full_disk import linux

from vrpo.data.journal import JOURNAL
from vrpo.data.shards import ShardedDataset, verify_dataset
from vrpo.errors import CheckpointError, DataError

Undisturbed = dict[str, dict[str, bytes]]
kinds = pytest.mark.parametrize("kind", KINDS)


class Stopped(Exception):
    """Raised by a preparation's progress."""


def interrupted(kind: str, sources: Path, out: Path, shards: int) -> list[Path]:
    """Prepare until ``shards`` shards are finished and return them."""

    def stop(done: int, total: int) -> None:
        if len(list(out.glob("shard-*"))) == shards:
            raise Stopped

    with pytest.raises(Stopped):
        make(kind, sources, out, progress=stop)
    return sorted(out.glob("shard-*"))


def make_and_verify(kind: str, sources: Path, out: Path) -> None:
    make(kind, sources, out)
    verify_dataset(out)


@linux
@kinds
def test_each_write_is_refused_once(
    kind: str,
    latent_sources: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
    refuse: Callable[[int], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = refuse(0)
    make(kind, latent_sources, tmp_path / "whole")
    monkeypatch.undo()
    names = [Path(file).name for file in seen]
    assert sum("shard-" in name for name in names) == len(undisturbed[kind]) - 1
    assert sum("progress" in name for name in names) >= len(undisturbed[kind]) - 1
    assert sum("manifest" in name for name in names) == 1
    for number in range(1, len(seen) + 1):
        out = tmp_path / f"refused-{number}"
        refuse(number)
        with pytest.raises(DataError, match=r"is full: free some space .*finished shards are kept"):
            make(kind, latent_sources, out)
        monkeypatch.undo()
        left = {name: content for name, content in contents(out).items() if name.startswith("shard")}
        assert all(undisturbed[kind][name] == content for name, content in left.items()), names[number - 1]
        times = {name: (out / name).stat().st_mtime_ns for name in left}
        noted = (out / JOURNAL).read_bytes().count(b'"shard-') if (out / JOURNAL).exists() else 0
        result = make(kind, latent_sources, out)
        assert result.already_complete or result.resumed_shards >= min(noted, len(left))
        assert contents(out) == undisturbed[kind], names[number - 1]
        kept = [name for name, time in times.items() if (out / name).stat().st_mtime_ns == time]
        # A shard that was refused the note of its being finished is made again; the others stay as they were.
        assert len(kept) >= len(left) - 1, names[number - 1]


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="this system bounds no file's size")
@kinds
def test_a_real_limit_of_the_system_leaves_what_was_there(
    kind: str, latent_sources: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    first, *_ = interrupted(kind, latent_sources, tmp_path / "out", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (first.stat().st_size - 1, hard))
    try:
        with pytest.raises(DataError, match=r"'.*' cannot be written: File too large\."):
            make(kind, latent_sources, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert first.read_bytes() == undisturbed[kind][first.name]
    assert not list((tmp_path / "out").glob(".*"))
    assert make(kind, latent_sources, tmp_path / "out").resumed_shards == 1
    assert contents(tmp_path / "out") == undisturbed[kind]


@kinds
def test_damage_of_a_finished_data_set_is_named_and_mended(
    kind: str, latent_sources: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make(kind, latent_sources, out)
    for file in sorted(out.iterdir()):

        def check(what: str, file: Path = file) -> None:
            try:
                verify_dataset(out)
                sentence = ""
            except DataError as error:
                sentence = str(error)
            if file.name == "manifest.json":  # a space that became another changes nothing
                assert file.name in sentence or same_meaning(file.read_bytes(), undisturbed[kind][file.name]), what
                return
            assert file.name in sentence, (what, sentence)
            assert "\n" not in sentence
            assert "and the shard is made again" in sentence
            if "delete" in sentence:
                file.unlink()
            others = {path: path.stat().st_mtime_ns for path in out.iterdir() if path != file}
            result = make(kind, latent_sources, out)
            assert (result.already_complete, result.remade_shards) == (True, 1)
            assert "had lost 1 shard, made again to the same bytes" in result.summary()
            assert contents(out) == undisturbed[kind], what
            assert {path: path.stat().st_mtime_ns for path in others} == others

        assert each_damage(file, check) >= 4
    shutil.rmtree(out)


@kinds
def test_damage_of_an_unfinished_data_set_costs_what_was_damaged(
    kind: str, latent_sources: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shards = interrupted(kind, latent_sources, out, 2)
    begun = contents(out)

    def restored() -> None:
        for file in out.iterdir():
            file.unlink()
        for name, content in begun.items():
            (out / name).write_bytes(content)

    header, *lines = begun[JOURNAL].splitlines(keepends=True)
    assert len(lines) == 2
    for number in range(3):
        parts = [header, *lines]
        (tmp_path / "line").write_bytes(parts[number])
        for what, content in damages(tmp_path / "line"):
            restored()
            (out / JOURNAL).write_bytes(b"".join([*parts[:number], content, *parts[number + 1 :]]))
            resumed = make(kind, latent_sources, out).resumed_shards
            if content.endswith(b"\n"):  # without an end it runs into the next line, and both are lost
                assert resumed == 2 - bool(number), (number, what)
            assert contents(out) == undisturbed[kind], (number, what)
    for shard in shards:
        for what, content in damages(shard):
            restored()
            shard.write_bytes(content)
            if len(content) == len(begun[shard.name]):  # found where all is looked at, and made again
                with pytest.raises(DataError, match=rf"{shard.name}.* delete the file and repeat"):
                    make_and_verify(kind, latent_sources, out)
                shard.unlink()
                assert make(kind, latent_sources, out).remade_shards == 1
            else:
                assert make(kind, latent_sources, out).resumed_shards == 1
            assert contents(out) == undisturbed[kind], (shard.name, what)


def test_a_damaged_autoencoder_does_not_go_on_with_the_work_of_a_whole_one(
    latent_sources: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(latent_sources, sources)
    interrupted("autoencoder", sources, tmp_path / "out", 1)
    begun = contents(tmp_path / "out")
    (weights,) = (sources / "kl").glob("*.safetensors")

    def check(what: str) -> None:
        with pytest.raises((DataError, CheckpointError), match="autoencoder"):
            make("autoencoder", sources, tmp_path / "out")
        assert contents(tmp_path / "out") == begun, what

    assert each_damage(weights, check) >= 4
    make("autoencoder", sources, tmp_path / "out")
    assert all(
        content == undisturbed["autoencoder"][name]
        for name, content in contents(tmp_path / "out").items()
        if name.startswith("shard")
    )


def test_a_shard_that_cannot_be_made_as_it_was_is_refused(
    latent_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another library or device makes other latents of the same weights."""
    from vrpo.vision.autoencoders import Autoencoder

    out, encode = tmp_path / "out", Autoencoder.encode
    make("autoencoder", latent_sources, out)
    before = contents(out)
    (out / "shard-00001.safetensors").unlink()
    monkeypatch.setattr(Autoencoder, "encode", lambda self, pixels: encode(self, pixels) * 1.01)
    with pytest.raises(DataError, match=r"shard-00001.safetensors' was lost, and making it again gives other bytes"):
        make("autoencoder", latent_sources, out)
    del before["shard-00001.safetensors"]
    assert contents(out) == before
    monkeypatch.undo()
    make("autoencoder", latent_sources, out)
    ShardedDataset(out).verify()
