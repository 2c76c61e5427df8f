"""The storage interface, called with arguments that SGLang never passes: it answers a miss and raises nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexkv_sglang import FlexKVStorage
from models.plain_pools import Pool, attach, config, hybrid, names, transfer

pytestmark = pytest.mark.sglang

HERE = names(2)


class Evil:
    """Fails at each question."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __len__(self) -> int:
        raise RuntimeError("length")

    def __bool__(self) -> bool:
        raise RuntimeError("truth")


ODD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a number": lambda: 7,
    "a text": lambda: "x",
    "bytes": lambda: b"ab" * 32,
    "a generator": lambda: (key for key in HERE),
    "Nones": lambda: [None],
    "objects": lambda: [object()],
    "evil": Evil,
    "evil ones": lambda: [Evil()],
    "half": lambda: [transfer("kv", HERE, Pool().indices(0, 1)), None],
    "no list of keys": lambda: [transfer("kv", 7, None)],  # type: ignore[arg-type]
    "a surrogate": lambda: ["\udc80" * 64],
    "a tensor": lambda: torch.zeros(4),
}
CALLS = (
    *("batch_get_v1", "batch_set_v1", "batch_get_v2", "batch_set_v2", "batch_exists", "exists"),
    *("batch_exists_v2", "get", "set", "batch_get", "batch_set", "register_mem_host_pool_v2"),
)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlexKVStorage]:
    found = hybrid(tmp_path_factory.mktemp("abuse"))
    yield found
    found.close()


@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_raised_and_nothing_is_found(storage: FlexKVStorage, call: str) -> None:
    method = getattr(storage, call)
    answers = [method()]
    for make in ODD.values():
        answers += [method(make()), method(make(), make()), method(HERE, make(), make())]
        answers.append(method(make(), torch.arange(8)))
    for answer in answers if "set" not in call else ():  # keys in a generator are stored
        if isinstance(answer, dict):
            assert not any(any(flags) for flags in answer.values()), answer
        elif isinstance(answer, list):
            assert not any(flag is not None and flag is not False for flag in answer), answer
        elif answer is not None and not isinstance(answer, bool | int):
            assert answer.kv_hit_pages == 0, answer
        else:
            assert not answer, answer
    assert storage.batch_set_v1(HERE, torch.arange(8)) == [True, True], "it works as before"
    storage.clear()


def test_a_transfer_beside_one_that_is_none_has_its_answer(storage: FlexKVStorage) -> None:
    given = [transfer("kv", HERE, torch.arange(8)), None]
    assert storage.batch_get_v2(given) == {"kv": [False, False]}


def test_a_prefetch_timeout_that_is_no_time_is_not_taken(tmp_path: Path) -> None:
    storage = attach(config(tmp_path), Pool(seed=1), {})
    for wrong in (("x", 1), (None, None), (float("nan"), 1.0), (-1.0, 0.0)):
        storage.set_prefetch_timeout(*wrong)  # type: ignore[arg-type]
    assert storage.batch_set_v1(HERE, torch.arange(8)) == [True, True]
    assert storage.batch_get_v1(HERE, torch.arange(8)) == [True, True]
    storage.close()
