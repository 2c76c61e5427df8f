"""RemoteTier: pages of one namespace on other nodes, as one rank process sees them.

A lookup reads memory only: the replica that this node's agent keeps. A read asks the other node's agent directly.
The replica is a hint; every page is verified before it counts (``PeerClient``). A page that a peer did not have
after all is not asked for there for a while, so that no second request waits for it.

Threads: any.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.fleet.reader.client import PeerClient
from flexkv_sglang.backends.fleet.reader.read import PageOutcome, Pending, RemoteRead
from flexkv_sglang.backends.fleet.replica.files import Peer
from flexkv_sglang.backends.fleet.replica.reader import PeerSetsReader
from flexkv_sglang.backends.fleet.vocabulary import fingerprints_of, namespace_bytes
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.tier import Tier, TierTraits
from flexkv_sglang.types import U64, PageBuffers, PageKey

_RATE_MIN = 100e6
"""Slowest rate, in bytes per second, that a remote read is given time for; see ``get_deadline``."""

_NEGATIVE_CACHE_S = 30.0
_NEGATIVE_CACHE_MAX = 1 << 16
_RUNS_MAX = 8
_MISSES_MAX = 16
"""After this many reads in a row that end with a page that the peer does not have, its set in the replica is wrong."""

_LOST = {PageOutcome.MISS, PageOutcome.CORRUPT}
"""Not LATE: a peer that hangs has a breaker, and when it answers again its pages are there."""


@dataclass(frozen=True, slots=True)
class PeerRun:
    """Pages ``start`` to ``stop`` of a request, all at one peer."""

    peer: Peer
    start: int
    stop: int


class RemoteGet:
    """A read of some runs that has begun: a ``PendingGet``."""

    def __init__(
        self, owner: RemoteTier, keys: Sequence[PageKey], started: list[tuple[PeerRun, Pending]]
    ):
        self._owner = owner
        self._keys = keys
        self._started = started

    def wait(self) -> int:
        """Number of leading pages that arrived whole and right. No target is touched afterwards."""
        done, broken = 0, False
        # Wait for all of them, also behind a hole, before anything can fail: the caller gets its targets back.
        ended = [(run, pending.wait()) for run, pending in self._started]
        for run, outcomes in ended:
            got = self._owner.record_outcomes(run, self._keys[run.start : run.stop], outcomes)
            if not broken:
                done += got
                broken = got < run.stop - run.start
        return done


class RemoteTier(Tier):
    """Read only. ``page_tokens``: tokens of a page, to weigh fetching against computing; 0: do not weigh."""

    def __init__(  # noqa: PLR0913 - one call, spelled out
        self,
        namespace: str,
        payload_bytes: int,
        reader: PeerSetsReader,
        client: PeerClient,
        accepted: frozenset[ChecksumKind],
        share: ShareConfig,
        metrics: Metrics,
        *,
        page_tokens: int = 0,
        usable: Callable[[], bool] = lambda: True,
    ) -> None:
        self.traits = TierTraits(
            local=False, written=False, promotes=False, backfills=share.promote
        )
        self._namespace = namespace_bytes(namespace)
        self._payload_bytes = payload_bytes
        self._reader = reader
        self._client = client
        self._accepted = accepted
        self._share = share
        self._metrics = metrics
        self._page_tokens = page_tokens
        self._usable = usable
        self._ended = threading.Event()
        metrics.gauge("remote_pages", self.page_count)
        metrics.gauge("remote_peers", lambda: len(self.peers()))
        self.namespace = namespace
        self._lock = threading.Lock()  # guards the next three; dict work
        self._misses: dict[str, int] = {}  # node_id -> reads in a row that ended with a miss
        self._doubts: dict[str, int] = {}  # node_id -> how often there were too many
        # (node_id, epoch, key) -> until when, in seconds; the oldest first
        self._negative_cache: dict[tuple[str, int, PageKey], float] = {}

    def prefix(self, keys: Sequence[PageKey], *, promise: bool = True) -> int:  # noqa: ARG002
        """Length of the leading run that other nodes hold and that is worth fetching. Nothing is promised."""
        runs = self._plan(keys)
        return runs[-1].stop if runs else 0

    def holds(self, keys: Sequence[PageKey]) -> list[bool]:
        """Per key: does another node claim it? Memory only."""
        if not keys or not self._ready():
            return [False] * len(keys)
        return list(map(bool, self._reader.holds(fingerprints_of(keys), self._skip)))

    def get(self, keys: Sequence[PageKey], targets: PageBuffers, deadline: float) -> list[bool]:
        """As ``begin_get``, and wait."""
        read = self.begin_get(keys, targets, deadline)
        count = 0 if read is None else read.wait()
        return [True] * count + [False] * (len(keys) - count)

    def begin_get(
        self, keys: Sequence[PageKey], targets: PageBuffers, deadline: float
    ) -> RemoteGet | None:
        """Start reading the leading run of ``keys`` that other nodes hold. ``wait`` is over at the deadline."""
        runs = self._plan(keys)
        if not runs:
            return None
        deadline = self.get_deadline(runs[-1].stop, deadline)
        started: list[tuple[PeerRun, Pending]] = []
        try:
            for run in runs:
                read = RemoteRead(
                    run.peer.node_id,
                    run.peer.epoch,
                    run.peer.address,
                    self._namespace,
                    keys[run.start : run.stop],
                    targets.take(slice(run.start, run.stop)),
                    self._accepted,
                    deadline,
                )
                started.append((run, self._client.begin(read)))
        except BaseException:
            for _run, pending in started:  # no caller will wait for these
                pending.cut(0)
                pending.wait()
            raise
        return RemoteGet(self, keys, started)

    def get_deadline(self, page_count: int, deadline: float) -> float:
        """Time limit for reads of ``page_count`` pages that begin now, however many turns they take."""
        seconds = self._share.remote_deadline_s + page_count * self._payload_bytes / _RATE_MIN
        return min(deadline, time.monotonic() + seconds)

    def page_count(self) -> int:
        """Pages that other nodes claim (one that two have counts twice)."""
        return self._reader.page_count()

    def record_outcomes(
        self, run: PeerRun, keys: Sequence[PageKey], outcomes: Sequence[PageOutcome]
    ) -> int:
        """Count the outcomes of a run. Returns how many pages came before the first that did not."""
        good = 0
        for outcome in outcomes:
            if outcome is not PageOutcome.OK:
                break
            good += 1
        self._metrics.count("remote_read_pages", good)
        self._weigh(run.peer.node_id, good, missed=PageOutcome.MISS in outcomes)
        for outcome in PageOutcome:
            if outcome not in (PageOutcome.OK, PageOutcome.SKIPPED):
                self._metrics.count(f"remote_{outcome.name.lower()}_pages", outcomes.count(outcome))
        lost = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome in _LOST]
        if lost:
            self._remember_miss(run.peer, lost)
        return good

    def doubts(self) -> dict[str, int]:
        """Per node, how often it missed ``_MISSES_MAX`` reads in a row that the replica had promised."""
        with self._lock:
            return dict(self._doubts)

    def follow(self) -> None:
        """Map what the agent has published. Called at least once a second, or replaced files stay in memory."""
        self._refresh()

    @property
    def closed(self) -> bool:
        """True once ``close`` was called."""
        return self._ended.is_set()

    def peers(self) -> Sequence[Peer]:
        """Other nodes that are up."""
        return () if self.closed else self._reader.peers()

    def close(self) -> None:
        """Idempotent. Nothing is found any more."""
        if not self.closed:
            for name in ("remote_pages", "remote_peers"):  # a gauge would keep this object alive
                self._metrics.gauge(name, 0)
        self._ended.set()
        self._reader.close()

    def _ready(self) -> bool:
        return self._usable() and self._refresh() and self._reader.alive

    def _refresh(self) -> bool:
        """False once closed. A call that overlaps ``close`` may open files again, so it closes them again."""
        if not self._ended.is_set():
            self._reader.refresh()
        if self._ended.is_set():
            self._reader.close()
            return False
        return True

    def _skip(self, peer: Peer) -> bool:
        return not self._client.usable(peer.node_id, peer.epoch, peer.address)

    def _plan(self, keys: Sequence[PageKey]) -> list[PeerRun]:
        """Runs that cover the leading run of ``keys``; each time the peer that has the longest next run."""
        if not keys or not self._ready():
            return []
        fingerprints = fingerprints_of(keys)
        runs: list[PeerRun] = []
        done = 0
        while done < len(keys) and len(runs) < _RUNS_MAX:
            run = self._next_run(keys, fingerprints, done)
            if run is None:
                break
            runs.append(run)
            done = run.stop
        return self._worthwhile(runs)

    def _next_run(self, keys: Sequence[PageKey], fingerprints: U64, start: int) -> PeerRun | None:
        excluded: set[str] = set()

        def skip(peer: Peer) -> bool:
            return peer.node_id in excluded or self._skip(peer)

        while True:
            found = self._reader.run(fingerprints[start:], skip)
            if found is None:
                return None
            peer, count = found
            believed = self._believed(peer, keys[start : start + count])
            if believed:
                return PeerRun(peer, start, start + believed)
            excluded.add(peer.node_id)

    def _worthwhile(self, runs: list[PeerRun]) -> list[PeerRun]:
        """Drop pages that would be late or that are computed sooner than fetched, as far as rates are known."""
        kept: list[PeerRun] = []
        for run in runs:
            pages = run.stop - run.start
            byte_count = pages * self._payload_bytes
            seconds = self._client.seconds_for(run.peer.node_id, byte_count)
            budget = self._share.remote_deadline_s + byte_count / _RATE_MIN
            speed = self._share.recompute_tokens_per_s
            if speed and self._page_tokens and seconds > pages * self._page_tokens / speed:
                self._metrics.count("remote_left_pages", pages)
                break
            fitting = pages if seconds <= budget else int(pages * budget / seconds)
            if fitting:
                kept.append(PeerRun(run.peer, run.start, run.start + fitting))
            if fitting < pages:
                self._metrics.count("remote_left_pages", pages - fitting)
                break
        return kept

    def _believed(self, peer: Peer, keys: Sequence[PageKey]) -> int:
        """Length of the leading run without keys that this peer missed in the last ``_NEGATIVE_CACHE_S`` seconds."""
        if not self._negative_cache:
            return len(keys)
        now = time.monotonic()
        with self._lock:
            for count, key in enumerate(keys):
                if self._negative_cache.get((peer.node_id, peer.epoch, key), 0.0) > now:
                    return count
        return len(keys)

    def _weigh(self, node_id: str, good: int, *, missed: bool) -> None:
        with self._lock:
            if good:
                self._misses.pop(node_id, None)
            elif missed:
                self._misses[node_id] = self._misses.get(node_id, 0) + 1
                if self._misses[node_id] == _MISSES_MAX:
                    del self._misses[node_id]
                    self._doubts[node_id] = self._doubts.get(node_id, 0) + 1

    def _remember_miss(self, peer: Peer, keys: Sequence[PageKey]) -> None:
        until = time.monotonic() + _NEGATIVE_CACHE_S
        with self._lock:
            for key in keys:
                self._negative_cache[peer.node_id, peer.epoch, key] = until
            while len(self._negative_cache) > _NEGATIVE_CACHE_MAX:
                del self._negative_cache[next(iter(self._negative_cache))]
