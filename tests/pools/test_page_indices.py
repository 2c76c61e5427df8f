"""Host indices that are no whole pages of the pool: False, and no byte is read or written anywhere."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from flexkv_bed.controller import LAYOUTS, Rig, boot
from flexkv_bed.tiny_model import write_config
from flexkv_sglang.identity.keys import page_key
from flexkv_sglang.pools.host_pages import UnsupportedPoolError, open_pages
from models import pool_matrix
from models.plain_pools import PAGES, FlatPool, LogicalPool, Pool, attach, config, names, transfer
from stores.engines import wait_until

pytestmark = pytest.mark.sglang

TOKENS = PAGES * 4
WRONG = (
    ("before the pool", [-4, -3, -2, -1]),
    ("behind the pool", [TOKENS, TOKENS + 1, TOKENS + 2, TOKENS + 3]),
    ("far behind it", [1 << 40, (1 << 40) + 1, (1 << 40) + 2, (1 << 40) + 3]),
    ("across two pages", [2, 3, 4, 5]),
    ("of two pages", [0, 1, 6, 7]),
    ("backwards", [3, 2, 1, 0]),
    ("one token", [0, 0, 0, 0]),
    ("too few", [0, 1]),
    ("no integers", [0.0, 1.0, 2.0, 3.0]),
)
KINDS = {"names its pages": Pool, "flat pages": FlatPool, "no bytes": LogicalPool}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("what", "wrong"), WRONG)
def test_wrong_indices_touch_nothing(
    tmp_path: Path, kind: str, what: str, wrong: list[int]
) -> None:
    anchor, pool = Pool(seed=1), KINDS[kind](seed=1)
    storage = attach(config(tmp_path), anchor, {"swa": pool})
    good, bad, keys = pool.indices(7), torch.tensor(wrong), names(2)
    assert storage.batch_set_v1(keys[:1], good) == [True]
    assert storage.batch_set_v2([transfer("swa", keys[:1], good)]) == {"swa": [True]}
    whole = anchor.rows.clone(), pool.rows.clone()

    assert storage.batch_set_v1(keys[1:], bad) == [False]
    assert storage.batch_set_v2([transfer("swa", keys[1:], bad)]) == {"swa": [False]}
    assert storage.batch_exists(keys[1:]) == 0
    assert storage.batch_get_v1(keys[:1], bad) == [False]
    assert storage.batch_get_v2([transfer("swa", keys[:1], bad)]) == {"swa": [False]}
    both = torch.cat([good, bad])
    assert not any(storage.batch_get_v1([keys[0], keys[0]], both)), "nor a good one beside it"
    assert torch.equal(anchor.rows, whole[0])
    assert torch.equal(pool.rows, whole[1])
    assert storage.batch_get_v1(keys[:1], good) == [True]
    storage.close()


def test_two_keys_are_not_read_into_one_page(tmp_path: Path) -> None:
    pool = Pool(seed=1)
    storage = attach(config(tmp_path), pool, {})
    assert storage.batch_set_v1(names(2), pool.indices(0, 1)) == [True, True]
    before = pool.rows.clone()
    assert storage.batch_get_v1(names(2), pool.indices(5, 5)) == [False, False]
    assert torch.equal(pool.rows, before)
    assert storage.batch_set_v1(names(2, 1), pool.indices(5, 5)) == [True, True], "one page twice"
    storage.close()


def test_each_host_pool_of_sglang_refuses_them(tmp_path: Path) -> None:
    boot(str(write_config(tmp_path / "model")))
    for number, (kind, layout) in enumerate((k, item) for k, v in LAYOUTS.items() for item in v):
        geometry = pool_matrix.odd(kind, layout, 16)
        rig: Rig = pool_matrix.rig(geometry, str(tmp_path / str(number)))
        storage, pool = rig.controller.storage_backend, rig.controller.mem_pool_host
        end, page = int(pool.logical_size), int(pool.logical_page_size)
        first = torch.arange(page)
        assert storage.batch_set_v1(names(1), first) == [True], (kind, layout)
        for start in (-page, -1, 1, page // 2, end, end - 1, 1 << 40):
            assert storage.batch_set_v1(names(1, 9), first + start) == [False], (
                kind,
                layout,
                start,
            )
            assert storage.batch_get_v1(names(1), first + start) == [False], (kind, layout, start)
        assert storage.batch_set_v1(names(1, 2), first + end - page) == [True], (kind, layout)
        rig.close()


def test_what_is_no_pool_is_an_unsupported_pool(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = Pool()
    empty.rows = torch.zeros((4, 0), dtype=torch.uint8)
    for strange in (MagicMock(), object(), None, empty):
        with pytest.raises(UnsupportedPoolError):
            open_pages(strange)  # type: ignore[arg-type]
    caplog.clear()
    storage = attach(config(tmp_path), MagicMock(), {})
    assert storage.batch_set_v1(names(2), torch.arange(8)) == [False, False]
    assert storage.batch_exists(names(2)) == 0
    assert storage.batch_get_v1(names(2), torch.arange(8)) == [False, False]
    assert sum("cannot be stored" in record.getMessage() for record in caplog.records) == 1
    storage.close()


def test_a_rank_that_writes_no_pages_answers_true_for_what_the_others_write(tmp_path: Path) -> None:
    pool = Pool(seed=1)
    ranks = [attach(config(tmp_path, rank, 2, mla=True), pool, {}) for rank in range(2)]
    indices = pool.indices(0, 1)
    assert ranks[1].batch_set_v1(names(2), indices) == [True, True]
    assert ranks[1].batch_set_v2([transfer("kv", names(2), indices)]) == {"kv": [True, True]}
    assert ranks[1].batch_exists(names(2)) == 0, "it stored nothing"
    assert ranks[1].batch_set_v1(names(2), indices + 1) == [False, False]
    assert ranks[0].batch_set_v1(names(2), indices) == [True, True]
    assert wait_until(lambda: ranks[1].batch_exists(names(2)) == 2)
    for storage in ranks:
        storage.close()


def test_a_key_has_one_spelling() -> None:
    low = "ab" * 32
    assert page_key(low) == bytes.fromhex(low)
    others = {
        low.upper(),
        "Ab" + low[2:],
        low[:62] + "  ",
        " " + low[:62] + " ",
        low[:60] + "\n" * 4,
    }
    found = {page_key(text) for text in others | {low}}
    assert len(found) == len(others) + 1
    assert all(len(key) == 32 for key in found)
