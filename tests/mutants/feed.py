"""Seeded bugs in the feed between nodes, for ``run.py``: (name, file, old line, new line, tests)."""

from __future__ import annotations

FOLLOWER, FOLLOWERS, LOG, FEED = (
    f"backends/fleet/members/{name}.py"
    for name in ("follower", "followers", "change_log", "redis_feed")
)
MODEL = "tests/backends/fleet/members/test_follower.py"
LOGS = "tests/backends/fleet/members/test_change_log.py"
MEMBERS = "tests/backends/fleet/members/test_members.py"
REDIS = "tests/backends/fleet/members/test_redis_feed.py"
REPAIR = "tests/backends/fleet/members/test_feed_repair.py"
LINK = "tests/backends/fleet/members/test_redis_link.py"

MUTANTS = (
    (
        "feed: a gap is not noticed",
        FOLLOWER,
        "        if change.first > self.last + 1:\n            self.wants_snapshot = True\n",
        "        if change.first < 0:\n            self.wants_snapshot = True\n",
        MODEL,
    ),
    (
        "feed: an overlap is applied whole",
        FOLLOWER,
        "return [self._apply(after(change, self.last))]",
        "return [self._apply(change)]",
        MODEL,
    ),
    (
        "feed: entries of another epoch count",
        FOLLOWER,
        "if change.epoch != self.epoch:",
        "if self.epoch is None:",
        MODEL,
    ),
    (
        "feed: a snapshot of another epoch is taken",
        FOLLOWER,
        "if snapshot.epoch != self.epoch or not self.wants_snapshot:",
        "if not self.wants_snapshot:",
        MODEL,
    ),
    (
        "feed: a keep-alive reveals nothing",
        FOLLOWER,
        "        self.known = max(self.known, end)\n        if end",
        (
            "        if change.op is Op.HEARTBEAT:\n            return []\n"
            "        self.known = max(self.known, end)\n        if end"
        ),
        MODEL,
    ),
    (
        "feed: changes before the snapshot are forgotten",
        FOLLOWER,
        "        self._parked.append(change)\n",
        "",
        MODEL,
    ),
    (
        "feed: an old set stays for ever",
        FOLLOWER,
        "self._hint_until = now + HINT_S",
        "self._hint_until = now + 1e9",
        MODEL,
    ),
    (
        "feed: an overflow keeps the epoch",
        LOG,
        "            self._node.renew_locked()\n\n\n",
        "            self.forget_locked()\n\n\n",
        LOGS,
    ),
    (
        "feed: what grew since it was sent is lost",
        LOG,
        "if change.first + change.numbers > last + 1:",
        "if change.first > last:",
        LOGS,
    ),
    (
        "feed: a namespace that comes back counts on without a hole",
        LOG,
        "self._ended[namespace] = log.last_locked + 1",
        "self._ended[namespace] = log.last_locked",
        LOGS,
    ),
    (
        "feed: published before it is written",
        FEED,
        (
            "            self._append(name, own.node_id, changes)\n            end = changes[-1]\n"
            "            log.published(end.epoch, end.first + end.numbers - 1)\n"
        ),
        (
            "            end = changes[-1]\n            log.published(end.epoch, end.first + end.numbers - 1)\n"
            "            self._append(name, own.node_id, changes)\n"
        ),
        REDIS,
    ),
    (
        "feed: an emptied Redis takes everybody down",
        FEED,
        "self._share.node_ttl_s + self._write_outage.retry_max_s if lost else 0.0",
        "0.0",
        REDIS,
    ),
    (
        "feed: a stream whose ids went back is not read again",
        FEED,
        "now - self._heard_at.setdefault(key, now) > SILENCE_S",
        "now < self._heard_at.setdefault(key, now)",
        REPAIR,
    ),
    (
        "feed: the heartbeat never removes silent nodes",
        FEED,
        "    redis.call('ZREMRANGEBYSCORE', live, from, to)\n    redis.call('HDEL', nodes, unpack(gone))\n",
        "",
        REDIS,
    ),
    (
        "feed: a heartbeat from the future lasts",
        FEED,
        "for i = 1, 2 do",
        "for i = 1, 1 do",
        REDIS,
    ),
    (
        "feed: other share groups are followed",
        FOLLOWERS,
        "                and info.share_group == self._share_group\n",
        "",
        REDIS,
    ),
    (
        "feed: two agents keep one name",
        FOLLOWERS,
        "            self._node_id = NodeId(",
        "            _ = NodeId(",
        REDIS,
    ),
    (
        "feed: a failing replica is not written again",
        FOLLOWERS,
        "            if not done:\n                follower.gap()\n                break\n",
        "",
        REPAIR,
    ),
    (
        "feed: the sink is written after close",
        FOLLOWERS,
        "        if self._closed:\n            return False\n        try:",
        "        try:",
        REPAIR,
    ),
    (
        "feed: a password is shown",
        "backends/fleet/members/redis_link.py",
        'f"redis_url: {redacted(url)!r} is not valid"',
        'f"redis_url: {url!r} is not valid"',
        LINK,
    ),
    (
        "feed: a certificate's authority is not checked",
        "backends/fleet/members/redis_link.py",
        '"ssl_cert_reqs": "required"',
        '"ssl_cert_reqs": "none"',
        LINK,
    ),
    (
        "feed: silence of a source takes its members down",
        "backends/fleet/members/members.py",
        "        if now < until:\n            present",
        "        if now < 0:\n            present",
        MEMBERS,
    ),
    (
        "feed: a peer is asked for snapshots without pause",
        FOLLOWER,
        "self._due[feed] = max(now, soonest) +",
        "self._due[feed] = now +",
        MEMBERS,
    ),
    (
        "feed: many streams are asked for without a pause",
        "backends/fleet/members/redis_feed.py",
        "        if len(feeds) > _FEW_NODES:",
        "        if False:",
        REDIS,
    ),
)
