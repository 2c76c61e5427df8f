"""FrozenPages: an index at one moment, for a snapshot. Copied under the engine's lock, sorted outside of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexkv_sglang.types import I64, NO_SLOT, READY, U64, PageKey


@dataclass(frozen=True, slots=True)
class FrozenPages:
    """Columns of an index at one moment: ``keys`` and ``slots`` of all pages, the rest by slot."""

    keys: list[PageKey]
    slots: I64
    state: npt.NDArray[np.uint8]
    tick: U64
    parent: I64
    parent_generation: npt.NDArray[np.uint32]
    generation: npt.NDArray[np.uint32]

    def by_age(self) -> tuple[list[PageKey], I64, I64]:
        """(keys, slots, parent slots or -1) of the READY pages, least recently used first."""
        ready = np.flatnonzero(self.state[self.slots] == READY)
        order = ready[np.argsort(self.tick[self.slots[ready]], kind="stable")]
        slots = self.slots[order]
        parents = self.parent[slots]
        alive = (parents != NO_SLOT) & (self.parent_generation[slots] == self.generation[parents])
        return [self.keys[i] for i in order.tolist()], slots, np.where(alive, parents, NO_SLOT)
