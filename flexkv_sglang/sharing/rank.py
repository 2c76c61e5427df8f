"""Sharing: what one rank process has for sharing with other nodes; made once per attach, for all host pools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexkv_sglang.backends.checksum import ACCEPTED_KINDS
from flexkv_sglang.backends.fleet.members.redis_link import RedisLink, parse_redis_url
from flexkv_sglang.backends.fleet.reader.client import PeerClient
from flexkv_sglang.backends.fleet.replica.reader import PeerSetsReader
from flexkv_sglang.backends.fleet.wire.addresses import listen_address
from flexkv_sglang.backends.fleet.wire.curve import load_secret
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing.agent_launcher import FLEXKV, AgentLauncher
from flexkv_sglang.sharing.remote_pages import RemoteTier
from flexkv_sglang.sharing.run_dir import RunDir


def check_settings(share: ShareConfig) -> None:
    """Refuse what the agent would refuse: its log is read by few. Raises ``ConfigError``."""
    if share.redis_url is not None:
        RedisLink(parse_redis_url(share.redis_url, share.redis_password_file, share.redis_ca_file))
    if share.listen != "auto":
        listen_address(share, load_secret(share))


class Sharing:
    """Keeps an agent alive and owns the connections to other nodes' agents. Raises ``ConfigError``.

    ``flexkv``: the command that starts the agent.
    """

    def __init__(
        self, config: FlexKVConfig, metrics: Metrics, flexkv: Sequence[str] = FLEXKV
    ) -> None:
        self._config = config
        self._opened: list[RemoteTier] = []  # replaced, never changed: the keeper's thread reads it
        check_settings(config.share)
        self._run_dir = RunDir.of(config)
        self._client = PeerClient(config.share, metrics.count)
        keeper = None
        try:
            keeper = self._keeper = AgentLauncher(
                config, self._run_dir, self._follow, flexkv=flexkv
            )
            keeper.start()
        except OSError as exc:
            if keeper is not None:
                keeper.close()
            self._client.close()
            raise ConfigError(
                f"share.run_dir: cannot use {str(self._run_dir.path)!r}: {exc.strerror or exc}"
            ) from exc

    @classmethod
    def of(cls, config: FlexKVConfig, metrics: Metrics) -> Sharing | None:
        """None if nothing is to be shared."""
        return cls(config, metrics) if config.share.wanted else None

    def pages(
        self, namespace: str, fields: Mapping[str, object], payload_bytes: int, metrics: Metrics
    ) -> RemoteTier | None:
        """Other nodes' pages of a namespace; None for weights that have no name outside this server."""
        if fields.get("epoch"):
            return None
        tokens = fields.get("page_size", 0)
        pages = RemoteTier(
            namespace,
            payload_bytes,
            PeerSetsReader(self._run_dir.path, namespace, self._config.share.replica_ttl_s),
            self._client,
            ACCEPTED_KINDS[self._config.verify],
            self._config.share,
            metrics,
            page_tokens=tokens if isinstance(tokens, int) else 0,
            usable=lambda: self._keeper.usable,
        )
        self._opened = [*(held for held in self._opened if not held.closed), pages]
        return pages

    def _follow(self) -> None:
        """Let go of files that the agent has replaced, also while nobody looks anything up; report on other nodes."""
        states: dict[str, str] = {}
        for pages in self._opened:
            pages.follow()
            states |= {peer.node_id: self._client.is_open(peer.node_id) for peer in pages.peers()}
        open_ones = {node_id: why for node_id, why in states.items() if why}
        doubts = {pages.namespace: doubts for pages in self._opened if (doubts := pages.doubts())}
        self._keeper.report(
            {"breakers": open_ones, "usable": self._keeper.usable, "doubts": doubts}
        )

    def close(self) -> None:
        """The agent stays. Idempotent."""
        self._keeper.close()
        self._client.close()
