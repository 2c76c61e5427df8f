"""FrozenPages: an index at one moment, for a snapshot. Copied under the engine's lock, sorted outside of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexkv_sglang.types import I64, NO_SLOT, READY, U64, KeyArray


@dataclass(frozen=True, slots=True)
class FrozenPages:
    """Columns of an index at one moment, by slot. ``keys``: what a slot that is not READY has is void."""

    keys: KeyArray
    state: npt.NDArray[np.uint8]
    tick: U64
    parent: I64
    parent_generation: npt.NDArray[np.uint32]
    generation: npt.NDArray[np.uint32]

    def by_age(self) -> tuple[KeyArray, I64, I64]:
        """(keys, slots, parent slots or -1) of the READY pages, least recently used first."""
        ready = np.flatnonzero(self.state == READY)
        slots = ready[np.argsort(self.tick[ready], kind="stable")]
        parents = self.parent[slots]
        alive = (parents != NO_SLOT) & (self.parent_generation[slots] == self.generation[parents])
        return self.keys[slots], slots, np.where(alive, parents, NO_SLOT)
