"""Membership: the feeds, and the threads that fetch snapshots and look after the sets of other nodes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from flexkv_sglang.backends.fleet.members.change_log import OwnChanges
from flexkv_sglang.backends.fleet.members.followers import Followers
from flexkv_sglang.backends.fleet.members.peer_control import PeerControl
from flexkv_sglang.backends.fleet.members.redis_feed import RedisFeed
from flexkv_sglang.backends.fleet.members.static_feed import StaticFeed
from flexkv_sglang.backends.fleet.replica.writer import PeerSetsWriter
from flexkv_sglang.backends.fleet.vocabulary import NodeInfo
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import PeerError
from flexkv_sglang.threads import PeriodicThread

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.2
SNAPSHOT_TIMEOUT_S = 10.0
SNAPSHOTS_AT_ONCE = 2
CLOSE_S = 1.7


class Membership:
    """Keeps in touch with the other nodes; ``followers`` holds all that is known of them. Any thread.

    ``info``: this node's own entry. ``logs``: a namespace's ``OwnChanges``, or None. ``metrics``: ``(name, amount)``,
    names ``share_...``. Raises ``ConfigError`` at construction for wrong settings, later nothing.
    """

    def __init__(
        self,
        share: ShareConfig,
        info: Callable[[], NodeInfo],
        logs: Callable[[str], OwnChanges | None],
        control: PeerControl,
        sets: PeerSetsWriter,
        metrics: Callable[[str, int], None],
    ) -> None:
        self._control = control
        self.followers = Followers(info, sets, metrics, self._wake_feeds, self._wake_fetchers)
        self._feeds: list[RedisFeed | StaticFeed] = [
            StaticFeed(share, address, self.followers, control)
            for address in dict.fromkeys(share.peers)
        ]
        if share.redis_url:
            self._feeds.append(RedisFeed(share, self.followers, logs))
        failed = self.followers.thread_failed
        self._fetchers = [
            PeriodicThread(f"flexkv-snapshot-{number}", self._fetch, failed)
            for number in range(SNAPSHOTS_AT_ONCE)
        ]
        upkeep = PeriodicThread("flexkv-membership", self._upkeep, failed)
        feeding = [thread for feed in self._feeds for thread in feed.threads]
        self._threads = [*feeding, upkeep, *self._fetchers]
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to follow and, with Redis, to publish."""
        for thread in self._threads:
            thread.start()

    def close(self, *, leave: bool = True) -> None:
        """End within 2 s, whatever hangs; what hangs changes nothing any more. ``leave``: no successor. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        self.followers.close()
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.stop()
        for feed in self._feeds:
            if all(thread.join(deadline) for thread in feed.threads) and leave:
                feed.close(deadline)
        if not all(thread.join(deadline) for thread in self._threads):
            logger.warning("flexkv: a thread of sharing has not ended in %.1f s", CLOSE_S)

    def status(self) -> dict[str, object]:
        """State for ``flexkv nodes``: JSON-able, without secrets. Times in seconds ago."""
        return {**self.followers.status(), "feeds": [feed.status() for feed in self._feeds]}

    def _wake_feeds(self) -> None:
        for feed in self._feeds:
            feed.wake()

    def _wake_fetchers(self) -> None:
        for fetcher in self._fetchers:
            fetcher.event.set()

    def _upkeep(self) -> float:
        self.followers.upkeep()
        return HEARTBEAT_S

    def _fetch(self) -> float:
        """Fetch one snapshot, if one is due."""
        due = self.followers.snapshot_due()
        if isinstance(due, float):
            return due
        feed, address = due
        snapshot = None
        try:
            snapshot = self._control.snapshot(address, feed[0], SNAPSHOT_TIMEOUT_S)
        except PeerError as error:
            logger.debug("no snapshot of %s from %s: %s", feed[0], address, error)
        finally:
            self.followers.snapshot_fetched(feed, snapshot)
        return 0.0
