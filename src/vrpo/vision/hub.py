"""Published weights without a network: told at once, not after a minute of retries."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

SECONDS = 3.0


@contextmanager
def asking_hub(source: str | Path) -> Iterator[bool]:
    """Let libraries read only what they have stored, within this context, where their hub cannot be reached.

    ``source`` is what they are asked for: a folder on this machine asks nothing of the hub. Gives whether they may ask.
    """
    if Path(source).is_dir():
        yield True
        return
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield not constants.HF_HUB_OFFLINE
    finally:
        constants.HF_HUB_OFFLINE = before


def why_not(error: Exception, reached: bool) -> str:
    """Return in a clause why something could not be fetched: what the library said, if the hub was ``reached``."""
    if not reached:
        return "the hub cannot be reached, and it was not fetched before"
    return " ".join(str(error).split())[:200].rstrip(".")


def _reachable(endpoint: str) -> bool:
    """Return whether ``endpoint`` answers; a proxy, which may answer for it, is taken at its word."""
    address = urlsplit(endpoint)
    if address.scheme in getproxies():
        return True
    port = address.port or {"http": 80}.get(address.scheme, 443)
    try:
        socket.create_connection((address.hostname, port), timeout=SECONDS).close()
    except OSError:
        return False
    return True
