"""Agent: the one process per node that shares the node's pages with other nodes.

It follows the journals of the node's rank processes, announces their pages to other nodes (``Membership``), writes the
sets of other nodes' pages for the rank processes (``PeerSetsWriter``), and serves pages (``PageServer``). It owns no
page and has no state that could be lost: killed at any moment, it starts again from the journals.

Threads: ``run`` is the process's main thread, for the journals and everything periodic; the parts have their own.
A part that fails is logged, counted and tried again; only ``ConfigError`` at start ends the agent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexkv_sglang.backends.fleet.members.change_log import ChangeLogs
from flexkv_sglang.backends.fleet.members.membership import Membership
from flexkv_sglang.backends.fleet.members.peer_control import PeerControl
from flexkv_sglang.backends.fleet.replica.writer import PeerSetsWriter
from flexkv_sglang.backends.fleet.server.server import PageServer
from flexkv_sglang.backends.fleet.vocabulary import ChangeLog, NodeId, NodeInfo
from flexkv_sglang.backends.fleet.wire.curve import Secret
from flexkv_sglang.backends.io.probe import IoMode
from flexkv_sglang.backends.slots.space.places import prepare_directory
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError, FlexKVError
from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing.lifecycle.agent_address import AgentAddress
from flexkv_sglang.sharing.lifecycle.agent_notes import AgentNotes
from flexkv_sglang.sharing.lifecycle.fitness import RELEASE
from flexkv_sglang.sharing.lifecycle.handover import DRAIN_S, AgentLock
from flexkv_sglang.sharing.node_identity import node_name
from flexkv_sglang.sharing.node_pages import NodePages
from flexkv_sglang.sharing.run_dir import RunDir, needing
from flexkv_sglang.sharing.shareable import Shareable, used_by

logger = logging.getLogger(__name__)

_POLL_MIN_S, _POLL_MAX_S = 0.002, 0.02
_SCAN_S = 1.0
_READ_DEPTH = 8  # reads in flight at the disk, with io_uring
_REVEAL_S = 5.0
"""After its start an agent collects the sets of other nodes for so long; ranks use those of the former one."""

_IDLE_S = 1.0


class Agent:
    """Opens everything at construction, but announces nothing before ``start``; both raise ``ConfigError``.

    ``card``: of ``fitness``; with ``by_hand`` it was started by a person, so it stays when no rank process is left.
    """

    def __init__(
        self,
        config: FlexKVConfig,
        run_dir: RunDir,
        secret: Secret | None,
        card: Mapping[str, Any],
        notes: AgentNotes,
    ) -> None:
        self._run_dir = run_dir
        self._card = card
        self._notes = notes
        self._by_hand = bool(card["by_hand"])
        self._config = config
        self.metrics = Metrics()
        self._modes: dict[Path, IoMode] = {}
        self._shareable = Shareable()
        self._refused: dict[str, str] = {}  # directory -> reason
        self._pages: dict[str, NodePages] = {}  # replaced, never changed: other threads read it
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()
        self._log = RateLimitedLog(logger)
        self._needed_at = time.monotonic()
        self._changes = 0
        self._doubts: dict[tuple[str, str, str], int] = {}  # (rank, namespace, node) -> as reported
        self._reports: dict[str, dict[str, Any]] = {}
        self._started_at = 0.0
        self._share = share = config.share
        self._node_id = NodeId(node_name(config))
        self._logs = ChangeLogs(outbox=share.redis_url is not None)
        run_dir.add_places(config)
        self._server = PageServer(share, secret, self)
        self._address = AgentAddress(share, secret, self._server)
        # the sets of a former agent serve the rank processes until ours are here
        self._replica = PeerSetsWriter(run_dir.path, hidden=True)
        self._control = PeerControl(share, secret)
        self._membership = Membership(
            share, self._own, self._logs.find, self._control, self._replica, self._count
        )
        self._scan_round()

    def start(self, lock: AgentLock, stop: threading.Event) -> bool:
        """Take the place of the agent that this one succeeds, listen, and join the others.

        False: the other did not hand over. Raises ``ConfigError``, ``OSError``.
        """
        self._address.open(first=not lock.waits)
        if lock.waits and not lock.take_over(stop):
            logger.warning("flexkv: %s was not handed over; this agent ends", self._run_dir.path)
            return False
        self._address.bind()
        if not 0.0 < self._run_dir.beat_age_s() < self._share.replica_ttl_s:
            self._replica.reveal()
        self._membership.start()
        self._started_at = time.monotonic()
        self._lock = lock
        self._tell()
        return True

    def _tell(self) -> None:
        """Keep the card in the lock up to date. Raises ``OSError``."""
        self._membership.followers.reveal(time.monotonic() - self._started_at > _REVEAL_S)
        self._lock.write(
            ready=True,
            addresses=[self._address.bound] if self._address.bound else [],
            trouble=self._address.trouble,
        )

    def info(self) -> NodeInfo:
        """As ``ServedNode``; with the current name of this node."""
        return self._membership.followers.own_info()

    def _count(self, name: str, amount: int = 1) -> None:
        with self._counts_lock:
            self._counts[name] += amount

    def _own(self) -> NodeInfo:
        return NodeInfo(
            node_id=self._node_id,
            epoch=self._logs.epoch,
            address=self._address.told,
            share_group=self._share.share_group,
            namespaces=tuple(sorted(self._pages)) if self._address.told else (),
            engines=self._server.transports,
            version=RELEASE,
        )

    def run(self, stop: threading.Event) -> bool:
        """Run until ``stop`` is set, no rank process has needed it for ``agent_linger_s``, or its lock is out of place.

        True: a successor is ready.
        """
        pause = _POLL_MIN_S
        scan_at = 0.0
        while not stop.wait(pause):
            before = self._changes
            self._round("journals", self._poll)
            pause = _POLL_MIN_S if self._changes != before else min(2 * pause, _POLL_MAX_S)
            now = time.monotonic()
            if now >= scan_at:
                scan_at = now + _SCAN_S
                if not self._lock.in_place:
                    logger.warning("flexkv: %s was removed", self._run_dir.path)
                    return False
                self._scan_round()
                self._round("address", self._address.follow)
                self._round("card", self._tell)
                if self._lock.is_succeeded():
                    return True
                # Only right after a scan, which counts rank processes: else a short agent_linger_s could end the
                # agent while one lives.
                if now - self._needed_at > self._share.agent_linger_s and not self._by_hand:
                    logger.info("flexkv: no rank process for %g s", self._share.agent_linger_s)
                    return False
        return False

    def hand_over(self, stop: threading.Event) -> None:
        """Leave the place to the successor, and end when no read is under way."""
        logger.info("flexkv: a successor takes over")
        self._membership.close(leave=False)
        if self._server.has_fixed_port:  # which the successor needs, and with it go the connections
            self._drain(stop, 2 * _POLL_MAX_S)
            self._server.unbind()
            self._lock.close()
        else:
            self._lock.close()
            self._drain(stop, _IDLE_S)

    def _drain(self, stop: threading.Event, idle_s: float) -> None:
        """Serve on until nothing was asked for ``idle_s`` seconds, 10 s at most."""
        idle_at = time.monotonic()
        until = idle_at + DRAIN_S
        while time.monotonic() < min(until, idle_at + idle_s) and not stop.wait(_POLL_MIN_S):
            self._round("journals", self._poll)
            if not self._server.is_idle:
                idle_at = time.monotonic()

    def close(self) -> None:
        """Leave the membership and stop serving. Bounded, idempotent."""
        ends: list[Callable[[], object]] = [self._membership.close, self._server.close]
        ends += [self._control.close, self._replica.close]
        for end in (*ends, *(pages.close for pages in self._pages.values())):
            self._round("close", end)

    def changes_of(self, namespace: str) -> ChangeLog | None:
        """As ``ServedNode``."""
        return self._logs.find(namespace)

    def pages_of(self, namespace: str) -> NodePages | None:
        """As ``ServedNode``."""
        return self._pages.get(namespace)

    def _poll(self) -> None:
        for namespace, pages in self._pages.items():
            self._round(f"journals of {namespace}", pages.poll)
        self._changes = sum(pages.changes for pages in self._pages.values())

    def _scan_round(self) -> None:
        """Scan; then say how it went, also if it failed."""
        self._round("scan", self._scan)
        self._round("notes", lambda: self._notes.flush_to(self._run_dir))
        if self._started_at:
            self._round("status", lambda: self._run_dir.write_status(self._status()))

    def _scan(self) -> None:
        """Find new and removed directories, namespaces and owners."""
        self._run_dir.ranks()  # removes the locks of dead ones
        self._reports = self._run_dir.reports()
        if needing(str(self._card["instance"]), self._reports):
            self._needed_at = time.monotonic()
        for path, io_engine in self._run_dir.places().items():
            self._prepare(path, io_engine)
        found = self._shareable.find(self._modes, used_by(self._reports))
        for namespace in self._pages.keys() - found.keys():
            self._forget(namespace)
        for namespace, payload_bytes in found.items():
            if namespace not in self._pages:
                self._serve(namespace, payload_bytes)
        for namespace, pages in self._pages.items():
            self._round(f"scan of {namespace}", pages.scan)
        self._membership.followers.wanted_namespaces(set(self._pages))
        self._round("doubts", self._read_doubts)

    def _read_doubts(self) -> None:
        """Rank processes report nodes where reads miss again and again: the set of such a node may be wrong."""
        reported: dict[tuple[str, str, str], int] = {}
        for rank, report in self._reports.items():
            for namespace, nodes in report.get("doubts", {}).items():
                reported |= {
                    (rank, namespace, node_id): int(count) for node_id, count in nodes.items()
                }
        new = {(key[1], key[2]) for key, n in reported.items() if n > self._doubts.get(key, 0)}
        self._doubts = reported
        for namespace, node_id in new:
            self._membership.followers.set_suspect(namespace, NodeId(node_id))

    def _prepare(self, path: str, io_engine: str) -> None:
        """Probe a directory with real I/O, once. A directory that fails is tried again at every scan."""
        directory = Path(path)
        if directory in self._modes or not directory.is_dir():
            return
        try:
            self._modes[directory] = prepare_directory(path, io_engine)
        except ConfigError as exc:
            if self._refused.get(path) != str(exc):
                self._refused[path] = str(exc)
                logger.error("flexkv: a directory is not served: %s", exc)
            return
        self._refused.pop(path, None)
        for namespace in tuple(self._pages):  # they may have pages in the new directory too
            self._forget(namespace)

    def _serve(self, namespace: str, payload_bytes: int) -> None:
        log = self._logs.log(namespace)
        pages = NodePages(self._modes, namespace, payload_bytes, log, self.metrics, _READ_DEPTH)
        self._pages = {**self._pages, namespace: pages}
        logger.info("flexkv: serving namespace %s, pages of %d bytes", namespace, payload_bytes)

    def _forget(self, namespace: str) -> None:
        pages = self._pages[namespace]
        self._pages = {name: kept for name, kept in self._pages.items() if name != namespace}
        self._logs.remove(namespace)
        pages.close()

    def _status(self) -> dict[str, object]:
        return {
            **self._membership.status(),
            "written_at": time.time(),
            "address": self._address.told,
            "instance": self._card["instance"],
            "protocol": self._card["protocol"],
            "replica": self._card["replica"],
            "secret": self._card["secret"],
            "by_hand": self._by_hand,
            "trouble": self._address.trouble,
            "left_out_namespaces": self._shareable.left_out,
            "cluster_id": self._share.cluster_id,
            "pod": self._share.share_group,
            "guarded": self._share.secret_file is not None or self._share.insecure,
            "version": RELEASE,
            "ranks": self._run_dir.ranks(),
            "directories": sorted(map(str, self._modes)),
            "refused_directories": {**self._refused, **self._shareable.troubles},
            "served_pages": {name: len(pages) for name, pages in self._pages.items()},
            "counters": {name: n for name, n in self.metrics.snapshot().items() if n},
            "sharing": dict(self._counts),
            "served": dict(self._server.counts),
        }

    def _round(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as exc:  # noqa: BLE001 - a part that fails must not end the agent
            self._count("agent_exceptions")
            level = logging.WARNING if isinstance(exc, FlexKVError | OSError) else logging.ERROR
            self._log.log(name, level, "flexkv: agent: %s failed", name, exc_info=exc)
