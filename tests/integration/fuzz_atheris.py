"""The files of `test_fuzz.py` mutated where that reaches new code of vrpo: fuzzing guided by coverage, with atheris.

uv run --group fuzz python tests/integration/fuzz_atheris.py [KIND ...] [--runs 20000] [--record FILE]

Every search of a kind is a process of its own, in which libFuzzer counts inputs, their time and their memory. An
exception that is not one of ours, ten seconds for one input or 400 MB beyond what was there end it with the input in a
file that is named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import atheris
import torch

with atheris.instrument_imports(include=["vrpo", "tarfile", "zipfile", "yaml"], enable_loader_override=False):
    import test_fuzz
    from hypothesis import given, settings
    from small_run import tiny_config, tiny_data
    from test_fuzz import KINDS, MEMORY_MB, PATIENCE, VALUES, exchanged, peak_mb

    from vrpo.training.trainer import train

SEARCHES: list[int] = []


def fuzz(check: Callable[[bytes], object], seed: bytes | None, longest: int, runs: int, folder: Path) -> None:
    """Let libFuzzer try ``runs`` inputs in a child process; end this one where the child finds something."""
    corpus, found = Path(tempfile.mkdtemp(dir=folder)), Path.cwd() / "fuzz-found"
    if seed is not None:
        (corpus / "whole").write_bytes(seed)

    def one(content: bytes) -> None:
        try:
            check(content)
        except Exception:
            traceback.print_exc()
            found.write_bytes(content)
            os._exit(1)

    child = os.fork()
    if child == 0:
        limits = [f"-timeout={PATIENCE.total_seconds():.0f}", f"-rss_limit_mb={peak_mb() + MEMORY_MB:.0f}"]
        sizes = [f"-atheris_runs={runs}", f"-max_len={longest}"]
        atheris.Setup([sys.argv[0], str(corpus), *sizes, *limits, f"-artifact_prefix={found}-"], one)
        try:
            atheris.Fuzz()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"vrpo: an input was found, see above; it is in {found}*.")
    SEARCHES.append(runs)


def replace_searches(folder: Path) -> None:
    """Let the searches of `test_fuzz.py` be libFuzzer's: of a file's bytes, or of the choices that change it."""

    def tried(whole: bytes, check: Callable[[bytes], None], inputs: int, keep_size: bool = False) -> None:
        def one(content: bytes) -> None:
            check(content[: len(whole)].ljust(len(whole), b"\0") if keep_size else content)

        fuzz(one, whole, 4 * len(whole), inputs, folder)

    def searched(given_as: Any, check: Callable[[Any], None], inputs: int) -> None:
        @settings(database=None, deadline=None)
        @given(given_as)
        def trial(example: Any) -> None:
            check(example)

        fuzz(trial.hypothesis.fuzz_one_input, None, 4096, inputs, folder)

    def tried_values(tree: Any, check: Callable[[Any], None], inputs: int) -> None:
        def one(choices: bytes) -> None:
            data = atheris.FuzzedDataProvider(choices)
            count = data.ConsumeIntInRange(1, 4)
            pairs = [(data.ConsumeUInt(2), data.ConsumeIntInRange(0, len(VALUES) - 1)) for _ in range(count)]
            check(exchanged(tree, pairs))

        fuzz(one, None, 64, inputs, folder)

    test_fuzz.tried, test_fuzz.searched, test_fuzz.tried_values = tried, searched, tried_values


def main() -> None:
    kinds = {kind.__name__: kind for kind in KINDS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[[], *kinds], help="default: all of them")
    parser.add_argument("--runs", type=int, default=2_000, help="inputs of each kind, about")
    parser.add_argument("--record", type=Path, help="JSON file to add to")
    options = parser.parse_args()
    # Not a context: its end would come in the children too.
    name = tempfile.mkdtemp()
    try:
        finished = Path(name) / "finished"
        train(tiny_config(tiny_data(finished / "data"), sample_every=16), finished / "run", say=lambda sentence: None)
        replace_searches(Path(name))
        for kind in options.kinds or kinds:
            folder = Path(name) / kind
            folder.mkdir()
            SEARCHES.clear()
            begin = time.perf_counter()
            kinds[kind](folder, finished, options.runs)
            seconds = round(time.perf_counter() - begin, 1)
            found = {"searches": len(SEARCHES), "inputs": sum(SEARCHES), "seconds": seconds}
            print(kind, found, flush=True)
            if options.record:
                keep(options.record, kind, found)
    finally:
        shutil.rmtree(name)


def keep(file: Path, kind: str, found: dict[str, Any]) -> None:
    """Put what was found out of a kind into a JSON file beside the others, with the machine's name."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from machine import describe

    told = describe(torch.device("cpu"))
    run = {"date": date.today().isoformat(), **{name: told[name] for name in ("processor", "cores", "python", "torch")}}
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(dict(sorted({**known, kind: found | run}.items())), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
