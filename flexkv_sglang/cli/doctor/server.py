"""Asks a running SGLang over HTTP: flags, the attached storage backend, metrics. Only reads."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError

_TIMEOUT_S = 10.0
_BYTES_MAX = 16 << 20
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_FLAGS = (
    *("version", "page_size", "enable_hierarchical_cache", "enable_metrics"),
    *("hicache_storage_backend", "hicache_storage_backend_extra_config"),
    *("hicache_storage_prefetch_policy", "hicache_write_policy"),
    *("enable_unified_cache_external_linker", "unified_cache_external_linker_backend"),
    "unified_cache_external_linker_config",
)
_NOT_FOUND = 404
_BAD_ANSWER = (OSError, ValueError, RecursionError, http.client.HTTPException)
_STATUS = "/hicache/storage-backend"
THRESHOLD = 256
"""SGLang's ``prefetch_threshold``, in tokens, when none is configured."""


@dataclass(frozen=True, slots=True)
class SeriesValue:
    """One line of ``/metrics``."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Server:
    """``flags``: part of ``/server_info``; ``status``: the backend that is attached now, None if SGLang refuses the
    answer (it asks for its admin key). ``error``: the reason why there are no flags. ``metrics``: empty if off."""

    url: str
    error: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    status: Mapping[str, Any] | None = None
    metrics: tuple[SeriesValue, ...] = ()

    def setting(self, name: str) -> Any:
        """Its present value, else its value at the start; None if unknown or not set."""
        now = self.status or {}
        return now[name] if name in now else self.flags.get(name)

    def total(self, name: str, **labels: str) -> float:
        """Sum over all samples with this name and these labels."""
        return sum(
            sample.value
            for sample in self.metrics
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    @property
    def holds_slots(self) -> bool | None:
        """True if its own series show that a store of ours is attached; None without metrics."""
        return self.total("sglang:flexkv_slots_total") > 0 if self.metrics else None

    @property
    def linked(self) -> dict[str, Any] | None:
        """Settings of our linker, if the server runs with it."""
        given = self.flags.get("unified_cache_external_linker_config")
        given = given if isinstance(given, dict) else {}
        name = self.flags.get("unified_cache_external_linker_backend")
        if not self.flags.get("enable_unified_cache_external_linker"):
            return None
        if name == "dynamic" and given.get("linker") == "FlexKVLinker":
            inner = given.get("linker_extra_config")
            return dict(inner) if isinstance(inner, dict) else {}
        return dict(given) if name == "flexkv" else None

    @property
    def extra(self) -> dict[str, Any]:
        """The extra config as JSON; {} if there is none, or its file is not on this machine."""
        if self.linked is not None:
            return self.linked
        text = self.setting("hicache_storage_backend_extra_config")
        try:
            if isinstance(text, str) and text.startswith("@"):
                text = Path(text[1:]).read_text()
            given = json.loads(text) if isinstance(text, str) else text
        except _BAD_ANSWER:
            return {}
        return dict(given) if isinstance(given, dict) else {}

    @property
    def config(self) -> FlexKVConfig | None:
        """Our settings in it; None if the backend is not ours or they cannot be read."""
        if self.error or not is_ours(self):
            return None
        try:
            return FlexKVConfig.parse(self.extra)
        except ConfigError:
            return None

    @property
    def threshold(self) -> int:
        """Tokens missing in host memory from which SGLang asks storage; a linker is asked for every page."""
        given = self.extra.get("prefetch_threshold", THRESHOLD)
        page = self.flags.get("page_size")
        least = page if isinstance(page, int) else 1
        if self.linked is not None:
            return least
        return max(given if isinstance(given, int) else THRESHOLD, least)


def is_ours(server: Server) -> bool:
    """True if flexkv is the configured or attached backend, or the linker."""
    if server.linked is not None:
        return True
    name = server.setting("hicache_storage_backend")
    return name == "flexkv" or (
        name == "dynamic" and server.extra.get("class_name") == "FlexKVStorage"
    )


def ask_server(url: str) -> Server:
    """Never raises: ``error`` has the reason when it does not answer. At most five requests, each with a timeout."""
    base = url.rstrip("/")
    info: Any = None
    error = ""
    for path in ("/server_info", "/get_server_info"):  # the second: releases before the first
        try:
            info = json.loads(_get(base + path))
            break
        except urllib.error.HTTPError as exc:
            error = f"{path}: HTTP {exc.code} {exc.reason}"
            if exc.code != _NOT_FOUND:
                break
        except _BAD_ANSWER as exc:
            return Server(url, f"{path}: {exc}")
    if not isinstance(info, dict):
        return Server(url, error or "/server_info is no JSON object")
    flags = {name: info[name] for name in _FLAGS if name in info}
    return Server(url, "", flags, _status(base), _metrics(base))


def parse_metrics(text: str) -> tuple[SeriesValue, ...]:
    """Samples of the Prometheus text format; comments and lines of another form are left out."""
    found = []
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        try:
            found.append(
                SeriesValue(match[1], dict(_LABEL.findall(match[2] or "")), float(match[3]))
            )
        except ValueError:
            continue
    return tuple(found)


def _status(base: str) -> Mapping[str, Any] | None:
    try:
        status = json.loads(_get(base + _STATUS))
    except _BAD_ANSWER:
        return None
    whole = isinstance(status, dict) and "hicache_storage_backend" in status
    return status if whole else None


def _metrics(base: str) -> tuple[SeriesValue, ...]:
    try:
        return parse_metrics(_get(base + "/metrics"))
    except _BAD_ANSWER:
        return ()


def _get(url: str) -> str:
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # no proxies of the environment
    with opener.open(url, timeout=_TIMEOUT_S) as answer:
        return str(answer.read(_BYTES_MAX).decode(errors="replace"))
