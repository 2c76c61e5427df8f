"""Sharing: a rank process's side of sharing with other nodes; made once per attach, for all host pools."""

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
    """Refuse settings that the agent would refuse only in its own log. Raises ``ConfigError``."""
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
        self._opened: list[
            RemoteTier
        ] = []  # replaced, never changed: the launcher's thread reads it
        check_settings(config.share)
        self._run_dir = RunDir.of(config)
        self._client = PeerClient(config.share, metrics.count)
        launcher = None
        try:
            launcher = self._launcher = AgentLauncher(
                config,
                self._run_dir,
                self._follow,
                flexkv=flexkv,
                metrics=metrics,
                new_secret=self._client.set_secret,
            )
            launcher.start()
        except OSError as exc:
            if launcher is not None:
                launcher.close()
            self._client.close()
            raise ConfigError(
                f"share.run_dir: cannot use {str(self._run_dir.path)!r}: {exc.strerror or exc}"
            ) from exc

    @classmethod
    def of(cls, config: FlexKVConfig, metrics: Metrics) -> Sharing | None:
        """None if sharing is not configured."""
        return cls(config, metrics) if config.share.wanted else None

    def pages(
        self, namespace: str, fields: Mapping[str, object], payload_bytes: int, metrics: Metrics
    ) -> RemoteTier | None:
        """Other nodes' pages of a namespace; None if only this server knows its weights."""
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
            usable=lambda: self._launcher.usable,
        )
        self._opened = [*(held for held in self._opened if not held.closed), pages]
        return pages

    def _follow(self) -> None:
        """Release files that the agent has replaced, also between lookups; report on other nodes."""
        states: dict[str, str] = {}
        for pages in self._opened:
            pages.follow()
            states |= {peer.node_id: self._client.is_open(peer.node_id) for peer in pages.peers()}
        open_ones = {node_id: reason for node_id, reason in states.items() if reason}
        doubts = {pages.namespace: doubts for pages in self._opened if (doubts := pages.doubts())}
        self._launcher.report(
            {
                "breakers": open_ones,
                "usable": self._launcher.usable,
                "doubts": doubts,
                "namespaces": sorted({pages.namespace for pages in self._opened}),
            }
        )

    def close(self) -> None:
        """The agent stays. Idempotent."""
        self._launcher.close()
        self._client.close()
