"""A rank process without SGLang: a hierarchy that shares, driven by JSON lines on stdin. Run as a program.

Bytes of a page follow from its key, so every process can tell right ones from wrong ones. Whatever the hierarchy
raises ends the process: a test that survives has seen no exception.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_sglang.cache.assembly import Quota, open_tiers, prepare_tiers
from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.identity.keys import Identity
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing.rank import Sharing
from flexkv_sglang.types import PageBuffers, PageKey

POISON = 0xA5
_FLEET_AGENT = Path(__file__).with_name("fleet_agent.py")


def identity(payload_bytes: int) -> Identity:
    """Identity of the model, the same on every node."""
    whole = (0, 1)
    return Identity(
        model="fleet-test",
        settings={},
        pool="kv",
        pool_class="Plain",
        dtype="uint8",
        layout="page_first",
        page_size=16,
        buffer_bytes=(payload_bytes,),
        geometry={},
        first_layer=0,
        layer_count=1,
        tp=whole,
        pp=whole,
        attn_cp=whole,
        dcp=whole,
        split_heads=0,
        storage_format_tag="",
    )


def key(seed: int, number: int) -> PageKey:
    """Key of page ``number`` of chain ``seed``."""
    return PageKey(hashlib.sha256(f"{seed}:{number}".encode()).digest())


def chain(seed: int, count: int) -> list[PageKey]:
    return [key(seed, number) for number in range(count)]


def content(page: PageKey, payload_bytes: int) -> npt.NDArray[np.uint8]:
    """Bytes of a key's page."""
    return np.random.default_rng(list(page[:16])).integers(0, 256, payload_bytes, np.uint8)


class Memory:
    """Host pages: uint8 ``[n, payload_bytes]``, 4096-aligned."""

    def __init__(self, count: int, payload_bytes: int) -> None:
        raw = np.empty(count * payload_bytes + 4096, np.uint8)
        start = -raw.ctypes.data % 4096
        self.rows = raw[start : start + count * payload_bytes].reshape(count, payload_bytes)
        steps = np.arange(count, dtype=np.uint64)[:, None] * np.uint64(payload_bytes)
        addresses = np.uint64(self.rows.ctypes.data) + steps
        self.buffers = PageBuffers(addresses, np.array([payload_bytes], np.uint64))


class Rank:
    """The commands. Every answer has ``seconds``."""

    def __init__(
        self, config: FlexKVConfig, payload_bytes: int, times: Mapping[str, float]
    ) -> None:
        config = replace(config, share=replace(config.share, **times))
        flexkv = [sys.executable, "-P", str(_FLEET_AGENT), json.dumps(times)]
        self._payload_bytes = payload_bytes
        self._metrics = Metrics()
        spec = identity(payload_bytes)
        self._sharing = Sharing(config, self._metrics, flexkv) if config.share.wanted else None
        self.store: Tiers = open_tiers(
            config,
            prepare_tiers(config),
            spec.namespace,
            spec.fields(),
            payload_bytes,
            [Quota(tier.size) for tier in config.tiers],
            self._metrics,
            self._sharing,
        )
        self._last: tuple[Memory, npt.NDArray[np.uint8]] | None = None

    def put(self, seed: int, pages: int, start: int = 0) -> dict[str, Any]:
        """Store pages ``start`` to ``pages`` of a chain."""
        keys = chain(seed, pages)[start:]
        memory = Memory(len(keys), self._payload_bytes)
        for row, page in zip(memory.rows, keys, strict=True):
            row[:] = content(page, self._payload_bytes)
        parent = key(seed, start - 1) if start else None
        done = sum(self.store.put(keys, memory.buffers, parent, time.monotonic() + 8))
        return {"done": done, "at": time.monotonic()}

    def prefix(self, seed: int, pages: int) -> dict[str, Any]:
        """Length of the prefix that a read would find."""
        return {"pages": self.store.prefix(chain(seed, pages))}

    def await_prefix(self, seed: int, pages: int, seconds: float = 10.0) -> dict[str, Any]:
        """Wait for a prefix of ``pages`` pages. ``at``: its time, ``time.monotonic()`` seconds."""
        keys, until = chain(seed, pages), time.monotonic() + seconds
        while self.store.prefix(keys) < pages:
            if time.monotonic() > until:
                return {"at": None}
            time.sleep(0.0005)
        return {"at": time.monotonic()}

    def get(self, seed: int, pages: int, seconds: float = 5.0) -> dict[str, Any]:
        """Read pages; ``wrong``: those reported True whose bytes are not theirs."""
        keys = chain(seed, pages)
        memory = Memory(pages, self._payload_bytes)
        memory.rows[:] = POISON
        flags = self.store.get(keys, memory.buffers, time.monotonic() + seconds)
        good = sum(flags)
        wrong = sum(
            not np.array_equal(memory.rows[i], content(keys[i], self._payload_bytes))
            for i in range(good)
        )
        self._last = memory, memory.rows.copy()
        return {
            "pages": good,
            "wrong": wrong,
            "leading": flags == [True] * good + [False] * (pages - good),
        }

    def unchanged(self) -> dict[str, Any]:
        """``unchanged``: nothing was written to the targets of the last ``get`` after it returned."""
        assert self._last is not None
        memory, before = self._last
        return {"unchanged": bool(np.array_equal(memory.rows, before))}

    def counters(self) -> dict[str, Any]:
        return {"counters": {name: n for name, n in self._metrics.snapshot().items() if n}}

    def clear(self) -> dict[str, Any]:
        """Clear the own pages."""
        self.store.clear()
        return {}

    def remote_pages(self) -> dict[str, Any]:
        return {"pages": self.store.tiers[-1].page_count()}

    def close(self) -> None:
        self.store.close()
        if self._sharing is not None:
            self._sharing.close()


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    config = FlexKVConfig.parse(json.loads(Path(sys.argv[1]).read_text()))
    rank = Rank(config, int(sys.argv[2]), json.loads(sys.argv[3]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        begin = time.monotonic()
        answer = getattr(rank, asked.pop("op"))(**asked)
        answer["seconds"] = time.monotonic() - begin
        print(json.dumps(answer), flush=True)
    rank.close()


if __name__ == "__main__":
    main()
