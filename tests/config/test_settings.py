"""Settings: valid ones are parsed; an error names the key, the value and the valid values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_sglang.config.parsers import parse_size
from flexkv_sglang.config.settings import SGLANG_KEYS, FlexKVConfig
from flexkv_sglang.errors import ConfigError


def test_nothing_given_is_a_working_configuration() -> None:
    for nothing in (None, {}):
        config = FlexKVConfig.parse(nothing)
        assert config == FlexKVConfig()
        assert config.verify == "full"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (4096, 4096),
        ("8192", 8192),
        ("200GB", 200 * 10**9),
        ("1.5tb", 1500 * 10**9),
        (" 512 MiB ", 512 << 20),
        ("2TiB", 2 << 40),
        ("1B", 1),
    ],
)
def test_sizes(text: object, expected: int) -> None:
    assert parse_size("size", text) == expected


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        True,
        1.5,
        None,
        [],
        "",
        "GB",
        "1.2.3GB",
        "-1GB",
        "10 G B",
        "1e9",
        "nan",
        "9" * 30,
        "0.1B",
    ],
)
def test_impossible_sizes(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        FlexKVConfig.parse({"size": value})
    assert str(error.value).startswith("size: ")
    assert repr(value) in str(error.value)
    assert "Valid:" in str(error.value)


def test_one_directory_or_several() -> None:
    assert FlexKVConfig.parse({"path": "/a"}).tiers[0].path == ("/a",)
    assert FlexKVConfig.parse({"path": ["/a", "/b"]}).tiers[0].path == ("/a", "/b")


@pytest.mark.parametrize(
    ("given_", "named"),
    [
        ({"path": []}, "path: []"),
        ({"path": ""}, "path: ''"),
        ({"path": 7}, "path: 7"),
        ({"path": ["/a", 7]}, "path: ['/a', 7]"),
        ({"path": ["/a", "/a"]}, "names a directory twice"),
        ({"verify": "yes"}, "verify: 'yes'. Valid: full, sampled, off"),
        ({"verify": True}, "verify: True"),
        ({"io_engine": "libaio"}, "io_engine: 'libaio'. Valid: auto, io_uring, threads, buffered"),
        ({"model_id": " "}, "model_id: ' '"),
        ({"sise": 1}, "sise: unknown key, value 1. Did you mean 'size'?"),
        ({"redis": "x"}, "Valid keys: path, size"),
        ({"pool_density": 0.5}, "pool_density: 0.5. Valid: pool names"),
        ({"pool_density": {"mamba": 0}}, "pool_density.mamba: 0. Valid: pool names"),
        ({"pool_density": {"mamba": 1.5}}, "pool_density.mamba: 1.5"),
        ({"pool_density": {"mamba": True}}, "pool_density.mamba: True"),
        ({"pool_density": {"kv": 0.5}}, "pool_density.kv: 0.5"),
        ({"pool_density": {"swa": "half"}}, "pool_density.swa: 'half'"),
    ],
)
def test_an_error_names_key_value_and_valid_values(given_: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        FlexKVConfig.parse(given_)
    assert named in str(error.value)


def test_densities_of_pools() -> None:
    config = FlexKVConfig.parse({"pool_density": {"mamba": 0.05, "a pool of tomorrow": 1}})
    assert config.pool_density == (("mamba", 0.05), ("a pool of tomorrow", 1.0))
    assert "{'mamba': 0.05" in config.describe()


def test_keys_of_sglang_are_ignored() -> None:
    assert FlexKVConfig.parse(dict.fromkeys(SGLANG_KEYS, object())) == FlexKVConfig()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["path", "size", "verify", "io_engine", "model_id", "pool_density", "other"]
        ),
        json_values,
    )
)
def test_any_json_gives_a_configuration_or_a_config_error(extra: dict[str, Any]) -> None:
    try:
        config = FlexKVConfig.parse(extra)
    except ConfigError:
        return
    assert config.describe()


def test_min_free_may_be_0_and_its_message_says_so() -> None:
    assert FlexKVConfig.parse({"min_free": 0}).min_free == 0
    with pytest.raises(ConfigError, match=r"^min_free: -1 is out of range\. .* at least 0 bytes$"):
        FlexKVConfig.parse({"min_free": -1})
