"""Faults in a linker's stores: its I/O engines behind ``FaultyIo``."""

from __future__ import annotations

import random

from flexkv_sglang.linker.linker import FlexKVLinker
from stores.faulty_io import CallGate, Fault, Faults, FaultyIo


def faults_of(linker: FlexKVLinker, direction: str, pool: str = "kv") -> Faults:
    """Faults of all calls of one direction ("read", "write") from now on."""
    faults = Faults(random.Random(0))
    opened = linker._stores.get(pool)
    assert opened is not None
    assert opened.store is not None
    for tier in opened.store.tiers:
        side = tier._mover._directions[direction]
        for mode in {mode.engine for modes in linker._stores.prepared for mode in modes.values()}:
            side._engines[mode] = FaultyIo(side.engine(mode), faults)
    return faults


def hold(linker: FlexKVLinker, direction: str, pool: str = "kv") -> CallGate:
    """The next call of one direction waits until ``go_on`` is set."""
    gate = CallGate(direction, seconds=30.0)
    faults_of(linker, direction, pool).gate = gate
    return gate


__all__ = ["Fault", "faults_of", "hold"]
