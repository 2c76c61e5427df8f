"""Adapters and salts in the names of stored pages, on the SGLang release on the path: its own radix keys, tree nodes,
page hashes and controller, and our storage as its factory makes it. The rows of the mutation table per release.
"""

from __future__ import annotations

import inspect
import logging
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sglang
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache import radix_cache, utils
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from flexkv_sglang import FlexKVStorage
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.integration import kv_settings, page_hash, plugin
from models.plain_pools import KV_PAGES, KVPool, tokens
from sglang_bed.releases import DYNAMIC, HAS, release, storage_config

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

PAGE = 4
PROMPT = list(range(100, 100 + 3 * PAGE))
TOLD_APART = HAS["namespaces"] <= release()
HAS_SALT = "cache_salt" in inspect.signature(RadixKey).parameters
NAMESPACES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "two adapters": ({"extra_key": "a" * 32}, {"extra_key": "b" * 32}),
    "an adapter and none": ({"extra_key": "a" * 32}, {}),
    **(
        {
            "two salts": ({"cache_salt": "tenant 1"}, {"cache_salt": "tenant 2"}),
            "a salt and none": ({"cache_salt": "tenant 1"}, {}),
            "a salt and an adapter of that name": ({"cache_salt": "x"}, {"extra_key": "x"}),
        }
        if HAS_SALT  # before: a salt is a part of extra_key
        else {"two salts": ({"extra_key": "tenant 1"}, {"extra_key": "tenant 2"})}
    ),
}


def written_names(**namespace: str) -> list[str]:
    """The names under which a tree node's pages are written."""
    key = RadixKey(array("q", PROMPT), **namespace)
    node = SimpleNamespace(key=key, parent=None, hash_value=None)
    home: Any = utils if hasattr(utils, "compute_node_hash_values") else radix_cache
    names: list[str] = home.compute_node_hash_values(node, PAGE)
    return names


def asked_names(**namespace: str) -> list[str]:
    """The names that the controller asks storage for, when a request comes."""
    asked: list[str] = []

    def batch_exists(names: list[str], *_args: Any) -> int:
        asked.extend(names)
        return len(names)

    made: Any = object.__new__(HiCacheController)
    made.page_size, made.storage_batch_size = PAGE, 128
    made.prefetch_threshold = 1
    made.storage_backend = SimpleNamespace(batch_exists=batch_exists)
    made.get_hash_str = utils.get_hash_str  # older releases keep it here
    key = RadixKey(array("q", PROMPT), **namespace)
    made._storage_hit_query(
        SimpleNamespace(token_ids=key, last_hash=None, prefix_keys=None, pool_transfers=None)
    )
    return asked


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FlexKVStorage]:
    made = attached(tmp_path)
    yield made
    made.close()


def attached(place: Path) -> FlexKVStorage:
    extra = {"path": str(place), "size": "16MB", "model_id": "m", **DYNAMIC}
    pool = KVPool(seed=1)
    config = storage_config(extra_config=extra)
    made: FlexKVStorage = StorageBackendFactory.create_backend("dynamic", config, pool)
    made.register_mem_pool_host(pool)
    return made


@pytest.mark.parametrize("namespace", NAMESPACES.values(), ids=NAMESPACES)
def test_pages_of_another_namespace_are_a_miss_where_the_release_names_them_apart(
    storage: FlexKVStorage, namespace: tuple[dict[str, str], dict[str, str]]
) -> None:
    mine, other = (written_names(**words) for words in namespace)
    assert storage.batch_set_v1(mine, tokens(0, 1, 2), HiCacheStorageExtraInfo()) == [True] * 3
    assert storage.batch_exists(asked_names(**namespace[0])) == 3
    assert storage.batch_exists(asked_names(**namespace[1])) == (0 if TOLD_APART else 3)
    assert (set(mine) & set(other) == set()) is TOLD_APART


@pytest.mark.parametrize("namespace", NAMESPACES.values(), ids=NAMESPACES)
def test_each_namespace_gets_its_own_bytes(
    storage: FlexKVStorage, namespace: tuple[dict[str, str], dict[str, str]]
) -> None:
    mine, other = (written_names(**words) for words in namespace)
    storage.batch_set_v1(mine, tokens(0, 1, 2), HiCacheStorageExtraInfo())
    storage.batch_set_v1(other, tokens(3, 4, 5), HiCacheStorageExtraInfo())
    for names, target in ((mine, (10, 11, 12)), (other, (13, 14, 15))):
        assert storage.batch_get_v1(names, tokens(*target), HiCacheStorageExtraInfo()) == [True] * 3
    held = storage.mem_pool_host.pages
    assert np.array_equal(held[[10, KV_PAGES + 10]], held[[0, KV_PAGES]])
    source = 3 if TOLD_APART else 0  # page 0 is the other namespace's: the reason to refuse LoRA
    assert np.array_equal(held[[13, KV_PAGES + 13]], held[[source, KV_PAGES + source]])


def test_we_know_what_the_release_does() -> None:
    assert page_hash.contains_namespace() is TOLD_APART


LORA = {
    "adapters of the command line": {"enable_lora": True, "lora_paths": ["a=/nowhere"]},
    "adapters alone": {"enable_lora": None, "lora_paths": ["a=/nowhere"]},
    "adapters that come over HTTP": {"enable_lora": True, "lora_paths": None},
}


@pytest.mark.parametrize("given", LORA.values(), ids=LORA)
@pytest.mark.parametrize(
    "flag", ["hicache_storage_backend", "unified_cache_external_linker_backend"]
)
def test_lora_is_refused_before_a_model_is_loaded(flag: str, given: dict[str, Any]) -> None:
    args = SimpleNamespace(**{flag: "flexkv"}, **given)
    if TOLD_APART:
        if "linker" in flag and plugin.linker_misfit() is not None:
            pytest.skip("this release has no linkers that a plug-in can name")
        plugin.refuse_early(args)
        return
    with pytest.raises(ConfigError, match=rf"enable_lora: SGLang {sglang.__version__} .*0\.5\.20"):
        plugin.refuse_early(args)


@pytest.mark.parametrize("given", LORA.values(), ids=LORA)
def test_lora_is_refused_at_the_attach_without_the_plug_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    monkeypatch.setattr(kv_settings, "server_args", lambda: SimpleNamespace(**given))
    monkeypatch.setattr(kv_settings, "_digest_at", lambda *_args: "digest")
    if TOLD_APART:
        attached(tmp_path).close()
        return
    with pytest.raises(ConfigError, match="enable_lora"):
        attached(tmp_path)


def test_sglang_loads_no_adapter_over_http_unless_lora_was_enabled() -> None:
    """So ``enable_lora`` at the attach tells all: it cannot be switched on later."""
    from sglang.srt.managers import tokenizer_control_mixin as control

    for name in ("load_lora_adapter", "load_lora_adapter_from_tensors"):
        source = inspect.getsource(getattr(control.TokenizerControlMixin, name))
        assert "enable_lora:\n                raise ValueError" in source, name


def test_one_line_says_that_salts_isolate_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="flexkv_sglang"):
        attached(tmp_path).close()
    said = [r.getMessage() for r in caplog.records if "isolate nothing" in r.getMessage()]
    assert len(said) == (0 if TOLD_APART else 1)
    for line in said:
        assert sglang.__version__ in line
        assert "0.5.20 or newer" in line
