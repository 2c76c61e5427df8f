"""Choice: which owners of a directory are followed where there are more than descriptors for them."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Sequence
from pathlib import Path

from flexkv_sglang.backends.file_lock import FileLock

logger = logging.getLogger(__name__)

_PART = 16  # of the limit of descriptors: for the neighbours of one store, which take two each
_LOOK_S = 10.0


class Choice:
    """Dead owners get half of the places at most, so that a server which starts later is seen. One thread."""

    def __init__(self) -> None:
        self._places = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _PART // 2)
        self._look_at = 0.0

    def of(self, directory: Path, unknown: Sequence[str], followed: int) -> list[str]:
        """Those of the ``unknown`` owners that can be followed beside ``followed`` others."""
        half = self._places // 2
        if followed + len(unknown) <= half:
            return list(unknown)
        if time.monotonic() < self._look_at:
            return []
        self._look_at = time.monotonic() + _LOOK_S
        alive = [owner for owner in unknown if _lives(directory, owner)]
        dead = [owner for owner in unknown if owner not in set(alive)]
        chosen = alive[: max(0, self._places - followed)]
        chosen += dead[: max(0, half - followed - len(chosen))]
        text = "flexkv: %s: pages of %d dead owners are not looked up; 'flexkv gc' removes them"
        left = len(unknown) - len(chosen)
        logger.log(logging.WARNING if chosen and left else logging.DEBUG, text, directory, left)
        return chosen


def _lives(directory: Path, owner: str) -> bool:
    try:
        return FileLock.is_held(directory / f"{owner}.lock")
    except OSError:
        return False
