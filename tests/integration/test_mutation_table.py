"""Each fact that must match for a page to be right, changed alone, on SGLang's real pools and controller.

In each case the served model name, the tokens and the page hashes are the same, and (but for the page size) so
is the size of a page. Every case ends with the original set-up reading its own pages back, byte for byte: a
miss before that is due to the mutation. Below them the damages: what is right before the damage is delivered,
the rest is a miss. Every byte of every kind of file: ``tests/crash/test_damage.py``; a sidecar page that is
missing, evicted or damaged, for all pools of hybrid models: ``tests/pools/test_hybrid.py``.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flexkv_bed.controller import (
    Geometry,
    Rig,
    boot,
    expected_rows,
    page_hashes,
    prefetch_pages,
    token_ids,
    write_pages,
)
from flexkv_sglang import FlexKVStorage
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.identity.epochs import Epoch
from flexkv_sglang.integration import kv_settings as settings_module
from flexkv_sglang.integration.kv_settings import kv_settings
from flexkv_sglang.integration.served_model import model_identity
from models.checkpoints import write_checkpoint
from models.plain_pools import stored
from sglang_bed.weight_updater import Updates, forget_updates

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

TOKENS = token_ids(8 * 32)
GEOMETRY = Geometry(heads=2, head_dim=32)
FP8 = torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Setup:
    """One server: how it is started (but for ``model``), and its pools."""

    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    geometry: Geometry = GEOMETRY
    model: str = "model"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    forget_updates()
    yield
    forget_updates()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two checkpoints that differ in a few bytes of their weights, and files that arguments name."""
    write_checkpoint(tmp_path / "model", fill=1)
    write_checkpoint(tmp_path / "fine-tune", fill=2)
    for name, content in (("scales", "1"), ("other-scales", "2")):
        (tmp_path / f"{name}.json").write_text(content)
    for name, fill in (("adapter", 1), ("retrained", 2)):
        write_checkpoint(tmp_path / name / "x", fill)
    return tmp_path


def start(place: Path, setup: Setup, pages: str = "pages") -> Rig:
    arguments = {
        name: str(place / value[1:]) if isinstance(value, str) and value.startswith("@") else value
        for name, value in {"load_format": "auto", **setup.arguments}.items()
    }
    boot(place / setup.model, setup.geometry.page_size, **arguments)
    extra = {"path": str(place / pages), "size": "4MB"}
    return Rig(setup.geometry, extra=extra, model_name="the-served-name")


def written(place: Path, setup: Setup) -> str:
    """Write the prompt; the namespace."""
    with start(place, setup) as rig:
        assert write_pages(rig, TOKENS, seed=1).completed_tokens == len(TOKENS)
        return str(stored(rig.backend).spec.identity.namespace)


def assert_miss(place: Path, setup: Setup, pages: str = "pages") -> None:
    with start(place, setup, pages) as rig:
        assert rig.backend.batch_exists(page_hashes(TOKENS, 16)) == 0
        assert prefetch_pages(rig, TOKENS).hit_tokens == 0


def assert_hit(place: Path, setup: Setup, pages: str = "pages") -> None:
    with start(place, setup, pages) as rig:
        fetched = prefetch_pages(rig, TOKENS)
        assert fetched.hit_tokens == len(TOKENS)
        assert fetched.same_bytes(expected_rows(rig, len(TOKENS), seed=1))


def shaped(**changes: Any) -> Geometry:
    return dataclasses.replace(GEOMETRY, **changes)


MUTATIONS: dict[str, tuple[Setup, Setup]] = {
    "weights": (Setup(), Setup(model="fine-tune")),
    "dtype": (Setup(), Setup(geometry=shaped(dtype=torch.float16))),
    "fp8 type": (
        Setup({"kv_cache_dtype": "fp8_e4m3"}, shaped(dtype=FP8)),
        Setup({"kv_cache_dtype": "fp8_e5m2"}, shaped(dtype=torch.float8_e5m2)),
    ),
    "layout": (Setup(), Setup(geometry=shaped(layout="page_first_direct"))),
    "layout by heads": (Setup(), Setup(geometry=shaped(layout="page_head"))),
    "page size": (Setup(), Setup(geometry=shaped(page_size=32))),
    "heads and width": (Setup(), Setup(geometry=shaped(heads=4, head_dim=16))),
    "layers and heads": (
        Setup(geometry=shaped(layers=4)),
        Setup(geometry=shaped(layers=2, heads=4)),
    ),
    "rope": (Setup(), Setup({"json_model_override_args": '{"rope_theta": 1e6}'})),
    "context length": (
        Setup({"context_length": 2048}),
        Setup({"context_length": 1024}),
    ),
    "compute dtype": (Setup({"dtype": "bfloat16"}), Setup({"dtype": "float16"})),
    "scaling factors": (
        Setup({"quantization_param_path": "@scales.json"}),
        Setup({"quantization_param_path": "@other-scales.json"}),
    ),
    "quantization": (Setup(), Setup({"quantization": "w8a8_int8"})),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_a_miss_and_the_original_a_hit(place: Path, name: str) -> None:
    original, mutated = MUTATIONS[name]
    written(place, original)
    assert_miss(place, mutated)
    assert_hit(place, original)


@pytest.mark.parametrize(
    "shard",
    [
        {"tp_rank": 1, "tp_size": 2},
        {"tp_size": 2},
        {"pp_rank": 1, "pp_size": 2},
        {"attn_cp_rank": 1, "attn_cp_size": 2},
    ],
)
def test_another_shard_is_a_miss(place: Path, shard: dict[str, int]) -> None:
    written(place, Setup())
    with start(place, Setup()) as rig:
        config = dataclasses.replace(rig.controller.storage_config, **shard)
        other = FlexKVStorage(config, {})
        other.register_mem_pool_host(rig.host)
        assert other.batch_exists(page_hashes(TOKENS, 16)) == 0
        other.close()
    assert_hit(place, Setup())


def test_a_data_parallel_rank_is_no_mutation(place: Path) -> None:
    written(place, Setup())
    with start(place, Setup()) as rig:
        config = dataclasses.replace(rig.controller.storage_config, dp_rank=1)
        other = FlexKVStorage(config, {})
        other.register_mem_pool_host(rig.host)
        assert stored(other).spec.identity == stored(rig.backend).spec.identity
        other.close()


def test_a_weight_update_is_a_miss(place: Path) -> None:
    with start(place, Setup()) as rig:
        updates = Updates(rig)
        write_pages(rig, TOKENS, seed=1)
        updates.disk(place / "fine-tune")
        assert prefetch_pages(rig, TOKENS).hit_tokens == 0


def test_a_directory_copied_from_another_model_is_a_miss(place: Path) -> None:
    """As it is; and put under the name of the other namespace, where its journals are refused."""
    theirs = written(place, Setup(model="fine-tune"))
    shutil.copytree(place / "pages", place / "copied")
    assert_miss(place, Setup(), pages="copied")
    mine = next(path.name for path in (place / "copied").iterdir() if path.name != theirs)
    shutil.rmtree(place / "copied" / mine)
    (place / "copied" / theirs).rename(place / "copied" / mine)
    assert_miss(place, Setup(), pages="copied")
    assert_hit(place, Setup(model="fine-tune"))


def flip_a_bit(slots: bytearray, page: int, size: int) -> None:
    slots[page * size + size // 2] ^= 0x10


def tear(slots: bytearray, page: int, size: int) -> None:
    slots[page * size + size // 2 : (page + 1) * size] = bytes(size - size // 2)


def swap_with_the_next(slots: bytearray, page: int, size: int) -> None:
    here, there = slice(page * size, (page + 1) * size), slice((page + 1) * size, (page + 2) * size)
    slots[here], slots[there] = slots[there], slots[here]


@pytest.mark.parametrize("damage", [flip_a_bit, tear, swap_with_the_next])
def test_a_damaged_page_ends_the_prefix(
    place: Path, damage: Callable[[bytearray, int, int], None]
) -> None:
    namespace = written(place, Setup())
    (file,) = (place / "pages" / namespace).glob("*.slots")
    slots = bytearray(file.read_bytes())
    damage(slots, 5, int(file.name.split(".")[1]))
    file.write_bytes(slots)
    with start(place, Setup()) as rig:
        fetched = prefetch_pages(rig, TOKENS)
        assert (fetched.hit_tokens, fetched.completed_tokens) == (len(TOKENS), 5 * 16)
        assert fetched.same_bytes(expected_rows(rig, 5 * 16, seed=1))
        assert prefetch_pages(rig, TOKENS).hit_tokens == 5 * 16  # known from now on


def test_pages_that_go_between_exists_and_get_are_a_miss(place: Path) -> None:
    written(place, Setup())
    with start(place, Setup()) as rig:
        hashes = page_hashes(TOKENS, 16)
        assert rig.backend.batch_exists(hashes) == len(hashes)
        rig.backend.clear()
        rows = rig.host.alloc(len(TOKENS))
        assert rig.backend.batch_get_v1(hashes, rows) == [False] * len(hashes)


def test_a_directory_copied_from_another_machine_with_the_same_model_is_a_hit(place: Path) -> None:
    written(place, Setup())
    shutil.copytree(place / "pages", place / "copied")
    assert_hit(place, Setup(), pages="copied")


def test_the_namespace_is_written_in_full(place: Path) -> None:
    name = written(place, Setup({"kv_cache_dtype": "bfloat16"}))
    fields = json.loads((place / "pages" / name / "NAMESPACE.json").read_text())
    assert fields["namespace"] == name
    assert fields["model"].startswith("config:")
    assert fields["settings"]["kv_cache_dtype"] == "bfloat16"
    assert fields["settings"]["load_format"] == "auto"
    assert fields["geometry"] == {
        "head_num": 2,
        "head_dim": 32,
        "v_head_dim": 32,
        "target_layer_num": 3,
        "head_group_num": 1,
        "end_layer": 2,
    }
    assert fields.keys() >= {"dtype", "layout", "page_size", "tp", "pp", "attn_cp", "dcp", "epoch"}
    assert fields["epoch"] == ""


def test_adapters_of_the_command_line_are_told_apart_by_content(place: Path) -> None:
    """SGLang's page hash knows their name and path only."""
    boot(place / "model", load_format="auto")
    plain = kv_settings()
    assert "lora_paths" not in plain
    link = place / "link"
    seen = set()
    for target in ("adapter", "retrained"):
        settings_module._started_with.clear()  # as in a process that has just started
        link.unlink(missing_ok=True)
        link.symlink_to(place / target / "x")
        boot(
            place / "model",
            load_format="auto",
            enable_lora=True,
            lora_paths=[f"name={link}"],
            max_lora_rank=8,
            lora_target_modules=["q_proj"],
        )
        seen.add(kv_settings()["lora_paths"])
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda place: _from_another_server(place / "model"), "from elsewhere"),
        (lambda place: boot(_config_only(place), load_format="auto"), "holds no weight files"),
    ],
)
def test_weights_that_cannot_be_fingerprinted_need_a_model_id(
    place: Path, prepare: Callable[[Path], Any], reason: str
) -> None:
    prepare(place)
    with pytest.raises(ConfigError, match=rf"model_id: not set, .*{reason}.*Valid: any text"):
        model_identity(None, Epoch())
    assert model_identity("mine", Epoch()) == "id:mine"
    assert model_identity("mine", Epoch("abc")) == "id:mine weights:abc"


def test_files_replaced_under_a_running_server_do_not_rename_its_weights(place: Path) -> None:
    """A store that is detached and attached again serves the weights in memory, not those on disk."""
    boot(place / "model", load_format="auto")
    before = model_identity(None, Epoch())
    write_checkpoint(place / "model", fill=9)
    assert model_identity(None, Epoch()) == before


def test_adapters_and_files_replaced_under_a_running_server_do_not_rename_its_pages(
    place: Path,
) -> None:
    """Else what the old adapter wrote after a new attach would be read by a server with the new one."""
    boot(
        place / "model",
        load_format="auto",
        enable_lora=True,
        lora_paths=[f"name={place / 'adapter' / 'x'}"],
        max_lora_rank=8,
        lora_target_modules=["q_proj"],
        quantization_param_path=str(place / "scales.json"),
    )
    before = kv_settings()
    assert before.keys() >= {"lora_paths", "quantization_param_path"}
    write_checkpoint(place / "adapter" / "x", fill=9)
    (place / "scales.json").write_text("3")
    assert kv_settings() == before
    settings_module._started_with.clear()
    after = kv_settings()
    for name in ("lora_paths", "quantization_param_path"):
        assert after[name] != before[name]


def test_draft_pools_depend_on_both_models(place: Path) -> None:
    boot(place / "model", load_format="auto")
    target = model_identity(None, Epoch())
    draft = model_identity(None, Epoch(), draft=True)
    assert draft.startswith(target + " draft ")
    changed = model_identity(None, Epoch("abc"), draft=True)
    assert changed != draft


def _from_another_server(model: Path) -> None:
    boot(
        model,
        load_format="remote_instance",
        remote_instance_weight_loader_seed_instance_ip="127.0.0.1",
        remote_instance_weight_loader_seed_instance_service_port=1,
        remote_instance_weight_loader_send_weights_group_ports=[2],
    )


def _config_only(place: Path) -> Path:
    directory = place / "config-only"
    directory.mkdir()
    shutil.copy(place / "model" / "config.json", directory)
    return directory
