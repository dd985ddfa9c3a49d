"""Sets of images: divided, interrupted, resumed and written, they are the same images."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from small import make_run

from vrpo.cli import main
from vrpo.devices import DTYPES
from vrpo.errors import ConfigError
from vrpo.processes import ALONE
from vrpo.sampling import RunSampler
from vrpo.sampling.chunks import Chunks
from vrpo.sampling.draw import Order, Outputs, draw_images
from vrpo.sampling.sampler import ImageSampler
from vrpo.sampling.source import lower_weights


def source(run: Path, weights: Any = "ema", **settings: Any) -> RunSampler:
    return RunSampler(run, settings, weights, torch.device("cpu"))


def pixels(path: Path) -> NDArray[np.uint8]:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"]


def whole(run: Path, count: int, **settings: Any) -> NDArray[np.uint8]:
    """What a single pass in memory gives."""
    images, _ = source(run, **settings).draw(count, "balanced", 0)
    return images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("batch_size", [1, 5, 8, 100])
def test_batches_of_any_size_give_the_same_files(batch_size: int, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "images.npz"
    told: list[tuple[int, int]] = []
    draw_images(source(run, batch_size=batch_size), Order(22), Outputs(out), ALONE, lambda *done: told.append(done))
    assert (pixels(out) == whole(run, 22)).all()
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["arr_1"].tolist() == [index % 4 for index in range(22)]
    assert told[0] == (0, 22)
    assert told[-1] == (22, 22)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"], "nothing else is left"


def test_folder_npz_and_grid_of_one_drawing_agree(run: Path, tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "pngs", tmp_path / "images.npz", tmp_path / "grid.png", columns=2)
    order = Order(10, seed=3, labels="random", classes=(1, 2))
    draw_images(source(run), order, outputs, ALONE)
    images = pixels(tmp_path / "images.npz")
    names = [f"{index:06d}.png" for index in range(10)]
    assert sorted(path.name for path in outputs.out.iterdir()) == [*names, "sampling.json"]
    for name, image in zip(names, images, strict=True):
        assert (np.asarray(Image.open(outputs.out / name)) == image).all()
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (17, 17, 3)
    assert (grid[9:, 9:] == images[3]).all()
    record = json.loads((outputs.out / "sampling.json").read_text())
    with np.load(tmp_path / "images.npz", allow_pickle=False) as arrays:
        assert set(arrays["arr_1"].tolist()) == {1, 2}
        assert json.loads(str(arrays["sampling"])) == record
    expected = {"sampler": "ode-euler", "steps": 2, "seed": 3, "weights": "ema", "classes": [1, 2], "count": 10}
    assert expected.items() <= record.items()
    assert record["label_policy"] == "random over golden_retriever and Tench"


def test_a_smaller_set_leaves_nothing_of_a_larger_one(run: Path, tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "pngs")
    for count in (10, 3):
        draw_images(source(run), Order(count), outputs, ALONE)
    names = sorted(path.name for path in outputs.out.iterdir())
    assert names == ["000000.png", "000001.png", "000002.png", "sampling.json"]


def stop_after(saves: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let ``saves`` chunks be saved and raise at the next."""
    save, left = Chunks.save, [saves]

    def failing(self: Chunks, *arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error
        save(self, *arguments)

    monkeypatch.setattr(Chunks, "save", failing)


@pytest.mark.parametrize("kind", ["images.npz", "pngs"])
def test_interrupted_it_goes_on_where_it_was(
    kind: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = Outputs(tmp_path / kind, tmp_path / "other.npz")
    with monkeypatch.context() as patch:
        stop_after(1, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            draw_images(source(run, batch_size=8), Order(22), outputs, ALONE)
    drawn: list[int] = []
    batches = ImageSampler.batches

    def counted(self: ImageSampler, indices: Any, *rest: Any) -> Any:
        drawn.extend(indices)
        return batches(self, indices, *rest)

    monkeypatch.setattr(ImageSampler, "batches", counted)
    # Another size of chunks may finish what this one began.
    draw_images(source(run, batch_size=4), Order(22), outputs, ALONE)
    assert drawn == list(range(8, 22))
    monkeypatch.undo()
    assert (pixels(tmp_path / "other.npz") == whole(run, 22)).all()
    assert not list(tmp_path.glob(".*"))


def test_interrupted_while_writing_it_only_writes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = Outputs(tmp_path / "pngs")

    def full(*_: Any) -> None:
        (outputs.out / "000000.png").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vrpo.sampling.draw.write_pngs", full)
        with pytest.raises(OSError, match="No space"):
            draw_images(source(run), Order(6), outputs, ALONE)
    monkeypatch.setattr(ImageSampler, "batches", None)
    draw_images(source(run), Order(6), outputs, ALONE)
    monkeypatch.undo()
    assert (np.asarray(Image.open(outputs.out / "000000.png")) == whole(run, 6)[0]).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 3}, r"drawn with steps 2, not 3: finish them with that setting, or remove that folder"),
        ({"compute_batch": 8}, "drawn with compute batch 4, not 8"),
        ({"precision": "bf16"}, "drawn with precision fp32, not bf16"),
    ],
)
def test_unfinished_images_of_other_settings_are_refused(
    change: dict[str, Any], sentence: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = Outputs(tmp_path / "images.npz")
    stop_after(1, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        draw_images(source(run), Order(22), outputs, ALONE)
    with pytest.raises(ConfigError, match=sentence):
        draw_images(source(run, **change), Order(22), outputs, ALONE)
    for order in (Order(23), Order(22, seed=1), Order(22, classes=(0,)), Order(22, labels="random")):
        with pytest.raises(ConfigError, match="holds unfinished images"):
            draw_images(source(run), order, outputs, ALONE)
    with pytest.raises(ConfigError, match="drawn with weights ema, not raw"):
        draw_images(source(run, "raw"), Order(22), outputs, ALONE)
    trained_on = make_run(tmp_path / "run", step=9)
    with pytest.raises(ConfigError, match="drawn with step 8, not 9"):
        draw_images(source(trained_on), Order(22), outputs, ALONE)


def test_a_damaged_manifest_is_a_sentence(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / ".images.npz.drawing"
    folder.mkdir()
    (folder / "sampling.json").write_text("{")
    with pytest.raises(ConfigError, match=r"is damaged: remove .* to draw from the beginning"):
        draw_images(source(run), Order(4), Outputs(tmp_path / "images.npz"), ALONE)


@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_parts_begin_and_end_with_a_group(size: int, tmp_path: Path) -> None:
    chunks = Chunks(tmp_path / "out.npz", {}, 22, 4)
    chunks.open()
    parts = chunks.missing(size)
    assert [index for part in parts for index in part] == list(range(22))
    assert all(part.start % 4 == 0 and (part.stop % 4 == 0 or part.stop == 22) for part in parts)
    assert all(len(part) <= max(size, 4) for part in parts)
    for start, stop in ((4, 12), (20, 22)):
        chunks.save(start, np.full((stop - start, 2, 2, 3), start, dtype=np.uint8))
    assert [index for part in chunks.missing(size) for index in part] == [0, 1, 2, 3, *range(12, 20)]


def test_averaged_and_raw_weights_differ(run: Path) -> None:
    averaged, raw = (source(run, weights).draw(4, "balanced", 0)[0] for weights in ("ema", "raw"))
    assert not torch.equal(averaged, raw)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lowered_weights_give_what_autocast_gives(precision: str, run: Path) -> None:
    whole = source(run, precision=precision)
    kept = source(run)
    settings = kept.sampler.settings.model_copy(update={"precision": precision})
    plain = ImageSampler(kept.loaded.network, kept.loaded.config, device="cpu", settings=settings)
    labels = torch.arange(4)
    assert {parameter.dtype for parameter in whole.loaded.network.parameters()} == {torch.float32, DTYPES[precision]}
    assert torch.equal(whole.sampler.images(range(4), labels, 0), plain.images(range(4), labels, 0))
    before = kept.loaded.network.state_dict()
    lower_weights(kept.loaded.network, torch.float32)
    assert all(torch.equal(value, before[name]) for name, value in kept.loaded.network.state_dict().items())


# -- the command ------------------------------------------------------------------------------------------------------


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(words)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out + captured.err


def test_classes_are_named_on_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "images.npz")
    words = ["sample", str(run), "--out", out, "--count", "3", "--class", "golden retriever", "tench"]
    code, printed = said(words, capsys)
    assert (code, "3 images of" in printed) == (0, True)
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["arr_1"].tolist() == [1, 2, 1]


def test_mistakes_are_sentences_told_before_anything_is_drawn(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageSampler, "batches", None)
    unlabelled = make_run(tmp_path / "unlabelled", num_classes=0)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").touch()
    out = ["--out", str(tmp_path / "out")]
    for words, sentence in (
        ([str(run), *out, "--class", "goldn retriever"], "no class 'goldn retriever': did you mean 'golden retriever'"),
        ([str(unlabelled), *out, "--class", "tench"], "the model has no classes"),
        ([str(unlabelled), *out, "--guidance-scale", "2"], "sample.guidance_scale 2 needs classes"),
        ([str(run), *out, "--sampler", "ddim"], "does not fit SiT"),
        ([str(run), *out, "--guidance-interval", "0.9", "0.1"], "ends before it starts"),
        ([str(run), "--out", str(full)], "holds 'notes.txt', which vrpo sample did not write"),
        ([str(run), *out, "--npz", "images.zip"], "--npz images.zip is no .npz file"),
        ([str(run), *out, "--grid", "grid.jpg"], "--grid grid.jpg is no .png file"),
        ([str(run), "--out", "same.npz", "--npz", "same.npz"], "--npz and --out are both same.npz"),
        ([str(run), *out, "--clas", "tench"], "has no option '--clas': did you mean '--class'?"),
        ([str(run), *out, "--compute-batch", "0"], "--compute-batch cannot be 0"),
    ):
        code, printed = said(["sample", *words], capsys)
        assert (code, len(printed.splitlines())) == (2, 1), printed
        assert sentence in printed


def test_a_full_disk_is_a_sentence_and_the_command_goes_on_afterwards(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["sample", str(run), "--out", str(tmp_path / "images.npz"), "--count", "22", "--batch-size", "8"]
    sync, left = os.fsync, [2]  # the manifest and one chunk fit

    def failing(descriptor: int) -> None:
        left[0] -= stat.S_ISREG(os.fstat(descriptor).st_mode)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        code, printed = said(words, capsys)
    assert (code, "no space is left on the device: free some space" in printed) == (2, True)
    assert [path.name for path in (tmp_path / ".images.npz.drawing").glob("*.npy")] == ["00000000-00000008.npy"]
    assert said(words, capsys)[0] == 0
    assert (pixels(tmp_path / "images.npz") == whole(run, 22)).all()


# -- several processes ------------------------------------------------------------------------------------------------


def launch(words: list[str], size: int, program: Sequence[str] = ("-m", "vrpo")) -> list[subprocess.Popen[str]]:
    """Start processes as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, *program, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]


def test_two_processes_give_the_same_images_and_the_same_score(run: Path, tmp_path: Path) -> None:
    from vrpo.evaluation.evaluate import evaluate_images

    files = [tmp_path / "one.npz", tmp_path / "two.npz"]
    words = ["sample", str(run), "--count", "64", "--sampler", "sde", "--labels", "random"]
    words += ["--guidance-scale", "1.5", "--guidance-interval", "0.2", "0.7"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--out", str(files[0])])
    assert stop.value.code == 0
    for _ in range(2):  # another program may take the port that was free
        processes = launch([*words, "--out", str(files[1])], 2)
        printed = [process.communicate() for process in processes]
        if not any(process.returncode for process in processes):
            break
    assert [process.returncode for process in processes] == [0, 0], printed
    assert ["64 images of" in out for out, _ in printed] == [True, False], "the first process alone prints"
    assert "sampling: " not in printed[1][1]
    first, second = (dict(np.load(file, allow_pickle=False)) for file in files)
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    reference = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    scores = [evaluate_images(file, reference, Pooled(), metrics=("fd", "kid", "precision")).metrics for file in files]
    assert scores[0] == scores[1]


DISK_OF_THE_SECOND_IS_FULL = """
import errno, os, sys, time
from vrpo.cli import main
from vrpo.sampling.chunks import Chunks

save = Chunks.save

def full(self, *_):
    (self.folder / "full").touch()
    raise OSError(errno.ENOSPC, "No space left on device")

def slow(self, *rest):
    save(self, *rest)
    while not (self.folder / "full").exists():
        time.sleep(0.05)
    time.sleep(0.2)

Chunks.save = full if os.environ["RANK"] == "1" else slow
main(sys.argv[1:])
"""


def test_an_error_of_one_process_soon_ends_both_with_its_sentence(run: Path, tmp_path: Path) -> None:
    words = ["sample", str(run), "--count", "256", "--batch-size", "8", "--out", str(tmp_path / "images.npz")]
    for _ in range(2):  # another program may take the port that was free
        processes = launch(words, 2, ("-c", DISK_OF_THE_SECOND_IS_FULL))
        told = [process.communicate()[1] for process in processes]
        if not any("could not join" in text for text in told):
            break
    assert [process.returncode for process in processes] == [2, 2], told
    assert "no space is left on the device" in told[1]
    assert "vrpo: " not in told[0]
    assert "Traceback" not in "".join(told)
    kept = len(list((tmp_path / ".images.npz.drawing").glob("*.npy")))
    assert 1 <= kept <= 8, "the first process went on with its 16 chunks"


class Pooled:
    """A feature network that averages blocks of pixels."""

    name, weights_hash, input_size = "pooled", "0" * 64, 8

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.mark.soak
def test_a_mistake_under_a_launcher_is_told_once(run: Path, tmp_path: Path) -> None:
    processes = launch(["sample", str(run), "--out", str(tmp_path / "o"), "--class", "goldn"], 2)
    printed = "".join(process.communicate()[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert printed.count("there is no class 'goldn'") == 1
