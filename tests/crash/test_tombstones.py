"""A slot is not rewritten before a thread has appended its tombstone to the journal."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from flexkv_sglang.backends import failpoints
from flexkv_sglang.backends.failpoints import Failpoint
from flexkv_sglang.types import SlotId
from stores.engines import keys, open_engine, soon
from stores.killer import PauseAt

PAGE = 4096


@pytest.fixture(autouse=True)
def _unarmed() -> Iterator[None]:
    yield
    failpoints.set_hook(None)


class _SlowLeave:
    """The engine's lock; the first thread named "first" stops just after releasing it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.left, self.go_on = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        self._inner.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inner.release()
        if threading.current_thread().name == "first" and not self.left.is_set():
            self.left.set()
            assert self.go_on.wait(10)


def test_a_tombstone_that_another_thread_took_is_waited_for(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, 16 * PAGE)
    pages: Any = engine._pages
    pages.lock = slow = _SlowLeave(pages.lock)
    failpoints.set_hook(pause := PauseAt(Failpoint.EVICT_BEFORE))
    names = keys(2)
    first, second = (
        threading.Thread(
            target=pages.bury, args=([(names[i], SlotId(i))], [SlotId(i)], soon()), name=name
        )
        for i, name in enumerate(("first", "second"))
    )
    first.start()
    assert slow.left.wait(10)  # it owes its tombstone
    second.start()
    assert pause.arrived.wait(10)  # this one took both and has appended neither
    slow.go_on.set()
    first.join(0.2)
    assert first.is_alive()
    pause.go_on.set()
    first.join()
    second.join()
    engine.close()
