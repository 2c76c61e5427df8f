"""Vocabulary: namespaces and fingerprints on the wire, numbers of a change."""

from __future__ import annotations

import os

import numpy as np
import pytest

from flexkv_sglang.backends.fleet.vocabulary import (
    Change,
    Op,
    fingerprints_of,
    namespace_bytes,
    namespace_name,
)
from flexkv_sglang.types import PageKey


def test_a_namespace_survives_the_wire() -> None:
    for _ in range(50):
        digest = os.urandom(16)
        assert namespace_bytes(namespace_name(digest)) == digest


@pytest.mark.parametrize(
    "name", ["", "abc", "a" * 25, "a" * 27, "A" * 26, "!" * 26, "a" * 25 + "b"]
)
def test_other_text_than_a_namespace_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"namespace|base32|padding|digit"):
        namespace_bytes(name)


def test_fingerprints_are_the_first_eight_bytes() -> None:
    keys = [PageKey(bytes([1, 0, 0, 0, 0, 0, 0, 2]) + os.urandom(24)), PageKey(bytes(32))]
    assert fingerprints_of(keys).tolist() == [1 + (2 << 56), 0]
    assert fingerprints_of([]).dtype == np.uint64


def test_numbers_of_changes() -> None:
    three = np.arange(3, dtype=np.uint64)
    none = three[:0]
    assert [
        Change(1, 5, op, fingerprints).numbers
        for op, fingerprints in [
            (Op.ADD, three),
            (Op.DROP, three),
            (Op.CLEAR, none),
            (Op.HEARTBEAT, none),
        ]
    ] == [3, 3, 1, 0]
