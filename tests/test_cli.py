"""The command line: answers at once, exits 2 with one sentence, does whole jobs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vrpo.cli import COMMANDS, main


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
        ("prepare a b --size big", "--size"),
        ("train --preset cifar", "there is no preset 'cifar'"),
        ("train --data nowhere", "nowhere"),
        ("train", "data.path is not set: give a folder made by `vrpo prepare SOURCE OUT --size N`."),
        ("compare", "vrpo compare needs at least one run"),
        ("compare nowhere", "no run at"),
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


def test_python_minus_m() -> None:
    done = subprocess.run([sys.executable, "-m", "vrpo", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("vrpo ")


def test_from_images_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prepare, fit, train two objectives, sample, evaluate, compare: by the commands alone."""
    import numpy as np
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
