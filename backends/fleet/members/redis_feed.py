"""RedisFeed: members and changes through Redis. Sends heartbeats and own changes, reads other nodes' changes.

Nothing depends on the contents of Redis: they may vanish at any moment, and the next heartbeat and the next change
write them again. Two threads have a connection each: one writes, one waits for entries. Neither blocks longer than
its connection's limit.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from flexkv_sglang.backends.fleet.members.change_log import OwnChanges
from flexkv_sglang.backends.fleet.members.followers import Followers
from flexkv_sglang.backends.fleet.members.members import MEMBERS_MAX
from flexkv_sglang.backends.fleet.members.redis_entries import (
    decode_change,
    decode_info,
    encode_change,
    encode_info,
    is_name,
    member_keys,
    stream_key,
)
from flexkv_sglang.backends.fleet.members.redis_link import RedisLink, parse_redis_url
from flexkv_sglang.backends.fleet.partner import PartnerState
from flexkv_sglang.backends.fleet.vocabulary import Change, NodeId, NodeInfo
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.threads import PeriodicThread

logger = logging.getLogger(__name__)

SOURCE = "redis"
STREAM_HEARTBEAT_S = 5.0
"""Longest time between entries of a stream that others follow: a HEARTBEAT entry carries the next number."""

SILENCE_S = 15.0
"""A stream without entries for this long is read from its beginning: its ids may have gone back."""

BLOCK_S = 0.5
LEAVE_S = 0.2
FLUSH_MAX_S = 0.1
_STREAM_MAXLEN, _STREAM_TTL_MS = 4096, 60_000
_BATCH_CHANGES = 64
_READ_ENTRIES, _READ_ENTRIES_ALL = 256, 4096
_FEW_NODES = 32

HEARTBEAT = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local live, nodes, ver = KEYS[1], KEYS[2], KEYS[3]
local changed = false
local spans = {{'-inf', now - ARGV[3]}, {now + ARGV[3], '+inf'}}
for i = 1, 2 do
  local from, to = spans[i][1], spans[i][2]
  local gone = redis.call('ZRANGE', live, from, to, 'BYSCORE', 'LIMIT', 0, 4096)
  if #gone > 0 then
    redis.call('ZREMRANGEBYSCORE', live, from, to)
    redis.call('HDEL', nodes, unpack(gone))
    changed = true
  end
end
redis.call('ZADD', live, now, ARGV[1])
local former = redis.call('HGET', nodes, ARGV[1])
if former ~= ARGV[2] then
  redis.call('HSET', nodes, ARGV[1], ARGV[2])
  changed = true
end
local v = redis.call('GET', ver)
if changed or not v then
  v = t[1] .. '.' .. t[2] .. '.' .. ARGV[1]
  redis.call('SET', ver, v)
end
if former == ARGV[2] then former = '=' end
if v == ARGV[4] then return {v, former or ''} end
local ids = redis.call('ZRANGE', live, 0, tonumber(ARGV[5]) - 1)
return {v, former or '', ids, redis.call('HMGET', nodes, unpack(ids))}
"""
"""KEYS: live, nodes, ver. ARGV: nid, entry, ttl ms, known version, limit of members.

Removes nodes whose last heartbeat is more than the ttl ago, or as far in the future (the server's clock went back).
Returns {version, former own entry: '=' unchanged, '' none} and, if the version is another, ids and entries.
"""


class RedisFeed:
    """Feeds ``followers`` from Redis, and Redis from this node's ``logs`` (by namespace).

    Raises ``ConfigError`` for a wrong URL or cluster id. Redis may be absent at any time, also at the start.
    """

    def __init__(
        self, share: ShareConfig, followers: Followers, logs: Callable[[str], OwnChanges | None]
    ) -> None:
        assert share.redis_url
        if not is_name(share.cluster_id):  # which allows 96, for node ids; the setting allows 64
            raise ConfigError(
                f"cluster_id: {share.cluster_id!r}; valid: letters, digits, _ . -, at most 64"
            )
        self._share = share
        self._followers = followers
        self._logs = logs
        self._link = RedisLink(
            parse_redis_url(share.redis_url, share.redis_password_file, share.redis_ca_file)
        )
        self._writing = self._link.client()
        self._reading = self._link.client(BLOCK_S)
        self._script = self._writing.register_script(HEARTBEAT)
        name = f"Redis at {self._link.address}"
        self._write_outage = PartnerState(name)
        self._read_outage = PartnerState(f"{name} (feed)")
        self._infos: list[NodeInfo] = []
        self._version = b""
        self._registered_as: NodeId | None = None
        self._next_heartbeat = self._retry_at = self._flushed_at = 0.0
        self._written_at: dict[str, float] = {}
        self._cursors: dict[bytes, bytes] = {}
        self._heard_at: dict[bytes, float] = {}
        self._emptied = 0  # how often Redis had lost our entry; the writing thread counts
        self._read_since = 0
        self.threads = [
            PeriodicThread("flexkv-redis-beat", self._write, followers.thread_failed),
            PeriodicThread("flexkv-redis-read", self._read, followers.thread_failed),
        ]

    def wake(self) -> None:
        """Read and write soon: the followed nodes or the own entry have changed."""
        self._next_heartbeat = 0.0
        for thread in self.threads:
            thread.event.set()

    def close(self, deadline: float) -> None:
        """Leave the list of members, so that others need not wait for this node's expiry. After the threads' end."""
        time_left = deadline - time.monotonic() > 2 * LEAVE_S
        if time_left and self._write_outage.connected and self._registered_as is not None:
            self._leave(self._registered_as)
        self._writing.close()
        self._reading.close()

    def status(self) -> dict[str, object]:
        """State for ``flexkv nodes``, without the password."""
        return {
            "kind": SOURCE,
            "address": str(self._link.address),
            **self._write_outage.status(),
            "reading": self._read_outage.status(),
            "streams": len(self._cursors),
        }

    # --- the writing thread ---

    def _write(self) -> float:
        now = time.monotonic()
        if now < self._retry_at:
            self.threads[0].pause(self._retry_at - now)
            return 0.0
        try:
            if now >= self._next_heartbeat:
                period = self._share.heartbeat_s * random.uniform(0.9, 1.1)
                self._next_heartbeat = now + period
                self._heartbeat()
            more = self._publish()
        except self._link.errors as error:
            self._followers.count("share_redis_errors")
            self._retry_at = time.monotonic() + self._write_outage.failed(error)
            self._next_heartbeat = 0.0
            self._writing.connection_pool.disconnect()
            return 0.0
        self._write_outage.worked()
        return (
            0.0
            if more
            else min(STREAM_HEARTBEAT_S / 5, max(0.0, self._next_heartbeat - time.monotonic()))
        )

    def _heartbeat(self) -> None:
        own = self._followers.own_info()
        args = [
            own.node_id,
            encode_info(own),
            int(self._share.node_ttl_s * 1000),
            self._version,
            MEMBERS_MAX,
        ]
        answer = self._script(keys=list(member_keys(self._share.cluster_id)), args=args)
        self._followers.count("share_beats")
        former = answer[1]
        if len(answer) > 2:
            found = [decode_info(*pair) for pair in zip(answer[2], answer[3], strict=False)]
            self._infos = [info for info in found if info is not None]
        self._version = answer[0]
        lost = former == b"" and self._registered_as == own.node_id
        if lost:  # flushed, failed over or away for long: other nodes' entries are lost as well
            self._emptied += 1
            self._followers.count("share_redis_emptied")
        self._registered_as = own.node_id
        grace_s = self._share.node_ttl_s + self._write_outage.retry_max_s if lost else 0.0
        self._followers.update_members(SOURCE, self._infos, grace_s)
        other = decode_info(own.node_id.encode(), former) if former not in (b"", b"=") else None
        self._followers.own_name_seen(SOURCE, other)

    def _publish(self) -> bool:
        """Write waiting changes. True: there may be more."""
        pause = self._flushed_at + self._flush_s() - time.monotonic()
        own = self._followers.own_info()
        logs = [(name, log) for name in own.namespaces if (log := self._logs(name)) is not None]
        for _name, log in logs:
            log.listen(self.threads[0].event.set)
        batches = [(name, log, log.pending(_BATCH_CHANGES)) for name, log in logs]
        batches = [batch for batch in batches if batch[2]]
        if batches and pause > 0:
            self.threads[0].pause(pause)
            return True
        for name, log, changes in batches:
            self._append(name, own.node_id, changes)
            end = changes[-1]
            log.published(end.epoch, end.first + end.numbers - 1)
        if batches:
            self._flushed_at = time.monotonic()
        self._write_heartbeats(logs, own)
        return bool(batches)

    def _write_heartbeats(self, logs: list[tuple[str, OwnChanges]], own: NodeInfo) -> None:
        """Append a HEARTBEAT to the streams that others follow and that had no entry for a while."""
        now = time.monotonic()
        wanted = {
            name for info in self._infos if info.node_id != own.node_id for name in info.namespaces
        }
        for name, log in logs:
            if name in wanted and now - self._written_at.get(name, 0.0) >= STREAM_HEARTBEAT_S:
                heartbeat = log.heartbeat()
                if heartbeat is not None:
                    self._append(name, own.node_id, [heartbeat])
        for name in self._written_at.keys() - {name for name, _log in logs}:
            del self._written_at[name]

    def _append(self, namespace: str, node_id: NodeId, changes: list[Change]) -> None:
        key = stream_key(self._share.cluster_id, namespace, node_id)
        pipe = self._writing.pipeline(transaction=False)
        for change in changes:
            pipe.xadd(key, encode_change(change), maxlen=_STREAM_MAXLEN, approximate=True)
        pipe.pexpire(key, _STREAM_TTL_MS)
        pipe.execute()
        self._written_at[namespace] = time.monotonic()
        self._followers.count("share_changes_out", len(changes))

    def _flush_s(self) -> float:
        """Seconds to collect changes: with many nodes fewer, larger entries, as each goes to all of them."""
        base = self._share.publish_flush_s
        nodes = len(self._infos)
        return base if nodes <= _FEW_NODES else max(base, min(FLUSH_MAX_S, base * nodes / 10))

    def _leave(self, node_id: NodeId) -> None:
        live, _nodes, _version = member_keys(self._share.cluster_id)
        client = RedisLink(self._link.address, LEAVE_S).client()
        try:
            client.zadd(live, {node_id: 1})  # expired: the next heartbeat of any node removes it
        except self._link.errors as error:
            logger.info("flexkv: did not leave the list of members: %s", type(error).__name__)
        finally:
            client.close()

    # --- the reading thread ---

    def _read(self) -> float:
        feeds = {
            stream_key(self._share.cluster_id, namespace, node_id): (namespace, node_id)
            for namespace, node_id in self._followers.followed()
        }
        self._update_cursors(list(feeds))
        if not feeds:
            return BLOCK_S
        count = max(16, min(_READ_ENTRIES, _READ_ENTRIES_ALL // len(feeds)))
        try:
            answer = self._reading.xread(self._cursors, count=count, block=int(BLOCK_S * 1000))
        except self._link.errors as error:
            self._followers.count("share_redis_errors")
            self._reading.connection_pool.disconnect()
            self._read_since = -1
            self.threads[1].pause(self._read_outage.failed(error))
            return 0.0
        self._read_outage.worked()
        for key, entries in streams_of(answer):
            feed = feeds.get(key)
            if feed is None or not entries:
                continue
            self._cursors[key] = entries[-1][0]
            self._heard_at[key] = time.monotonic()
            changes = [decode_change(fields) for _entry_id, fields in entries]
            sound = [change for change in changes if change is not None]
            self._followers.count("share_changes_in", len(sound))
            if len(sound) < len(changes):
                self._followers.count("share_bad_entries", len(changes) - len(sound))
            self._followers.changed(*feed, sound)
        if len(feeds) > _FEW_NODES:  # XREAD lists every stream: the request outweighs the answer
            self.threads[1].pause(self._flush_s())
        return 0.0

    def _update_cursors(self, keys: list[bytes]) -> None:
        """Set the id after which to read each stream: the beginning when ids may have gone back."""
        now = time.monotonic()
        emptied = self._emptied
        restart, self._read_since = self._read_since != emptied, emptied
        cursors = {}
        for key in keys:
            cursor = self._cursors.get(key, b"0")
            if restart or now - self._heard_at.setdefault(key, now) > SILENCE_S:
                cursor, self._heard_at[key] = b"0", now
            cursors[key] = cursor
        self._cursors = cursors
        for key in self._heard_at.keys() - cursors.keys():
            del self._heard_at[key]


def streams_of(
    answer: Any,
) -> Iterator[tuple[bytes, list[tuple[bytes, dict[bytes, bytes] | None]]]]:
    """Yield (key, entries) of the streams in an answer to XREAD: lists in RESP2, a dict of lists in RESP3."""
    if isinstance(answer, dict):
        for key, groups in answer.items():
            yield key, [entry for group in groups for entry in _entries(group)]
    else:
        for key, entries in answer or ():
            yield key, list(entries)


def _entries(group: Any) -> list[tuple[bytes, dict[bytes, bytes] | None]]:
    """Unwrap the entries of a stream: in RESP3 some releases of redis-py wrap them once more."""
    return [group] if isinstance(group, tuple) else list(group)
