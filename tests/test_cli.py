"""The command line: answers at once, exits 2 with one sentence, does whole jobs."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vrpo.cli import COMMANDS, main
from vrpo.config_load import parser_words


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(words)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_help_imports_nothing_heavy() -> None:
    heavy = "torch, numpy, tyro, pydantic, rich, timm, PIL"
    code = (
        "import sys\nfrom vrpo.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"assert not set('{heavy}'.split(', ')) & set(sys.modules), set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([*name.split(), "--help"], capsys)
    assert code == 0
    assert f"vrpo {name}" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("trian", "there is no command 'trian': did you mean 'train'?"),
        ("data verfy x", "there is no command 'data verfy': did you mean 'verify'?"),
        ("prepare nowhere out --size 32", "there is no 'nowhere': name a folder or a zip archive of images."),
        ("prepare a b --size 32 --flp", "vrpo prepare has no option '--flp': did you mean '--flip'?"),
        ("prepare a b --size big", "--size cannot be 'big': it should be a valid integer"),
        ("prepare a --size 3", "vrpo prepare needs SOURCE, OUT and --size: see `vrpo prepare --help`."),
        ("prepare a b --size 0", "--size cannot be 0: it should be greater than or equal to 1."),
        ("prepare . b --size 100000", "--size 100000 is more than can be prepared: give at most 4,096 pixels."),
        ("prepare a b --size 8 --shard-mb 0", "--shard-mb cannot be 0"),
        ("prepare a b --size 8 --workers 0", "--workers cannot be 0"),
        ("sample r --out x --count 0", "vrpo sample: --count cannot be 0: it should be greater than 0."),
        ("sample r --out x --count -3", "--count cannot be -3"),
        ("sample r --out x --count 1.5", "--count cannot be '1.5': write a count such as 50000, 50k or 2M."),
        ("sample r --out x --steps 0", "--steps cannot be 0"),
        ("sample r --out x --batch-size 0", "--batch-size cannot be 0"),
        ("sample r --out x --columns 0", "--columns cannot be 0"),
        ("sample r --out x --seed -1", "--seed cannot be -1"),
        ("sample r --out x --guidance-scale inf", "--guidance-scale cannot be inf: it should be a finite number."),
        ("sample r --out x --guidance-interval 0", "--guidance-interval has too few values"),
        ("sample r --out x --guidance-interval 0 x", "--guidance-interval cannot be 'x'"),
        (
            "evaluate . --reference r --features f --metrics fid",
            "--metrics cannot be 'fid': did you mean 'sfid' or 'fd'?",
        ),
        ("train --out r --resume --rewind 1.5", "--rewind cannot be '1.5': write a count such as 50000, 50k or 2M."),
        ("train --out nowhere --resume --rewind 56k", "there is no run at nowhere"),
        ("train --train.learning-rate 1", "there is no option '--train.learning-rate': did you mean '--train.lr'?"),
        ("compare . --out r.png", "--out r.png is no name of an HTML file: write r.html."),
        ("data browse . --html p.png", "--html p.png is no name of an HTML file: write p.html."),
        ("train --cfg-scale 2", "there is no option '--cfg-scale': `vrpo train --help` lists all"),
        ("sample r --out x --sampler euler", "--sampler cannot be 'euler': did you mean 'ode-euler'?"),
        ("sample r --out x --setps 3", "vrpo sample has no option '--setps': did you mean '--steps'?"),
        ("sample r --out", "--out has no value: give one."),
        ("sample r s --out x", "vrpo sample did not expect 's'"),
        ("sample r --out x --class frog --class ship", "--class is given twice: write its values one after another"),
        ("sample r --out x --batch-size 2 --batch_size=4", "vrpo sample: --batch-size is given twice: give it once."),
        ("sample r --out x --compile --no-compile", "vrpo sample: --no-compile is given twice: give it once."),
        ("evaluate . --reference r --features f --metrics fd --metrics kid", "--metrics is given twice: write its"),
        ("train --preset a --preset b --train.lr 1", "vrpo train: --preset is given twice: give it once."),
        ("sample r --out x.jpg", "--out x.jpg is neither a folder nor .png nor .npz"),
        ("encoder fit d --out e --minutes 0", "--minutes cannot be 0"),
        ("encoder fit d --out e --minutes nan", "--minutes cannot be nan: it should be a finite number."),
        ("encoder fit d --out e --width 0", "--width cannot be 0"),
        ("encoder fit d --out e --grid 0", "--grid cannot be 0"),
        ("encoder fit d --out .", "--out . is a folder: give the name of a file in it."),
        ("evaluate . --reference r --features f --samples 1", "--samples cannot be 1"),
        ("evaluate . --reference r --features f --metrics", "--metrics has no value: give at least one."),
        ("evaluate . --reference nowhere --features f", "there is nothing at --reference nowhere"),
        ("demo --objectives", "--objectives has no value: give at least one."),
        ("demo --minutes inf", "--minutes cannot be inf"),
        ("train --resum", "there is no option '--resum': did you mean '--resume'?"),
        ("train --resume auto --out nowhere", "there is no run at nowhere: begin one with --preset or --config"),
        ("train --resume=auto --out nowhere", "there is no run at nowhere"),
        ("train --resume maybe", "'maybe' was not expected"),
        ("train --resume auto auto", "'auto' was not expected"),
        ("train --otu x", "there is no option '--otu': did you mean '--out'?"),
        ("train --train.images inf", "train.images cannot be 'inf': write a count"),
        ("train --train.images 1.5", "train.images cannot be '1.5': write a count"),
        ("train --train.lr", "train.lr has no value"),
        ("compare . --out .", "--out . is a folder: give the name of a file in it."),
        ("train --preset cifar", "there is no preset 'cifar'"),
        ("train --data nowhere", "nowhere"),
        ("train", "data.path is not set: give a folder made by `vrpo prepare SOURCE OUT --size N`."),
        ("compare", "vrpo compare needs at least one run"),
        ("compare nowhere", "no run at"),
        ("evaluate --reference r --features f", "needs something to score"),
        ("evaluate stats . --out x.npy --features f", "--out x.npy is no .npz file"),
        ("evaluate stats nowhere --out x.npz --features f", "there is nothing at nowhere"),
        ("evaluate parity a b --expect fdd=1", "--expect fdd=1 names no metric: did you mean 'fd'?"),
        ("evaluate parity a b --expect fd=x", "--expect fd=x gives no number"),
        ("evaluate parity a b", "there is nothing at a"),
        ("evaluate cknna nowhere", "no run at nowhere"),
        ("evaluate probe nowhere", "no run at nowhere"),
        ("evaluate cknna . --times 1.5", "--times cannot be 1.5"),
        ("evaluate nowhere --reference r --features f", "there is nothing at nowhere"),
        ("sample nowhere --out x", "no run at nowhere"),
        ("demo --objectives nome", "there is no objective 'nome': did you mean 'none'?"),
        ("data verify nowhere", "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(words.split(), capsys)
    assert code == 2
    assert err.startswith("vrpo: ")
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_a_single_image_is_one_and_a_file_is_no_folder_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "cat" / "0.png")
    (tmp_path / "notes.txt").write_text("kept")
    words = ["prepare", str(tmp_path / "images")]
    code, out, _ = run([*words, str(tmp_path / "data"), "--size", "8"], capsys)
    assert code == 0
    assert "\n1 image of 8 x 8 (1 class) in" in out
    assert run(["data", "info", str(tmp_path / "data")], capsys)[1].startswith("1 image of 8 x 8, 1 class, from images")
    code, _, err = run([*words, str(tmp_path / "notes.txt"), "--size", "8"], capsys)
    assert (code, err) == (2, f"vrpo: '{tmp_path / 'notes.txt'}' is a file: name a folder to write.\n")
    assert (tmp_path / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("columns", ["20", "200"])
def test_sentences_hold_no_frame_and_no_path_of_the_program(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complaints of the parser itself, whatever the terminal's width or encoding."""
    monkeypatch.setenv("COLUMNS", columns)
    for words in ("sample", "evaluate x", "train --config --preset p", "train --train.batch-size x"):
        _, _, err = run(words.split(), capsys)
        assert "---" not in err
        assert not set(err) & set("╭╮╰╯│─")
        assert sys.argv[0] not in err
    framed = parser_words(
        "╭─ Value error ─╮\n│ Bad --out, a  │\n│ word.  │\n│ ───── │\n│ For full helptext, see /x │\n"
    )
    plain = parser_words(" Value error\n ------\n  Bad --out, a\n  word.\n  ------\n  For full helptext, see /x\n")
    assert framed == plain == "Bad --out, a word"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("evaluate run --reference run --features f --out file/e.json", "lies inside file, which is a file"),
        ("evaluate run --reference run --features f --out run", "--out run is a folder"),
        ("sample run --out file", "--out file is a file"),
        ("sample run --out file/images", "lies inside file, which is a file"),
        ("sample run --out file/deep/grid.png", "lies inside file, which is a file"),
        ("sample run --out images.jpg", "neither a folder nor .png nor .npz"),
        ("evaluate run --reference run --features f --samples 3", "--samples 3 is too few"),
        ("evaluate run --reference empty --features f --samples 8", "is empty: give a folder or zip"),
    ],
)
def test_nothing_is_drawn_before_all_is_checked(
    words: str,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Undrawn:
        def __init__(self, *_: object) -> None: ...

        def labels(self, *_: object) -> None:
            raise AssertionError("images were drawn first")

    monkeypatch.setattr("vrpo.sampling.RunSampler", Undrawn)
    monkeypatch.setattr("vrpo.vision.encoders.load_feature_network", lambda *_, **__: Pooled())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "file").touch()
    code, _, err = run(words.split(), capsys)
    assert (code, len(err.splitlines())) == (2, 1)
    assert sentence in err


class Pooled:
    """A feature network in name only."""

    name, family, weights_hash, input_size = "pooled", "test", "0", 8


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (IsADirectoryError(errno.EISDIR, "Is a directory", "there"), "there: is a directory: give the name of a file"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left on the device: free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "there"), "there: permission denied: give a path that"),
        (OSError("a library's\nown words."), "a library's own words: correct that and run the command again."),
    ],
)
def test_errors_of_the_system_are_sentences(
    error: OSError, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("vrpo.commands.training.presets", fail)
    code, _, err = run(["presets"], capsys)
    assert code == 2
    assert err.startswith("vrpo: ")
    assert sentence in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "function", "remedy"),
    [
        ("prepare", "data.prepare", "run the same command again to go on."),
        ("train", "training.train", "go on from the newest checkpoint by adding --resume."),
        ("sample", "images.sample", "run the same command again to go on."),
        ("encoder fit", "data.encoder_fit", "run the command again to start over."),
    ],
)
def test_interruption_says_how_to_go_on(
    name: str, function: str, remedy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"vrpo.commands.{function}", interrupt)
    code, _, err = run(name.split(), capsys)
    assert (code, err) == (130, f"vrpo: interrupted; {remedy}\n")


def test_interruption_is_told_by_the_first_process_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vrpo.commands.images.sample", interrupt)
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        code, _, err = run(["sample"], capsys)
        assert (code, "interrupted" in err) == (130, said)


@pytest.mark.parametrize(
    ("spent", "reason"),
    [
        (lambda: torch.empty(10**15), "DefaultCPUAllocator: can't allocate memory"),
        (lambda: np.empty(10**15), "Unable to allocate"),
        (lambda: [0] * 10**18, "the machine has no more"),
    ],
)
def test_memory_that_runs_out_is_one_sentence(
    spent: Callable[[], object], reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vrpo.commands.training.train", lambda words: spent())
    code, _, err = run(["train"], capsys)
    assert code == 2
    assert err.startswith("vrpo: memory ran out (")
    assert reason in err
    assert err.endswith("): use smaller batches, and see `vrpo plan`.\n")


def test_python_minus_m() -> None:
    done = subprocess.run([sys.executable, "-m", "vrpo", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("vrpo ")


def test_from_images_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prepare, fit, train two objectives, sample, evaluate, compare: by the commands alone."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for name, bright in (("dark", 60), ("light", 190)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for index in range(24):
            pixels = generator.normal(bright, 20, (20, 24, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    data, encoder = str(tmp_path / "data"), str(tmp_path / "encoder.safetensors")
    code, out, _ = run(["prepare", str(tmp_path / "images"), data, "--size", "16", "--workers", "1"], capsys)
    assert (code, "48 images of 16 x 16 (2 classes)" in out) == (0, True)
    code, out, _ = run(["data", "info", data], capsys)
    assert "dark: 24" in out
    assert run(["data", "verify", data], capsys)[0] == 0
    code, out, _ = run(["encoder", "fit", data, "--out", encoder, "--minutes", "0.02", "--width", "16"], capsys)
    assert (code, "accuracy" in out) == (0, True)
    small = "--model.name SiT-N/4 --train.images 64 --train.batch-size 8 --train.log-every 16 --sample.steps 2"
    for objective in ("none", "repa"):
        words = ["train", "--data", data, "--out", str(tmp_path / objective), *small.split()]
        words += ["--align.objective", objective, "--encoder.name", "vrpo-conv", "--encoder.weights", encoder]
        words += ["--data.validation", data, "--train.validate-every", "16", "--train.sample-every", "32"]
        code, out, _ = run(words, capsys)
        assert (code, "Finished at 64 images" in out) == (0, True)
        judge = ["--reference", data, "--features", encoder, "--samples", "16", "--metrics", "fd", "kid"]
        code, out, _ = run(["evaluate", str(tmp_path / objective), *judge], capsys)
        assert (code, "Protocol: 16 samples" in out) == (0, True)
    files = tmp_path / "repa" / "evaluations"
    for change in ([], ["--samples", "12"], ["--seed", "1"], ["--metrics", "fd"], ["--weights", "raw"]):
        before = set(files.iterdir())
        # an option is given once: the change takes the place of what the judge said before
        kept = judge[: judge.index(change[0])] if change and change[0] in judge else judge
        rest = judge[len(kept) :][3 if change[:1] == ["--metrics"] else 2 :]
        assert run(["evaluate", str(tmp_path / "repa"), *kept, *rest, *change], capsys)[0] == 0
        new = set(files.iterdir()) - before
        assert len(new) == bool(change), "another protocol keeps the earlier file, the same one renews it"
        assert all(":" not in file.name and file.name.startswith("step-00000008-vrpo-conv-") for file in new)
    check_other_evaluations(tmp_path, data, encoder, capsys)
    for target in ("grid.png", "images.npz", "folder"):
        words = ["sample", str(tmp_path / "repa"), "--out", str(tmp_path / target), "--count", "5"]
        assert run(words, capsys)[0] == 0
    with np.load(tmp_path / "images.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (5, 16, 16, 3)
        assert arrays["arr_1"].tolist() == [0, 1, 0, 1, 0]
        third = np.asarray(Image.open(tmp_path / "folder" / "000002.png"))
        assert (third == arrays["arr_0"][2]).all()
    report = tmp_path / "report.html"
    code, out, _ = run(["compare", str(tmp_path / "none"), str(tmp_path / "repa"), "--out", str(report)], capsys)
    assert code == 0
    assert "<svg" in report.read_text()


def check_other_evaluations(tmp_path: Path, data: str, encoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Saved statistics, several sources in one table, published values, CKNNA and probes."""
    images, stats, runs = (
        str(tmp_path / "images"),
        tmp_path / "stats.npz",
        [str(tmp_path / n) for n in ("none", "repa")],
    )
    code, out, _ = run(["evaluate", "stats", data, "--out", str(stats), "--features", encoder], capsys)
    assert (code, "48 images" in out) == (0, True)
    several = ["evaluate", *runs, data, "--features", encoder, "--metrics", "fd", "recall", "--out"]
    values = []
    for reference in (data, str(stats)):
        words = [*several, str(tmp_path / "all.json"), "--reference", reference, "--samples", "16"]
        code, out, _ = run(words, capsys)
        assert (code, "repa" in out) == (0, True)
        records = json.loads((tmp_path / "all.json").read_text())["evaluations"]
        assert [(record["source"], record["protocol"]["sample_count"]) for record in records] == [
            (source, 16) for source in (*runs, data)
        ]
        values.append([record["metrics"] for record in records])
    assert values[0] == values[1]
    code, _, err = run(["evaluate", images, "--reference", data, "--features", encoder, "--samples", "49"], capsys)
    assert (code, "There are 48 images in images and 49 were asked for" in err) == (2, True)
    code, _, err = run(["evaluate", data, "--reference", data, "--features", encoder, "--metrics", "is"], capsys)
    assert (code, "'is' is of the Inception network alone" in err) == (2, True)
    parity = ["evaluate", "parity", data, str(stats), "--features", encoder, "--expect"]
    assert run([*parity, "precision=1", "fid=0"], capsys)[0] == 0
    code, out, _ = run([*parity, "precision=1", "fid=7"], capsys)
    assert (code, "differs" in out) == (1, True)
    (checkpoint,) = (tmp_path / "repa" / "checkpoints").glob("step-*")
    sampled, judge = tmp_path / "sampled.npz", ["--reference", data, "--features", encoder]
    assert run(["sample", str(checkpoint), "--out", str(sampled), "--count", "16"], capsys)[0] == 0
    results = []
    for source in (checkpoint, sampled):
        words = ["evaluate", str(source), *judge, "--samples", "16", "--out", str(tmp_path / "one.json")]
        assert run(words, capsys)[0] == 0
        results.append(json.loads((tmp_path / "one.json").read_text()))
    assert results[0]["metrics"] == results[1]["metrics"], "drawn while scored, or read from a file"
    assert results[0]["protocol"] == results[1]["protocol"], "the file says how it was drawn"
    for command in ("cknna", "probe"):
        looking = ["--times", "0.5", "1", "--depths", "1", "2", "--images", "24"]
        code, out, _ = run(["evaluate", command, runs[1], *looking], capsys)
        assert (code, "Protocol:" in out) == (0, True)
        (file,) = (tmp_path / "repa" / "evaluations").glob(f"{command}-*.json")
        assert len(json.loads(file.read_text())["values"]) == 2
        code, _, err = run(["evaluate", command, runs[1], "--depths", "9"], capsys)
        assert (code, err.startswith("vrpo: --depths 9 is not a block of this model")) == (2, True), err
        file.unlink()


def test_plugin_registers_a_reward_and_a_missing_one_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vrpo.alignment.rewards import build_reward

    plugin = tmp_path / "my_reward.py"
    plugin.write_text(
        "from vrpo.alignment.rewards import register_reward\n"
        "@register_reward('brightness_of_tests')\n"
        "def brightness(actions, context):\n"
        "    return actions.dot(context.target)\n"
    )
    code, _, err = run(["train", "--plugin", str(plugin), "--data", str(tmp_path / "none")], capsys)
    assert (code, "none" in err) == (2, True)
    assert build_reward("brightness_of_tests", 8) is not None
    code, _, err = run(["train", "--plugin", "absent.py", "--data", "x"], capsys)
    assert code == 2
    assert "--plugin absent.py is not a Python file" in err


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import nothing_of_this_name", "failed (ModuleNotFoundError: No module named 'nothing_of_this_name')"),
        ("def broken(:", "failed (SyntaxError: "),
        ("1 / 0", "failed (ZeroDivisionError: division by zero): correct that file."),
    ],
)
def test_plugin_that_fails_is_a_sentence(
    code: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(code)
    status, _, err = run(["train", "--plugin", str(plugin)], capsys)
    assert (status, len(err.splitlines())) == (2, 1)
    assert sentence in err


def test_plugin_may_define_dataclasses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    b: int = 1\n"
    )
    assert "data.path is not set" in run(["train", "--plugin", str(plugin)], capsys)[2]
