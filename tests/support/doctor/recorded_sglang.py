"""A small HTTP server that answers what a real SGLang 0.5.23 answered (``tests/cli/recorded``), with other values.

Recorded from a server of the CPU test bed with ``--admin-api-key`` and ``--enable-metrics``; of ``/server_info``
the fields that have to do with the cache, of ``/metrics`` some series, all unchanged but for the folder's name.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parents[2] / "cli" / "recorded"


def recorded(name: str) -> str:
    """One answer as it was."""
    return (RECORDED / name).read_text()


def answers(
    storage: Path,
    flags: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    *,
    key: bool = False,
    detached: bool = False,
    scraped: bool = True,
) -> dict[str, tuple[int, str]]:
    """Path -> (status, body). ``extra``: keys added to the extra config. ``metrics``: start of a line -> its value.

    ``key``: we are let in to the backend's status; else 401, as without the admin key. ``detached``: over HTTP.
    ``scraped``: started with --enable-metrics.
    """
    info = json.loads(recorded("server_info.json"))
    settings = json.loads(info["hicache_storage_backend_extra_config"])
    settings = json.dumps(settings | {"path": str(storage)} | dict(extra or {}))
    info |= {"hicache_storage_backend_extra_config": settings} | dict(flags or {})
    status = json.loads(recorded("storage_backend.json"))
    status = {name: info[name] for name in status}
    if detached:
        status = json.loads(recorded("storage_backend_detached.json"))
    text = recorded("metrics.txt")
    for start, value in (metrics or {}).items():
        text, count = re.subn(
            rf"^({re.escape(start)}.*) \S+$", rf"\1 {value}", text, flags=re.MULTILINE
        )
        assert count == 1, (start, count)
    denied = (401, recorded("storage_backend_without_key.json"))
    return {
        "/server_info": (200, json.dumps(info)),
        "/hicache/storage-backend": (200, json.dumps(status)) if key else denied,
        "/metrics": (200, text) if scraped else (404, '{"detail":"Not Found"}'),
    }


@contextmanager
def serving(given: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """Answers GET on loopback until the end of the block; the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = given.get(self.path, (404, '{"detail":"Not Found"}'))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
