"""Where pages lie on media, as the mover is told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexkv_sglang.backends.io.probe import IoMode
from flexkv_sglang.types import U64


@dataclass(frozen=True, slots=True)
class Extents:
    """Where ``n`` pages lie on media: ``fds`` int32 ``[n]``, ``offsets`` uint64 ``[n]``, ``modes`` per page.

    ``modes[i]`` says how page ``i`` may be moved (engine, O_DIRECT, alignment).
    """

    fds: np.ndarray[tuple[int], np.dtype[np.int32]]
    offsets: U64
    modes: tuple[IoMode, ...]
