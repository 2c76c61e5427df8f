"""Epochs: identifies the current weights of this process, and says when pages of them may be stored.

SGLang can replace a running model's weights. KV cache of the old weights is wrong for the new ones, in host and
device memory too, until SGLang has flushed it. So a weight update has three steps: stores *leave* their namespace
before the first byte of the weights changes; the fingerprint of the new weights is noted; stores *enter* the new
namespace when no older KV cache can be left in this process. In between every page misses and none is written.

The process has one ``Weights`` (``WEIGHTS``), which outlives every store: a store that is attached after an update
must know of it. Only SGLang's scheduler thread calls it, so it has no lock.
"""

from __future__ import annotations

import secrets
import weakref
from dataclasses import dataclass
from typing import Protocol


class EpochStore(Protocol):
    """A user of epochs. Neither method raises; both are bounded."""

    def leave_epoch(self) -> None:
        """Stop storing and finding pages; let running transfers end."""

    def enter_epoch(self) -> None:
        """Open the namespace of the current weights, unless it is open."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """The current weights, in comparison with those at the start of the process.

    ``content``: fingerprint of the files of an update, "" as at the start. ``nonce``: random if no file identifies the
    weights, else ""; pages of such an epoch are useful to the ranks of this server only. ``agreed``: all
    tensor-parallel ranks have the same epoch.
    """

    content: str = ""
    nonce: str = ""
    agreed: bool = True


class Weights:
    """States: *settled* (stores are open), *changing* (an update or a session of updates runs), *stale* (the weights
    are known, KV cache of earlier ones may be left: waits for ``flushed``).

    ``wanted``: was a store ever asked for? It is the same on all ranks, while a store may exist on some only.
    """

    def __init__(self) -> None:
        self.epoch = Epoch()
        self.stale = False
        self.wanted = False
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
        """Call ``store`` for every epoch from now on. If ``settled``, it opens its namespace itself."""
        self._stores.add(store)

    def detach(self, store: EpochStore) -> None:
        """Call ``store`` no more. Idempotent."""
        self._stores.discard(store)

    def begin(self, *, session: bool = False) -> None:
        """Close all stores: weights are about to change. ``session``: until ``end_session``."""
        if not (self._changing or self._session):
            self._before = (self.epoch, self.stale)
        for store in list(self._stores):
            store.leave_epoch()
        self.epoch = Epoch("", _nonce(), agreed=False)
        self.stale, self._flushed = True, False
        self._changing = True
        self._session |= session

    def end_session(self) -> None:
        """End a session of updates; call ``finish`` next."""
        self._session = False

    def unchanged(self) -> None:
        """Restore the state before ``begin``: the update was refused before it changed anything."""
        if not self._session:
            self.epoch, self.stale = self._before
        self._changing = False
        self._enter()

    def finish(self, epoch: Epoch, *, clean: bool) -> None:
        """End an update. ``clean``: no KV cache of earlier weights is left in this process."""
        self.epoch = epoch
        self._changing = False
        self.stale = not (clean or self._flushed)
        self._enter()

    def flushed(self) -> None:
        """Take note that SGLang has dropped all KV cache of device and host memory."""
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
"""The weights of this process."""
