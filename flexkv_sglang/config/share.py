"""ShareConfig: the settings of sharing between nodes, object ``share`` of the configuration. Frozen, strict.

``redis_url`` and ``peers`` may also stand at the top level: many users need nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from flexkv_sglang.config.parsers import choice, flag, number, reject_unknown, shown, text
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.printable import redacted

_NAME = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
_ADDRESS = re.compile(r"^(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+):(\d{1,5})$")
_SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "unix")


@dataclass(frozen=True, slots=True)
class ShareConfig:
    """Settings of sharing with other nodes; nothing is shared unless ``redis_url`` or ``peers`` is set.

    Sizes in bytes, times in seconds. ``listen``: "host:port", or "auto": loopback without a secret, else the
    address from which this node reaches Redis or its first peer, any port. ``advertise``: the address that other
    nodes get instead. ``peers``: "host:port" of other nodes' agents. ``node_id``: this node's name. ``share_group``:
    only nodes of the same group share. ``promote``: keep pages read from other nodes here as well.
    ``recompute_tokens_per_s``: how fast this server computes a prompt; a prefix that takes longer to fetch is not
    fetched. 0: not known, always fetch.
    """

    redis_url: str | None = None
    redis_password_file: str | None = None
    redis_ca_file: str | None = None
    peers: tuple[str, ...] = ()
    cluster_id: str = "default"
    node_id: str | None = None
    listen: str = "auto"
    advertise: str | None = None
    secret_file: str | None = None
    auth: str = "curve"
    insecure: bool = False
    share_group: str = ""
    engine: str = "zmq"
    promote: bool = True
    recompute_tokens_per_s: float = 0.0
    serve_inflight: int = 256 << 20
    run_dir: str | None = None
    # The fields below are no settings: the JSON cannot set them, tests do.
    serve_inflight_peer: int = 64 << 20
    heartbeat_s: float = 2.0
    node_ttl_s: float = 6.0
    remote_deadline_s: float = 0.25
    publish_flush_s: float = 0.01
    replica_ttl_s: float = 30.0
    agent_linger_s: float = 300.0

    @property
    def wanted(self) -> bool:
        """Is sharing with other nodes on?"""
        return bool(self.redis_url or self.peers)

    def settings(self) -> dict[str, object]:
        """Fields that the JSON can set, with their values."""
        names = {field for field, _ in _PARSERS.values()}
        return {name: value for name, value in asdict(self).items() if name in names}

    def describe(self) -> str:
        """Format for the log: the keys that differ from their defaults, without the password."""
        if not self.wanted:
            return "off"
        default, values = ShareConfig().settings(), self.settings()
        changed = {
            key: values[field]
            for key, (field, _) in _PARSERS.items()
            if values[field] != default[field] and key != "pod"
        }
        if self.redis_url:
            changed["redis_url"] = redacted(self.redis_url)
        if "serve_inflight_mb" in changed:
            changed["serve_inflight_mb"] = self.serve_inflight >> 20
        return str(changed)


def redis_url(key: str, value: object) -> str:
    """Parse the address of Redis. Raises ``ConfigError`` without the password."""
    help_text = "redis://host:6379/0, rediss://user@host:6379/0 (TLS), redis+sentinel://h1:26379,h2:26379/service/0"
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key}: {shown(value)}. Valid: {help_text}")
    try:
        parts = urlsplit(value)
        valid = parts.scheme in _SCHEMES and bool(parts.netloc or parts.scheme == "unix")
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{key}: {redacted(value)!r}. Valid: {help_text}")
    return value


def address(key: str, value: object) -> str:
    """Parse "host:port" of an agent."""
    match = _ADDRESS.match(value) if isinstance(value, str) else None
    if match is None or not 0 <= int(match[2]) < 65536:
        raise ConfigError(f'{key}: {shown(value)}. Valid: "host:port", such as "10.0.0.5:7400"')
    return match[0]


def address_list(key: str, value: object) -> tuple[str, ...]:
    """Parse a list of addresses."""
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f'{key}: {shown(value)}. Valid: a list such as ["10.0.0.5:7400"]')
    return tuple(address(f"{key}[{i}]", item) for i, item in enumerate(value))


def parse_share(key: str, value: object) -> ShareConfig:
    """Parse the object ``share``. Raises ``ConfigError``."""
    if not isinstance(value, Mapping):
        raise ConfigError(
            f'{key}: {shown(value)}. Valid: an object such as {{"redis_url": "redis://host:6379/0"}}'
        )
    for name in value:
        if name in _REMOVED:
            raise ConfigError(
                f"{key}.{name}: {shown(value[name])}, but it is no longer a setting: remove it. "
                f"{_REMOVED[name]}"
            )
    reject_unknown(value, list(_PARSERS), f"{key}.")
    if "pod" in value and "share_group" in value:
        raise ConfigError(
            f"{key}.pod: {shown(value['pod'])} is the former name of {key}.share_group, which is given "
            f"as well: {shown(value['share_group'])}. Valid: one of them"
        )
    fields: dict[str, Any] = {}
    for name, given in value.items():
        field, parse = _PARSERS[name]
        fields[field] = parse(f"{key}.{name}", given)
    if "serve_inflight" in fields:
        total = fields["serve_inflight"]
        fields["serve_inflight_peer"] = max(
            total // 4, min(total, ShareConfig().serve_inflight_peer)
        )
    return ShareConfig(**fields)


def _listen(key: str, value: object) -> str:
    match = _ADDRESS.match(value) if isinstance(value, str) and value != "auto" else None
    known = match is not None and match[1] != "auto" and 0 <= int(match[2]) < 65536
    if value != "auto" and not known:
        raise ConfigError(
            f'{key}: {value!r}. Valid: "auto", or "host:port", such as "10.0.0.5:7400"'
        )
    return str(value)


def _name(key: str, value: object) -> str:
    if not isinstance(value, str) or not _NAME.match(value):
        raise ConfigError(
            f"{key}: {shown(value)}. Valid: up to 64 letters, digits, '.', '_' and '-'"
        )
    return value


def _share_group(key: str, value: object) -> str:
    return "" if value == "" else _name(key, value)


def _megabytes(key: str, value: object) -> int:
    return int(number(1, 1 << 20, "MiB")(key, value)) << 20


_PARSERS: dict[str, tuple[str, Callable[[str, object], Any]]] = {
    "redis_url": ("redis_url", redis_url),
    "redis_password_file": ("redis_password_file", text),
    "redis_ca_file": ("redis_ca_file", text),
    "peers": ("peers", address_list),
    "cluster_id": ("cluster_id", _name),
    "nid": ("node_id", _name),
    "listen": ("listen", _listen),
    "advertise": ("advertise", address),
    "secret_file": ("secret_file", text),
    "auth": ("auth", choice("curve", "hmac")),
    "insecure": ("insecure", flag),
    "share_group": ("share_group", _share_group),
    "pod": ("share_group", _share_group),
    "engine": ("engine", choice("zmq", "nixl", "mooncake")),
    "promote": ("promote", flag),
    "recompute_tokens_per_s": ("recompute_tokens_per_s", number(0, 1e9, "tokens per second")),
    "serve_inflight_mb": ("serve_inflight", _megabytes),
    "run_dir": ("run_dir", text),
}
"""Key -> field of ``ShareConfig`` and its parser. ``pod`` is the former name of ``share_group``."""

_REMOVED = {
    "heartbeat_s": "Heartbeats are sent every 2 s.",
    "node_ttl_s": "A node is down after 6 s without a heartbeat.",
    "remote_deadline_ms": "A call waits 250 ms for other machines, and a second per 100 MB.",
    "serve_inflight_peer_mb": "One reader gets a quarter of serve_inflight_mb, at least 64 MiB of it.",
    "serve_depth": "The agent keeps 8 reads in flight at the disk.",
    "publish_flush_ms": "Changes are collected for 10 ms; above 32 nodes for up to 100 ms.",
    "replica_ttl_s": "Pages of other machines are known for 30 s without a living agent.",
    "agent_linger_s": "The agent ends 300 s after the last rank process; one started by hand stays.",
}
"""Settings of earlier versions -> the fixed value instead."""
