"""Kill preparations of data with latents by SIGKILL at chosen moments, go on, and print what came of it as JSON.

A moment is a large write into a shard, journal or manifest, which is cut in half, or a flush, rename or removal, which
does not happen any more. The preparation that is killed runs in a forked child, so that libraries are imported once.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
LARGE = 256  # bytes: a row, a line of the journal or the manifest, but no header


class Moments:
    """Counts the moments at which a process can be killed, and kills this one at number ``last``."""

    def __init__(self, last: int) -> None:
        self.last, self.seen = last, 0
        self.names: Counter[str] = Counter()

    def pass_by(self, name: str) -> bool:
        """Count a moment and return whether it is the last."""
        self.seen += 1
        self.names[name] += 1
        return self.seen == self.last

    def die(self, name: str) -> None:
        if self.pass_by(name):
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Replace what writes, flushes, renames and removes in this process."""
        import vrpo.data.journal
        import vrpo.data.shards

        moments = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                half = len(data) >= LARGE and moments.pass_by("half of a write")
                if half:
                    super().write(data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().write(data) or 0

        def opened(path: Any, mode: str = "r", *rest: Any) -> Any:
            return File(path, mode) if "w" in mode or "a" in mode else builtins.open(path, mode, *rest)

        for module in (vrpo.data.journal, vrpo.data.shards):
            module.open = opened  # type: ignore[attr-defined]
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
            original = getattr(owner, name)

            def replaced(*words: Any, _original: Any = original, _name: str = name, **named: Any) -> Any:
                moments.die(f"before {_name}")
                return _original(*words, **named)

            setattr(owner, name, replaced)


def in_child(work: Any) -> int:
    """Run ``work`` in a forked child and return its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Kill at every moment, with worker processes at a few, and one of two ranks."""
    from latent_preparation import KINDS, contents, make, write_sources

    folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    write_sources(folder)
    record: dict[str, Any] = {"kills": 0, "differing": [], "half_final": [], "resumed": 0, "moments": Counter()}

    def killed(kind: str, last: int, out: Path, **options: Any) -> None:
        def work() -> None:
            Moments(last).watch()
            make(kind, folder, out, **options)

        status = in_child(work)
        assert status == -signal.SIGKILL, (kind, last, status)
        record["kills"] += 1

    def go_on(kind: str, last: int, out: Path) -> None:
        """Check that what has a final name is whole, finish, and compare."""
        if out.is_dir():
            left = {name: content for name, content in contents(out).items() if not name.startswith(("progress", "."))}
            record["half_final"] += [(kind, last, name) for name in left if left[name] != whole[kind].get(name)]
        result = make(kind, folder, out)
        record["resumed"] += result.resumed_shards
        if contents(out) != whole[kind]:
            record["differing"].append((kind, last))

    whole: dict[str, dict[str, bytes]] = {}
    for kind in KINDS:
        make(kind, folder, folder / f"whole-{kind}")
        whole[kind] = contents(folder / f"whole-{kind}")
        (folder / "count").mkdir(exist_ok=True)

        def count(kind: str = kind) -> None:
            moments = Moments(0)
            moments.watch()
            make(kind, folder, folder / "count" / kind)
            (folder / f"{kind}.json").write_text(json.dumps(moments.names))

        assert in_child(count) == 0
        names = Counter(json.loads((folder / f"{kind}.json").read_text()))
        record["moments"] += names
        for last in range(1, sum(names.values()) + 1, 1 if kind == "autoencoder" else 2):
            out = folder / f"{kind}-{last}"
            killed(kind, last, out)
            if last % 3 == 0:  # and once more, wherever that is now
                in_child(lambda kind=kind, out=out: (Moments(9).watch(), make(kind, folder, out)))
            go_on(kind, last, out)
        last = sum(names.values()) // 2
        killed(kind, last, folder / f"{kind}-workers", workers=2)
        go_on(kind, last, folder / f"{kind}-workers")
    for dying in (0, 1):
        out = folder / f"ranks-{dying}"
        ranks(lambda world, out=out: make("autoencoder", folder, out, world=world), dying)
        record["kills"] += 1
        go_on("autoencoder", -dying, out)
    print(json.dumps(record))


def ranks(work: Any, dying: int) -> None:
    """Run ``work`` of two processes' world, kill one of them in the middle, and then the other, as a launcher does."""
    from vrpo.processes import connect

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                if rank == dying:
                    Moments(12 if rank == 0 else 6).watch()
                with connect() as world:
                    work(world)
            finally:
                os._exit(1)
        children.append(child)
    status = os.waitstatus_to_exitcode(os.waitpid(children.pop(dying), 0)[1])
    assert status == -signal.SIGKILL, status
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)


if __name__ == "__main__":
    main()
