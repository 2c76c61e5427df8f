"""Start-up: SGLang's demands on a linker class, the name ``flexkv``, and the refused models and settings."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexkv_bed.controller import Geometry, allocator, boot, device_pool
from flexkv_bed.tiny_model import write_config
from sglang_bed.linker_bed import SIZE, init_params, side

from sglang.srt.mem_cache.unified_cache import linker_factory  # isort: skip
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType  # isort: skip
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (  # isort: skip
    UnifiedCacheLinker,
    UnifiedCacheLinkerWrapper,
)
from sglang.srt.server_args import ServerArgs  # isort: skip

from flexkv_sglang.cli.doctor.server import Server
from flexkv_sglang.cli.doctor.setup import _other_backend
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.integration import plugin
from flexkv_sglang.linker.device_models import device_pools
from flexkv_sglang.linker.linker import FlexKVLinker

pytestmark = [pytest.mark.sglang]


@pytest.fixture(scope="module", autouse=True)
def _booted(tmp_path_factory: pytest.TempPathFactory) -> None:
    boot(write_config(tmp_path_factory.mktemp("model")))


def test_every_method_sglang_declares_is_ours_with_its_parameters() -> None:
    assert not inspect.isabstract(FlexKVLinker)
    for name in UnifiedCacheLinker.__abstractmethods__:
        ours = inspect.signature(inspect.unwrap(getattr(FlexKVLinker, name))).parameters
        theirs = inspect.signature(getattr(UnifiedCacheLinker, name)).parameters
        assert list(ours) == list(theirs), name


def test_what_sglang_calls_on_a_linker_is_what_it_declares() -> None:
    """Its wrapper is the only caller: a new call there fails here first."""
    source = inspect.getsource(UnifiedCacheLinkerWrapper)
    called = {word.split("(")[0].split(")")[0] for word in source.split("cache_linker.")[1:]}
    called = {
        "".join(c for c in word.split()[0] if c.isidentifier() or c == "_") for word in called
    }
    assert called <= UnifiedCacheLinker.__abstractmethods__ | {"layer_done_counter", "pools"}


@pytest.mark.parametrize("backend", ["flexkv", "dynamic"])
def test_sglangs_factory_makes_our_linker(tmp_path: Path, backend: str) -> None:
    geometry = Geometry()
    config: dict[str, Any] = {"path": str(tmp_path), "size": SIZE}
    if backend == "dynamic":
        config = {
            "linker": "FlexKVLinker",
            "linker_module_path": "flexkv_sglang.linker",
            "linker_extra_config": config,
        }
    linker = linker_factory.create_unified_cache_linker(
        None,
        init_params(allocator(device_pool(geometry), geometry), geometry.page_size),
        backend=backend,
        config=config,
        components={ComponentType.FULL},
    )
    try:
        assert isinstance(linker, FlexKVLinker)
        assert linker.layer_done_counter.num_layers == geometry.layers
    finally:
        linker.close()


def test_the_command_line_accepts_the_name() -> None:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    given = parser.parse_args(
        ["--model-path", "m", "--unified-cache-external-linker-backend", "flexkv"]
    )
    assert given.unified_cache_external_linker_backend == "flexkv"


def test_a_wrong_setting_is_said_before_a_model_is_loaded() -> None:
    args = SimpleNamespace(
        unified_cache_external_linker_backend="flexkv",
        unified_cache_external_linker_config={"sise": "1GB"},
    )
    with pytest.raises(ConfigError, match=r"sise: unknown key.*Did you mean 'size'"):
        plugin.refuse_early(args)


def refused(pool: Any, match: str, **more: Any) -> None:
    given = {"dcp_size": 1, "unified": False} | more
    drafts = given.pop("drafts", ())
    params = SimpleNamespace(page_size=16, mtp_draft_device_pools=drafts)
    with pytest.raises(ConfigError, match=match):
        device_pools(pool, params, **given)


def test_what_would_store_other_bytes_is_refused_with_the_reason() -> None:
    plain = device_pool(Geometry())
    refused(plain, "enable_unified_memory: True: pages have virtual indices", unified=True)
    refused(plain, "dcp_size: 2: a rank holds parts", dcp_size=2)
    refused(plain, "draft pools: 1: their pages would not come back", drafts=(plain,))
    for layout in ("hnd", "vectorized_5d", "page_major"):
        other = device_pool(Geometry())
        other.kv_cache_layout = layout
        refused(other, f"kv_cache_layout: {layout}: its chunks are not token after token")
    scaled = device_pool(Geometry())
    scaled.k_scale_buffer = [torch.zeros(1)]
    refused(scaled, "scaled KV cache: .*: scales lie in other buffers")
    refused(
        SimpleNamespace(page_size=16, layer_num=1), "device pool: SimpleNamespace: .*byte order"
    )
    refused(device_pool(Geometry(page_size=64, size_tokens=2048)), "page_size: 16: the device pool")


def test_a_pool_sglang_derives_from_a_known_one_is_not_taken_for_it() -> None:
    kind = type("MHATokenToKVPoolFP4", (type(device_pool(Geometry())),), {})
    pool = device_pool(Geometry())
    pool.__class__ = kind
    refused(pool, "device pool: MHATokenToKVPoolFP4")


def test_a_component_without_a_pool_is_refused(tmp_path: Path) -> None:
    geometry = Geometry()
    slots = allocator(device_pool(geometry), geometry)
    with pytest.raises(ConfigError, match="tree component: SWA: the linker has no pool"):
        FlexKVLinker(
            None,
            init_params(slots, geometry.page_size),
            components={ComponentType.FULL, ComponentType.SWA},
            extra_config={"path": str(tmp_path)},
        )


def test_too_small_a_size_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size: "), side(tmp_path, Geometry(), size=4096):
        pass


def test_staging_has_no_attribute_its_host_pool_has_not() -> None:
    """The identity is made of these; a new one in SGLang's pools is seen by ``test_sharing``."""
    for kind in ("mha", "mla"):
        pool = device_pool(Geometry(kind=kind))  # type: ignore[arg-type]
        shape = device_pools(pool, SimpleNamespace(page_size=16), dcp_size=1, unified=False)[
            0
        ].shape
        assert dataclasses.asdict(shape)["part_bytes"]
        assert all(isinstance(value, int) for value in shape.fields.values())


@pytest.mark.parametrize("backend", ["flexkv", "dynamic"])
def test_the_doctor_knows_a_server_with_our_linker(backend: str) -> None:
    config: dict[str, Any] = {"path": "/somewhere"}
    if backend == "dynamic":
        config = {"linker": "FlexKVLinker", "linker_extra_config": config}
    flags = {
        "enable_hierarchical_cache": False,
        "page_size": 16,
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": backend,
        "unified_cache_external_linker_config": config,
    }
    server = Server("http://here", flags=flags)
    assert _other_backend(server) == ""
    assert server.config is not None
    assert server.config.tiers[0].path == ("/somewhere",)
    assert server.threshold == 16
    other = Server("http://here", flags={**flags, "unified_cache_external_linker_backend": "mori"})
    assert _other_backend(other)
