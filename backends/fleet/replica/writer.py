"""PeerSetsWriter: the agent's side of the sets of other nodes (``files`` describes the format).

It may be killed at any moment: readers see each node's set as it was before or after a change. The next writer starts
without nodes, replaces the table and removes the old sets; readers follow. On a full disk readers keep the old set;
the new one goes on in this process's memory and is written when there is space again.

Threads: one at a time. No call waits for a reader.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.failpoints import Failpoint, reach
from flexkv_sglang.backends.fleet.replica.files import (
    ADDRESS_BYTES,
    DOWN,
    FREE,
    NID_BYTES,
    SLOTS,
    UP,
    Entry,
    Peer,
    PeersTable,
    SetIndex,
    SetPlace,
    remove_sets,
    write_set,
)
from flexkv_sglang.backends.fleet.replica.fingerprint_set import FingerprintSet, Parts, in_memory
from flexkv_sglang.backends.fleet.vocabulary import NodeId, Op, Snapshot
from flexkv_sglang.errors import PeerError
from flexkv_sglang.types import U64

logger = logging.getLogger(__name__)


class PeerSetsWriter:
    """Keeps the sets of other nodes in ``run_dir``. There is one per directory: the caller has the agent's lock.

    Only the constructor and ``reveal`` raise on disk errors. Calls for unknown nodes or sets do nothing.
    """

    def __init__(self, run_dir: Path | str, *, hidden: bool = False) -> None:
        """Make ``run_dir`` (mode 0700) and replace its contents. Raises ``PeerError`` if it cannot.

        ``hidden``: leave the contents of the former writer to the readers until ``reveal``.
        """
        self._run_dir = Path(run_dir)
        self._id = secrets.randbits(63) + 1
        self._entries: dict[NodeId, Entry] = {}
        self._versions = [0] * SLOTS
        self._tenancies = secrets.randbits(62)  # differs from those of earlier writers
        self._namespaces: dict[str, _Namespace] = {}
        self._full = False
        self._table: PeersTable | None = None
        if not hidden:
            self.reveal()

    @property
    def hidden(self) -> bool:
        """Do readers still see what the former writer has left?"""
        return self._table is None

    def reveal(self) -> None:
        """Replace the contents of the directory by the nodes and sets of now. Raises ``PeerError``."""
        try:
            self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._table = PeersTable.create(self._run_dir, self._id)
            remove_sets(self._run_dir)
        except OSError as exc:
            raise PeerError(
                f"cannot keep the sets of other nodes in {self._run_dir}: {exc}"
            ) from exc
        self.heartbeat()
        for entry in self._entries.values():
            self._table.put(entry)
        for space in self._namespaces.values():
            self._write_frozen(space)

    @property
    def frozen(self) -> bool:
        """Do readers see an old set because ``run_dir`` is full?"""
        return any(space.frozen for space in self._namespaces.values())

    def pages(self, node_id: NodeId) -> int:
        """Number of pages of a node, over all namespaces."""
        entry = self._entries.get(node_id)
        if entry is None:
            return 0
        sets = [space.sets.get(entry.peer.slot, ()) for space in self._namespaces.values()]
        return sum(len(pages) for pages in sets)

    def heartbeat(self) -> None:
        """Show readers that the agent lives. At least every second."""
        if self._table is not None:
            self._table.heartbeat_ns = time.monotonic_ns()

    def set_peer(self, node_id: NodeId, epoch: int, address: str, up: bool) -> None:
        """Add or change a node. ``up`` False: lookups skip it, its sets stay.

        Raises ``PeerError`` for a name beyond 200 bytes, an address beyond 280, and the 1025th node.
        """
        if len(node_id.encode()) > NID_BYTES or len(address.encode()) > ADDRESS_BYTES:
            raise PeerError(f"name or address of node {node_id[:80]!r} is too long")
        known = self._entries.get(node_id)
        if known is None:
            slot = next(self._free_slots(), None)
            if slot is None:
                raise PeerError(f"no room for node {node_id!r}: {SLOTS} are followed already")
            self._tenancies += 1
            entry = Entry(0, self._tenancies, FREE, Peer(slot, node_id, epoch, address))
        else:
            entry = replace(known, peer=replace(known.peer, epoch=epoch, address=address))
        entry = replace(entry, state=UP if up else DOWN)
        if entry != known:
            self._put(entry)

    def remove_peer(self, node_id: NodeId) -> None:
        """Forget a node and all its sets."""
        entry = self._entries.get(node_id)
        if entry is not None:
            for space in self._namespaces.values():
                space.drop(entry.peer.slot)
            self._put(replace(entry, state=FREE))
            del self._entries[node_id]

    def reset(self, namespace: str, node_id: NodeId, snapshot: Snapshot) -> None:
        """Replace the set of a node."""
        entry = self._entries.get(node_id)
        if entry is None:
            return
        space = self._namespaces.get(namespace)
        if space is None:
            space = self._namespaces[namespace] = _Namespace(self._run_dir / namespace)
        fingerprints = snapshot.fingerprints
        if not bool((fingerprints[1:] > fingerprints[:-1]).all()):
            fingerprints = np.unique(fingerprints)
        make = partial(self._make, space, entry)
        space.sets[entry.peer.slot] = FingerprintSet(fingerprints, make)

    def apply(self, namespace: str, node_id: NodeId, op: Op, fingerprints: U64) -> None:
        """Change the set of a node; readers see it at their next lookup."""
        entry, space = self._entries.get(node_id), self._namespaces.get(namespace)
        pages = space.sets.get(entry.peer.slot) if entry and space else None
        if entry is None or space is None or pages is None:
            return
        if op is Op.ADD:
            pages.add(fingerprints)
        elif op is Op.DROP:
            pages.drop(fingerprints)
        elif op is Op.CLEAR:
            space.hide(entry.peer.slot)  # also when the disk is too full for the empty set
            pages.clear()
        space.count(entry.peer.slot)

    def drop(self, namespace: str, node_id: NodeId) -> None:
        """Forget the set of a node, until its next ``reset``."""
        entry, space = self._entries.get(node_id), self._namespaces.get(namespace)
        if entry is not None and space is not None:
            space.drop(entry.peer.slot)

    def tick(self) -> None:
        """Remove replaced files; write the sets that found no space before. Once a second."""
        if self._table is None:
            return
        for space in self._namespaces.values():
            space.sweep()
            if not self._write_frozen(space):
                return
        if self._full:
            self._full = False
            logger.info(
                "there is space in %s again: the sets of other nodes are up to date", self._run_dir
            )

    @staticmethod
    def _write_frozen(space: _Namespace) -> bool:
        """Write the sets that are in memory only. False: there is no space for one."""
        while space.frozen:
            slot = min(space.frozen)
            space.sets[slot].rebase()
            if slot in space.frozen:
                return False
            space.count(slot)
        return True

    def close(self) -> None:
        """Release everything. The files stay: readers use them until they are too old."""
        self._entries.clear()
        self._namespaces.clear()

    def _free_slots(self) -> Iterator[int]:
        taken = {entry.peer.slot for entry in self._entries.values()}
        return (slot for slot in range(SLOTS) if slot not in taken)

    def _put(self, entry: Entry) -> None:
        slot = entry.peer.slot
        self._versions[slot] = (self._versions[slot] + 1) & 0xFFFFFFFF
        entry = replace(entry, version=self._versions[slot])
        self._entries[entry.peer.node_id] = entry
        if self._table is not None:
            self._table.put(entry)

    def _make(self, space: _Namespace, entry: Entry, fingerprints: U64) -> Parts:
        """Write a set and make it the current one. Without space it is in memory, and readers keep the old one."""
        if self._table is None:
            space.frozen.add(entry.peer.slot)
            return in_memory(fingerprints)
        try:
            if space.index is None:
                space.index = SetIndex.create(space.directory, self._id)
                self._table.namespaces += 1
            try:
                return space.publish(entry, fingerprints)
            except OSError:
                space.sweep()
                return space.publish(entry, fingerprints)
        except OSError as exc:
            space.frozen.add(entry.peer.slot)
            if not self._full:
                logger.warning("the sets of other nodes in %s are frozen: %s", self._run_dir, exc)
            self._full = True
            return in_memory(fingerprints)


class _Namespace:
    """The sets of one namespace. ``frozen``: slots whose set is newer than the one that readers see."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index: SetIndex | None = None
        self.sets: dict[int, FingerprintSet] = {}
        self.frozen: set[int] = set()
        self._places: dict[int, SetPlace] = {}
        self._unused: list[Path] = []
        self._generations = 0

    def publish(self, entry: Entry, fingerprints: U64) -> Parts:
        """Write a set and make it the current one. Raises ``OSError``: nothing has changed."""
        assert self.index is not None
        slot = entry.peer.slot
        self._generations += 1
        place = SetPlace(self.directory, slot, entry.tenancy, self._generations)
        parts = write_set(place, fingerprints)
        self.index.pages[slot] = len(fingerprints)
        self.index.generation[slot] = place.generation
        reach(Failpoint.REPLICA_KNOWN)
        self._forget_file(slot)
        self._places[slot] = place
        self.frozen.discard(slot)
        return parts

    def hide(self, slot: int) -> None:
        """Hide the set from readers."""
        if self.index is not None:
            self.index.generation[slot] = 0
            self.index.pages[slot] = 0
        self._forget_file(slot)

    def drop(self, slot: int) -> None:
        """Forget the set."""
        self.hide(slot)
        self.sets.pop(slot, None)
        self.frozen.discard(slot)

    def count(self, slot: int) -> None:
        """Publish the size of the set."""
        if self.index is not None and slot not in self.frozen:
            self.index.pages[slot] = len(self.sets[slot])

    def sweep(self) -> None:
        """Remove replaced files. A reader that has one mapped keeps it; one that comes too late looks again."""
        for path in self._unused:
            path.unlink(missing_ok=True)
        self._unused.clear()

    def _forget_file(self, slot: int) -> None:
        place = self._places.pop(slot, None)
        if place is not None:
            self._unused.append(place.path)
