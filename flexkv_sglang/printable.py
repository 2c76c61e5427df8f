"""Texts that came from files, sockets and settings, as a terminal, a log and ``--json`` may show them. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e0fff]"
)
"""C0, DEL, C1, marks of direction, invisible letters, separators of lines, halves of surrogate pairs, tags."""

_URL_LOGIN = re.compile(r"(://[^:@\s'\"]*:)[^\s'\"]*@")
_URL_ARGUMENT = re.compile(
    r"([?&][^=&\s'\"]*(?:passw|secret|token|api_?key)[^=&\s'\"]*=)[^&\s'\"]+", re.IGNORECASE
)
_WHOLE_URL = re.compile(r"^\s*[A-Za-z][\w+.-]*://")
_SECRET_NAME = re.compile(r"passw|secret|token|credential|api_?key|admin_?key", re.IGNORECASE)
_NOT_SECRET = re.compile(
    r"_file$|_tokens?$|^tokens?_|tokens|tokenizer|token_per|_id$", re.IGNORECASE
)
_DEPTH_MAX = 64


def printable(text: str) -> str:
    """One line that moves no cursor and changes no colour: control characters as ``\\x1b``, passwords as ``***``."""
    return _UNPRINTABLE.sub(_escaped, without_passwords(text))


def without_passwords(text: str) -> str:
    """``text`` without the passwords of the URLs in it."""
    return _URL_ARGUMENT.sub(r"\1***", _URL_LOGIN.sub(r"\1***@", text))


def redacted(url: str) -> str:
    """Remove the password from one URL, also from an invalid one (``urlsplit`` fails for ``#`` or ``/`` in it)."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        scheme, rest = "", url
    login, at, where = rest.rpartition("@")
    user, colon, _ = login.partition(":")
    kept = f"{scheme}{mark}{user}:***@{where}" if at and colon else url
    return _URL_ARGUMENT.sub(r"\1***", kept)


def without_secrets(value: Any, name: str = "") -> Any:
    """A copy of a JSON value without secrets: by the name of their key, or as passwords of URLs.

    ``name``: the key of ``value``. Names of files that hold a secret are no secret.
    """
    return _without_secrets(value, name, 0)


def _without_secrets(value: Any, name: str, depth: int) -> Any:
    if depth > _DEPTH_MAX:
        return "..."
    if isinstance(value, Mapping):
        return {key: _without_secrets(item, str(key), depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_without_secrets(item, name, depth + 1) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, str) and value:
        if _SECRET_NAME.search(name) and not _NOT_SECRET.search(name):
            return "***"
        if value.lstrip().startswith(("{", "[")):
            return _without_secrets_in_json(value, depth)
        return redacted(value) if _WHOLE_URL.match(value) else without_passwords(value)
    return value


def _without_secrets_in_json(text: str, depth: int) -> str:
    try:
        return json.dumps(_without_secrets(json.loads(text), "", depth + 1))
    except (ValueError, RecursionError):
        return without_passwords(text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
