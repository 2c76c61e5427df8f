"""Every field of an identity changes its digest; the digest of a given identity is fixed (it names directories)."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from flexkv_sglang.identity.keys import Identity, page_key, page_keys

IDENTITY = Identity(
    model="0123abcd",
    settings={"dtype": "auto"},
    pool="kv",
    pool_class="MHATokenToKVPoolHost",
    dtype="torch.bfloat16",
    layout="page_first",
    page_size=16,
    buffer_bytes=(4096, 4096),
    geometry={"head_num": 2},
    first_layer=0,
    layer_count=4,
    tp=(0, 1),
    pp=(0, 1),
    attn_cp=(0, 1),
    dcp=(0, 1),
    split_heads=0,
    storage_format_tag="",
)
OTHER = {
    "model": "0123abce",
    "settings": {"dtype": "auto", "quantization": "fp8"},
    "pool": "mamba",
    "pool_class": "MLATokenToKVPoolHost",
    "dtype": "torch.float16",
    "layout": "layer_first",
    "page_size": 32,
    "buffer_bytes": (8192,),
    "geometry": {"head_num": 4},
    "first_layer": 4,
    "layer_count": 8,
    "tp": (1, 2),
    "pp": (1, 2),
    "attn_cp": (1, 2),
    "dcp": (1, 2),
    "split_heads": 4,
    "storage_format_tag": "nope",
    "epoch": "00ff",
    "format": 2,
}


def test_the_digest_of_a_known_identity() -> None:
    assert IDENTITY.namespace == "uujg4jv3lwg75xaystqz2ngoui"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Identity)])
def test_every_field_is_part_of_the_namespace(field: str) -> None:
    changed = dataclasses.replace(IDENTITY, **{field: OTHER[field]})
    assert changed.namespace != IDENTITY.namespace


def test_values_cannot_slide_from_one_field_into_the_next() -> None:
    left = dataclasses.replace(IDENTITY, dtype="ab", layout="c")
    right = dataclasses.replace(IDENTITY, dtype="a", layout="bc")
    assert left.namespace != right.namespace


def test_a_namespace_is_a_safe_file_name() -> None:
    assert len(IDENTITY.namespace) == 26
    assert IDENTITY.namespace.isalnum()
    assert IDENTITY.namespace.islower()


def test_hash_keys_are_taken_as_they_are_and_other_text_is_hashed() -> None:
    digest = hashlib.sha256(b"page").hexdigest()
    assert page_key(digest) == bytes.fromhex(digest)
    odd = ["", "a", "g" * 64, digest + "_k", digest.replace(digest[0], " ", 1)]
    got = page_keys(odd)
    assert {len(key) for key in got} == {32}
    assert len({*got, page_key(digest)}) == len(odd) + 1
