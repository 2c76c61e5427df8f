"""What ``flexkv doctor`` says about real stores, without a process per question."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from doctor.recorded_sglang import serving
from flexkv_sglang import FlexKVStorage
from flexkv_sglang.cli.doctor.command import diagnose
from flexkv_sglang.cli.doctor.facts import Facts, Plugin, gather
from flexkv_sglang.cli.doctor.server import ask_server
from flexkv_sglang.cli.doctor.setup import Finding
from models.plain_pools import Pool, attach, config, pool_of
from stores.engines import keys, wait_until

FITS = Plugin(sglang="0.5.23", entry_point=True, listed=True)
"""The child's answer in the test bed, without the seconds that asking takes (``test_doctor_setup`` asks it)."""


def facts_of(path: Path, answers: Mapping[str, tuple[int, str]] | None = None) -> Facts:
    """Gathered as the command does; with ``answers`` of a server that answers so."""
    if answers is None:
        return gather([path], None, FITS, time.time())
    with serving(answers) as url:
        return gather([path], ask_server(url), FITS, time.time())


def doctor(path: Path, answers: Mapping[str, tuple[int, str]] | None = None) -> dict[str, Finding]:
    """Findings by name, in their order."""
    return {finding.what: finding for finding in diagnose(facts_of(path, answers))}


def causes(found: Mapping[str, Finding]) -> list[str]:
    """Names of those that set the exit code."""
    return [what for what, finding in found.items() if finding.severity == "cause"]


def plain(path: Path, **extra: object) -> FlexKVStorage:
    """A store with a KV pool, as SGLang attaches it; its size is 16 MB unless ``extra`` says otherwise."""
    return attach(config(path, **extra), Pool(seed=1), {})


def names(count: int, seed: int = 0) -> list[str]:
    """Page hashes."""
    return [key.hex() for key in keys(count, seed)]


def write(storage: FlexKVStorage, count: int, seed: int = 0) -> None:
    """Store pages."""
    indices = pool_of(storage, "kv").indices(*range(count))
    assert storage.batch_set_v1(names(count, seed), indices) == [True] * count


def read(storage: FlexKVStorage, count: int, seed: int = 0) -> list[bool]:
    """Fetch pages."""
    indices = pool_of(storage, "kv").indices(*range(count))
    return list(storage.batch_get_v1(names(count, seed), indices))


def told(path: Path, **counters: int) -> bool:
    """Wait until a stats file says so (they are written by the upkeep thread)."""

    def there() -> bool:
        found = [json.loads(file.read_text()) for file in path.rglob("*.stats.json")]
        return any(
            all(item["counters"].get(name, 0) == value for name, value in counters.items())
            for item in found
        )

    return wait_until(there)
