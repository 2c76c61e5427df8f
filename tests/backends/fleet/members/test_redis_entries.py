"""Bytes in Redis are those of docs/DATA_FILE.md; other bytes do no harm."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_sglang.backends.fleet.members.redis_entries import (
    decode_change,
    decode_info,
    encode_change,
    encode_info,
    member_keys,
    stream_key,
)
from flexkv_sglang.backends.fleet.vocabulary import Change, NodeId, NodeInfo, Op
from nodes.fleet_bed import NS, OTHER_NS, fingerprints

INFO = NodeInfo(NodeId("host-1a"), 0xAB, "10.0.0.1:7000", "rack", (OTHER_NS, NS), ("zmq",), "0.1")
ENTRY = (
    b'{"addr":["10.0.0.1:7000"],"engines":["zmq"],"epoch":"00000000000000ab",'
    b'"ns":["aaaqeayeaudaocajbifqydiob4","aebagbafaydqqcikbmga2dqpca"],"pod":"rack","proto":2,"ver":"0.1"}'
)
CHANGES = [
    (Change(0xAB, 7, Op.ADD, fingerprints(1, 256)), b"A", bytes([1, *bytes(7), 0, 1, *bytes(6)])),
    (Change(0xAB, 7, Op.DROP, fingerprints(2)), b"D", bytes([2, *bytes(7)])),
    (Change(0xAB, 7, Op.CLEAR, fingerprints()), b"C", b""),
    (Change(0xAB, 7, Op.HEARTBEAT, fingerprints()), b"K", b""),
]


def test_names_of_keys() -> None:
    assert member_keys("c") == ("fk1:{c}:live", "fk1:{c}:nodes", "fk1:{c}:ver")
    assert stream_key("c", NS, INFO.node_id) == b"fk1:{c}:aaaqeayeaudaocajbifqydiob4:log:host-1a"


def test_a_nodes_entry() -> None:
    assert encode_info(INFO) == ENTRY
    found = decode_info(b"host-1a", ENTRY)
    assert found is not None
    assert encode_info(found) == ENTRY
    assert (found.node_id, found.epoch, found.address) == (INFO.node_id, INFO.epoch, INFO.address)


@pytest.mark.parametrize(("change", "letter", "keys"), CHANGES)
def test_a_changes_entry(change: Change, letter: bytes, keys: bytes) -> None:
    fields = {b"e": b"00000000000000ab", b"q": b"7", b"o": letter, b"k": keys}
    assert encode_change(change) == fields
    found = decode_change(fields)
    assert found is not None
    assert (found.epoch, found.first, found.op) == (change.epoch, change.first, change.op)
    assert found.fingerprints.tolist() == change.fingerprints.tolist()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=6,
)


@given(st.sampled_from(sorted(json.loads(ENTRY))), JSON, st.binary(max_size=8))
def test_an_entry_with_one_wrong_field_never_raises(
    name: str, value: object, node_id: bytes
) -> None:
    entry = json.loads(ENTRY)
    entry[name] = value
    info = decode_info(b"n", json.dumps(entry).encode())
    assert info is None or info.protocol == 2
    decode_info(node_id, ENTRY)
    del entry[name]
    assert decode_info(b"n", json.dumps(entry).encode()) is None


@given(st.binary(max_size=200))
def test_rubbish_is_no_entry(rubbish: bytes) -> None:
    assert decode_info(b"n", rubbish) is None


@given(
    st.dictionaries(st.sampled_from([b"e", b"q", b"o", b"k"]), st.binary(max_size=24), max_size=4)
)
def test_rubbish_is_no_change(fields: dict[bytes, bytes]) -> None:
    good = {b"e": b"00000000000000ab", b"q": b"7", b"o": b"A", b"k": bytes(8)}
    found = decode_change({**good, **fields})
    assert found is None or found.first > 0
    assert decode_change(None) is None
