"""The specification of host pools: which namespace their pages have, and which ranks write them.

It follows from SGLang's storage configuration, the served model and the host pool.
"""

from __future__ import annotations

from typing import Any

from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.identity.epochs import WEIGHTS
from flexkv_sglang.identity.keys import Identity
from flexkv_sglang.integration.compat import data_parallel_size
from flexkv_sglang.integration.kv_settings import kv_settings
from flexkv_sglang.integration.page_hash import warn_of_salts
from flexkv_sglang.integration.served_model import model_identity
from flexkv_sglang.metrics.prometheus import export
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.pools.host_pages import PoolPages
from flexkv_sglang.pools.pool import PoolSpec
from flexkv_sglang.pools.pool_rules import (
    element_types,
    is_draft,
    is_replicated,
    pool_class,
    written_by_every_rank,
)

_POOL_GEOMETRY = (
    "head_num",
    "head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "kv_cache_dim",
    "index_head_dim",
    "target_layer_num",
    "head_group_num",
    "end_layer",
)
_HEAD_COUNTS = frozenset({"head_num", "head_group_num"})


class PoolSpecs:
    """Specifies the pools of one attach. ``storage_config``: SGLang's ``HiCacheStorageConfig``.

    The weights are those of ``epochs.WEIGHTS`` at the time of the call; settings are read once per attach.
    """

    def __init__(self, config: FlexKVConfig, storage_config: Any) -> None:
        self._model_id = config.model_id
        self._config = storage_config
        self._mla = bool(storage_config.is_mla_model)
        self._settings: dict[bool, dict[str, str]] = {}  # by: is it for a draft model's pools?
        self._metrics: dict[str, Metrics] = {}
        if storage_config.tp_rank == 0:  # one line per server is enough
            warn_of_salts()

    def describe(self, name: str, pool: Any, pages: PoolPages) -> PoolSpec:
        """The specification of a host pool. Raises ``ConfigError`` as ``identity``."""
        writers, writes = self.writers(name)
        return PoolSpec(self.identity(name, pool, pages), writers, writes, self.metrics_of(name))

    def metrics_of(self, name: str) -> Metrics:
        """The counters of a pool; they live as long as this object."""
        if name not in self._metrics:
            self._metrics[name] = Metrics()
            export(self._metrics[name], self._config, name)
        return self._metrics[name]

    def writers(self, name: str) -> tuple[int, bool]:
        """How many rank processes of this server write the pool, and whether this is one of them."""
        config = self._config
        everyone = written_by_every_rank(name, mla=self._mla)
        chosen = getattr(config, "is_storage_writer", not self._mla or config.tp_rank == 0)
        writers = (
            (config.tp_size if everyone else getattr(config, "dcp_size", 1))
            * getattr(config, "pp_size", 1)
            * getattr(config, "attn_cp_size", 1)
            * data_parallel_size()
        )
        return writers, bool(everyone or chosen)

    def identity(self, name: str, pool: Any, pages: PoolPages) -> Identity:
        """The identity of a host pool's pages with the current weights.

        Raises ``ConfigError`` if the weights cannot be identified, or a file that an argument names is gone.
        """
        config = self._config
        groups = pages.groups  # of the same bytes for every tensor-parallel size
        shared = groups.split or is_replicated(name, pool, mla=self._mla)
        draft = is_draft(name)
        return Identity(
            model=model_identity(self._model_id, WEIGHTS.epoch, draft=draft),
            settings=self._settings_of(draft),
            pool=name,
            pool_class=pool_class(pool),
            dtype=element_types(name, pool),
            layout=str(pool.layout),
            page_size=pages.tokens_per_page,
            buffer_bytes=pages.geometry.lengths,
            geometry=pool_geometry(pool, groups.count),
            first_layer=int(getattr(pool, "start_layer", 0) or 0),
            layer_count=int(getattr(pool, "layer_num", 0) or 0),
            tp=(0, 1) if shared else (int(config.tp_rank), int(config.tp_size)),
            pp=(int(getattr(config, "pp_rank", 0)), int(getattr(config, "pp_size", 1))),
            attn_cp=(
                int(getattr(config, "attn_cp_rank", 0)),
                int(getattr(config, "attn_cp_size", 1)),
            ),
            dcp=(int(getattr(config, "dcp_rank", 0)), int(getattr(config, "dcp_size", 1))),
            split_heads=groups.lcm,
            storage_format_tag=str(getattr(pool, "storage_format_tag", None) or ""),
            epoch=WEIGHTS.epoch.nonce,
        )

    def _settings_of(self, draft: bool) -> dict[str, str]:
        if draft not in self._settings:
            self._settings[draft] = kv_settings(draft=draft)
        return self._settings[draft]


def pool_geometry(pool: Any, head_groups: int = 1) -> dict[str, int]:
    """The shape fields that a host pool has. Head counts are those of one of ``head_groups`` groups."""
    found = {name: getattr(pool, name, None) for name in _POOL_GEOMETRY}
    shape = {name: int(value) for name, value in found.items() if isinstance(value, int)}
    return {n: max(1, v // head_groups) if n in _HEAD_COUNTS else v for n, v in shape.items()}
