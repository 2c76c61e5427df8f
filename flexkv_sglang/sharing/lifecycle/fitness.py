"""Fitness: does the agent that holds the lock serve this process? Pure, but for the secret file's content.

The agent writes a *card* into its lock: what it is, and with which settings and secret it runs. A process compares it
with what it wants itself. Only the process that finds it unfit, and no other needs, has it replaced.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flexkv_sglang.backends.fleet.replica.files import VERSION as REPLICA_FORMAT
from flexkv_sglang.backends.fleet.vocabulary import PROTOCOL
from flexkv_sglang.backends.fleet.wire.addresses import split_address
from flexkv_sglang.backends.fleet.wire.curve import Secret, load_secret
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.log_limit import RateLimitedLog

logger = logging.getLogger(__name__)

READY_S, SILENT_S, FOREIGN_S = 60.0, 10.0, 10.0
"""An agent may take so long to be ready; its beat may be so old; its address may be foreign for so long."""

_LOCAL = ("listen", "advertise", "run_dir", "node_id")
"""Settings of ``share`` that version 0.1 left out of its digest."""

_OWN = ("run_dir", "node_id", "secret_file")
"""Settings that the digest leaves out: of one process, or compared by content."""


def _release() -> str:
    try:
        return version("flexkv-sglang")
    except PackageNotFoundError:  # a checkout that is not installed
        return ""


RELEASE = _release()


@dataclass(frozen=True, slots=True)
class Unfit:
    """Why an agent is of no use. ``reason``: one word for the metric; ``text``: for the log.

    ``usable``: until it is replaced, this process can still use it.
    """

    reason: str
    text: str
    usable: bool = False


class SecretContent:
    """Follows the content of ``share.secret_file``. Threads: one.

    ``current``: the keys; ``kid``: public name of the content, "" without a secret. Raises ``ConfigError`` at
    construction; later an unreadable or invalid file leaves the former keys, with a warning a minute.
    """

    def __init__(self, share: ShareConfig) -> None:
        self._share = share
        self._log = RateLimitedLog(logger)
        self._seen = self._look()
        self.current = load_secret(share)
        self.kid = secret_id(self.current, share.cluster_id)

    def changed(self) -> bool:
        """Look at the file. True: it has another content since the last call."""
        seen = self._look()
        if seen is None or seen == self._seen:
            return False
        try:
            found = load_secret(self._share)
        except ConfigError as exc:
            self._log.log("", logging.WARNING, "flexkv: the former secret stays in use: %s", exc)
            return False
        self._seen = seen
        former, self.current = self.kid, found
        self.kid = secret_id(found, self._share.cluster_id)
        return self.kid != former

    def _look(self) -> tuple[int, int, int, int] | None:
        if self._share.secret_file is None:
            return None
        try:
            about = os.stat(self._share.secret_file)
        except OSError as exc:
            text = "flexkv: the former secret stays in use: share.secret_file: %s"
            self._log.log("", logging.WARNING, text, exc.strerror or exc)
            return None
        return about.st_dev, about.st_ino, about.st_mtime_ns, about.st_size


def secret_id(secret: Secret | None, cluster_id: str) -> str:
    """Public name of a secret's content in a cluster, 16 hex digits; it says nothing of the secret. "": none."""
    if secret is None:
        return ""
    prk = hmac.digest(b"flexkv 3", secret.proof_key, "sha256")  # HKDF-SHA256, RFC 5869
    return hmac.digest(prk, b"id\0" + cluster_id.encode() + b"\x01", "sha256")[:8].hex()


def settings_digest(share: ShareConfig) -> str:
    """Digest of the settings that an agent of version 0.1 and the rank processes beside it must have in common."""
    fields = {**asdict(ShareConfig()), **share.settings(), "serve_depth": 8}
    fields["pod"] = fields.pop("share_group")
    return _digest({key: value for key, value in fields.items() if key not in _LOCAL})


def share_digest(share: ShareConfig) -> str:
    """Digest of the settings that an agent must have in common with a process that uses it."""
    fields = share.settings()
    guarded = share.secret_file is not None
    return _digest({"guarded": guarded, **{k: v for k, v in fields.items() if k not in _OWN}})


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()


def new_card(share: ShareConfig, kid: str, *, by_hand: bool) -> dict[str, Any]:
    """What an agent writes into its lock at its start; ``ready``, ``addresses`` and ``trouble`` change later."""
    return {
        "pid": os.getpid(),
        "settings": settings_digest(share),  # for processes of version 0.1
        "instance": secrets.token_hex(8),
        "release": RELEASE,
        "protocol": PROTOCOL,
        "replica": REPLICA_FORMAT,
        "share": share_digest(share),
        "secret": kid,
        "by_hand": by_hand,
        "started": time.monotonic(),
        "pid_ns": namespace_of("pid"),
        "net_ns": namespace_of("net"),
        "ready": False,
        "addresses": [],
        "trouble": "",
    }


def name_of(card: Mapping[str, Any]) -> str:
    """Name by which processes say that they use this agent; one of version 0.1 has only its process id."""
    return str(card.get("instance") or f"pid-{card.get('pid')}")


class Fitness:
    """What this process wants of an agent. Threads: one."""

    def __init__(self, share: ShareConfig) -> None:
        self._share = share
        self.secret = SecretContent(share)
        self._foreign: tuple[str, float] = (
            "",
            0.0,
        )  # (instance, since) of an agent at a foreign address

    def unfit(
        self, card: Mapping[str, Any], beat_age_s: float, now: float | None = None
    ) -> Unfit | None:
        """Why the agent with this card cannot be used; None: it fits. ``beat_age_s``: of its sign of life.

        ``now``: ``time.monotonic()`` seconds.
        """
        now = time.monotonic() if now is None else now
        if not card:
            return None  # it has just taken its lock
        if "instance" not in card:
            return self._unfit_of_0_1(card)
        return self._unfit_by_card(card) or self._unfit_by_state(card, beat_age_s, now)

    def _unfit_of_0_1(self, card: Mapping[str, Any]) -> Unfit:
        if card.get("settings") != settings_digest(self._share):
            return Unfit("settings", "runs with other settings of share")
        return Unfit("release", "is of release 0.1", usable=True)

    def _unfit_by_card(self, card: Mapping[str, Any]) -> Unfit | None:
        theirs = str(card.get("release", ""))
        for field, ours, text in (
            ("protocol", PROTOCOL, "speaks protocol {} (here {})"),
            ("replica", REPLICA_FORMAT, "writes format {} of other nodes' pages (here {})"),
            ("share", share_digest(self._share), "runs with other settings of share"),
            ("secret", self.secret.kid, "holds secret {} (here {})"),
        ):
            if card.get(field) != ours:
                reason = "settings" if field == "share" else field
                return Unfit(
                    reason, text.format(card.get(field) or "of no name", ours or "of no name")
                )
        if is_older(theirs, RELEASE):
            return Unfit("release", f"is of release {theirs} (here {RELEASE})", usable=True)
        return None

    def _unfit_by_state(
        self, card: Mapping[str, Any], beat_age_s: float, now: float
    ) -> Unfit | None:
        age = now - float(card.get("started", now))
        if not card.get("ready"):
            if age <= READY_S:
                return None
            return Unfit("not_ready", f"is not ready {age:.0f} s after its start")
        if beat_age_s > SILENT_S:
            return Unfit("silent", f"has given no sign of life for {beat_age_s:.0f} s", usable=True)
        return self._unfit_by_address(card, now)

    def _unfit_by_address(self, card: Mapping[str, Any], now: float) -> Unfit | None:
        name = name_of(card)
        if card.get("net_ns") != namespace_of("net"):
            return None  # another container's network: what is local there cannot be seen from here
        foreign = [each for each in card.get("addresses", []) if not is_local(str(each))]
        if not foreign:
            self._foreign = "", 0.0
            return None
        if self._foreign[0] != name:
            self._foreign = name, now
        if now - self._foreign[1] <= FOREIGN_S:
            return None
        return Unfit("address", f"listens at {foreign[0]}, which is no address of this machine")


def is_older(theirs: str, ours: str) -> bool:
    """Is release ``theirs`` older? False if either is unknown. Only the leading numbers count."""
    numbers = [
        [int(part) for part in re.findall(r"^\d+(?:\.\d+)*", each)[0].split(".")]
        if re.match(r"\d", each)
        else []
        for each in (theirs, ours)
    ]
    return bool(numbers[0] and numbers[1]) and numbers[0] < numbers[1]


def is_local(address: str) -> bool:
    """Can a socket be bound to the host of "host:port" here? No packet is sent."""
    try:
        host, _port = split_address(address, "address")
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
        family, kind, protocol, _, target = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(target)
    except (ConfigError, OSError) as exc:
        return not isinstance(exc, OSError) or isinstance(exc, socket.gaierror)
    return True


def namespace_of(kind: str) -> str:
    """This process's "pid" or "net" namespace; "" if it cannot be read."""
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return ""
