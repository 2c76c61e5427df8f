"""Epochs: what the weights of this process are now, and when pages computed with them may be stored.

SGLang can replace a running model's weights. KV cache of the old ones then is wrong for the new ones, in
host and device memory too, until SGLang has flushed those. So a weight update does three things here:
stores *leave* their namespace before the first byte of the weights changes; the content of the weights
is noted; stores *enter* the namespace of the new weights when no older KV cache can be left in this
process. In between every page misses and none is written.

One ``Weights`` belongs to a process (``WEIGHTS``) and outlives every store: a store that is attached after an
update must know of it. Only SGLang's scheduler thread calls it, so it has no lock. No SGLang in here.
"""

from __future__ import annotations

import secrets
import weakref
from dataclasses import dataclass
from typing import Protocol


class EpochStore(Protocol):
    """What is told about epochs. Neither method raises; both are bounded."""

    def leave_epoch(self) -> None:
        """Store nothing, find nothing, let running transfers end."""

    def enter_epoch(self) -> None:
        """Open the namespace of the weights as they are now. Nothing happens if it is open."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """The weights, as far as they differ from those at the start of the process.

    ``content``: fingerprint of the files all of them were loaded from, "" as at the start. ``nonce``: not
    empty if nothing outside tells what the weights are; then it is random, and the pages are of no use to
    anybody but the ranks of this server. ``agreed``: all tensor-parallel ranks have this very epoch.
    """

    content: str = ""
    nonce: str = ""
    agreed: bool = True


class Weights:
    """States: *settled* (stores are open), *changing* (an update or a session of updates runs), *stale* (the
    weights are known, KV cache of earlier ones may be left: waits for ``flushed``)."""

    def __init__(self) -> None:
        self.epoch = Epoch()
        self.stale = False
        self.wanted = (
            False  # was a store ever asked for? The same on all ranks, unlike whether there is one
        )
        self._changing = False
        self._session = False
        self._before = (self.epoch, self.stale)
        self._flushed = False
        self._stores: weakref.WeakSet[EpochStore] = weakref.WeakSet()

    @property
    def settled(self) -> bool:
        """May pages be read and written?"""
        return not (self.stale or self._changing or self._session)

    def attach(self, store: EpochStore) -> None:
        """``store`` opens its namespace itself if ``settled``, and is told of every epoch from now on."""
        self._stores.add(store)

    def detach(self, store: EpochStore) -> None:
        """Idempotent."""
        self._stores.discard(store)

    def begin(self, *, session: bool = False) -> None:
        """Weights are about to change. ``session``: and go on changing until ``end_session``."""
        if not (self._changing or self._session):
            self._before = (self.epoch, self.stale)
        for store in list(self._stores):
            store.leave_epoch()
        self.epoch = Epoch("", _nonce(), agreed=False)
        self.stale, self._flushed = True, False
        self._changing = True
        self._session |= session

    def end_session(self) -> None:
        """No further update follows; ``finish`` decides."""
        self._session = False

    def unchanged(self) -> None:
        """The update that began last was refused before it touched anything: all is as it was before."""
        if not self._session:
            self.epoch, self.stale = self._before
        self._changing = False
        self._enter()

    def finish(self, epoch: Epoch, *, clean: bool) -> None:
        """The update is over. ``clean``: no KV cache of earlier weights is left anywhere in this process."""
        self.epoch = epoch
        self._changing = False
        self.stale = not (clean or self._flushed)
        self._enter()

    def flushed(self) -> None:
        """SGLang has dropped all KV cache of device and host memory. While weights are changing that is noted."""
        if self._changing:
            self._flushed = True
        elif not self._session:  # in a session, older KV cache may come back before it ends
            self.stale = False
            self._enter()

    def _enter(self) -> None:
        if self.settled:
            for store in list(self._stores):
                store.enter_epoch()


def _nonce() -> str:
    return secrets.token_hex(16)


WEIGHTS = Weights()
"""Of this process."""
