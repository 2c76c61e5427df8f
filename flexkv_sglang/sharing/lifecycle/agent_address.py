"""AgentAddress: where the agent listens and what it tells others, also when this machine's address changes.

An address that is gone (DHCP, a cloud) is replaced, a port in use is tried again; meanwhile the agent announces no
pages. Threads: one; the two addresses and the trouble any.
"""

from __future__ import annotations

import logging
import time

from flexkv_sglang.backends.fleet.server.server import PageServer
from flexkv_sglang.backends.fleet.wire.addresses import (
    is_loopback,
    listen_address,
    outward_host,
    split_address,
)
from flexkv_sglang.backends.fleet.wire.curve import Secret
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.sharing.lifecycle.fitness import is_local

logger = logging.getLogger(__name__)

_LOOK_S = 5.0
_TRIES, _TRY_S = 40, 0.05


class AgentAddress:
    """``told``: "host:port" for other nodes, "" while there is none. ``trouble``: why, for ``flexkv nodes``."""

    def __init__(self, share: ShareConfig, secret: Secret | None, server: PageServer) -> None:
        self._share, self._secret, self._server = share, secret, server
        self._log = RateLimitedLog(logger)
        self._look_at = 0.0
        self._foreign = False  # at the last look
        self.told = self.trouble = ""

    @property
    def bound(self) -> str:
        """ "host:port" of the listening socket; "" while there is none."""
        return self._server.listens_at if self.told else ""

    def open(self, *, first: bool) -> None:
        """Start the server. ``first``: False while another agent holds the port. Raises ``ConfigError``."""
        self._server.start(listen=first or not self._server.has_fixed_port)

    def bind(self) -> None:
        """Listen now, or say why not: an agent before this one frees its port in a moment."""
        self.told = self._server.advertised
        for left in reversed(range(_TRIES)):
            if self.told:
                break
            self.told = self._server.bind(any_port=not left)
            if not self.told and left:
                time.sleep(_TRY_S)
        self._look_at = time.monotonic() + _LOOK_S
        self._judge()

    def follow(self) -> None:
        """Every 5 s: is the port free by now, is the address still this machine's? Raises ``ConfigError``."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _LOOK_S
        if not self.told:
            self.told = self._server.bind()
        elif self._has_moved():
            if not self._foreign:
                self._foreign = True
                return
            self._move()
        else:
            self._foreign = False
        self._judge()

    def _has_moved(self) -> bool:
        """Is the own address gone, or one of loopback although there is a way out by now?"""
        if not is_local(self._server.listens_at):
            return True
        host = split_address(self._server.listens_at, "address")[0]
        if self._share.listen != "auto" or not is_loopback(host):
            return False
        return bool(self._secret or self._share.insecure) and not is_loopback(self._outward())

    def _outward(self) -> str:
        return outward_host(self._share, quiet=True)

    def _move(self) -> None:
        former = self.told
        if self._share.listen == "auto":
            host = self._outward()
            if is_loopback(host):
                return  # no way out at the moment
            host, _port = listen_address(self._share, self._secret)
            self.told = self._server.bind(host)
        else:
            self.told = self._server.bind()
        if self.told and self.told != former:
            self._foreign = False
            logger.warning("flexkv: this node's address is %s now, not %s", self.told, former)

    def _judge(self) -> None:
        """Say what is wrong, at most once a minute."""
        self.trouble = ""
        if not self.told:
            self.trouble = (
                f"share.listen {self._share.listen!r}: the port is in use or the address is not this machine's; "
                "no page is served until it is free"
            )
            self._log.log("", logging.ERROR, "flexkv: %s", self.trouble)
