"""Texts that reach a terminal, a log or ``--json``: no control characters, no secrets."""

from __future__ import annotations

import pytest

from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.printable import printable, without_secrets

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ümlaut 漢字", "plain, ümlaut 漢字"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("a\u202eb\u2066c\u200bd\u2028e\ufeff", "a\\u202eb\\u2066c\\u200bd\\u2028e\\ufeff"),
        ("\udc80", "\\udc80"),
        ("redis://fk:hunter2@r:6379/0 is down", "redis://fk:***@r:6379/0 is down"),
        ("http://h/?a=1&password=hunter2&b=2", "http://h/?a=1&password=***&b=2"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_secrets_are_hidden_by_the_names_of_their_keys_and_inside_urls() -> None:
    given = {
        "redis_password": SECRET,
        "auth": [{"api_key": SECRET, "secret": SECRET, "secret_file": "/etc/key"}],
        "url": "redis://fk:hun ter2'x@h:1/0",
        "page_tokens": "16",
        "extra_config": '{"redis_password": "hunter2"}',
        "count": 3,
    }
    assert without_secrets(given) == {
        "redis_password": "***",
        "auth": [{"api_key": "***", "secret": "***", "secret_file": "/etc/key"}],
        "url": "redis://fk:***@h:1/0",
        "page_tokens": "16",
        "extra_config": '{"redis_password": "***"}',
        "count": 3,
    }


@pytest.mark.parametrize(
    "given",
    [
        {"redis_password": SECRET},
        {"share": {"redis_passwd": SECRET}},
        {"share": {"redis_ur": f"redis://fk:{SECRET} x@h"}},
        {"share": {"peers": [f"redis://fk:{SECRET}@h:1"]}},
        {"share": {"peers": f"tcp://fk:{SECRET}@h:1"}},
        {"share": f"redis://fk:{SECRET}@h:1"},
        {"share": {"redis_url": f"http://fk:{SECRET}@h:1"}},
        {"share": {"cluster_id": f"redis://fk:{SECRET}@h:1"}},
        {"size": f"redis://fk:{SECRET}@h:1"},
        {"tiers": [{"redis_url": f"redis://fk:{SECRET}@h:1"}]},
        {"verify": f"redis://fk:{SECRET}@h:1"},
        {"path": [f"redis://fk:{SECRET}@h:1"] * 2},
        {"redis_url": [f"redis://fk:{SECRET}@h:1"]},
        {"\x1b[2J": 1},
    ],
)
def test_no_error_of_a_setting_shows_a_secret_or_a_control_character(
    given: dict[str, object],
) -> None:
    with pytest.raises(ConfigError) as caught:
        FlexKVConfig.parse(given)
    assert SECRET not in str(caught.value)
    assert str(caught.value).isprintable()
