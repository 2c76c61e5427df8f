"""Real SGLang servers as subprocesses on the CPU, for tests and the demo.

A ``Replica`` is a whole server: launcher, scheduler, detokenizer. It listens on loopback only, writes its log
to a file, runs outside the repository (a folder named ``triton_kernels`` there would mislead SGLang) and
never outlives its owner: leaving the context kills every process it ever started. All waits are bounded.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import psutil

from flexkv_bed.answers import Answer as Answer
from flexkv_bed.answers import reusable_tokens as reusable_tokens
from flexkv_bed.netns import inside
from flexkv_bed.storage import memory_of

_T = TypeVar("_T")

Layout = Literal["layer_first", "page_first", "page_first_direct", "page_head"]
Json = dict[str, Any]

IO_BACKEND: Mapping[Layout, str] = {
    "layer_first": "direct",
    "page_first": "kernel",
    "page_first_direct": "direct",
    "page_head": "kernel",
}
DYNAMIC_FLEXKV: Mapping[str, object] = {
    "backend_name": "flexkv",
    "module_path": "flexkv_sglang",
    "class_name": "FlexKVStorage",
    "interface_v1": 1,
}
"""Keys of the extra config with which ``--hicache-storage-backend dynamic`` loads flexkv."""

DYNAMIC_LINKER: Mapping[str, object] = {
    "linker": "FlexKVLinker",
    "linker_module_path": "flexkv_sglang.linker",
}
"""Keys of the config with which ``--unified-cache-external-linker-backend dynamic`` loads our linker."""

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 120.0
_POLL_S = 0.25
_DIE_WITH_OWNER = ("setpriv", "--pdeathsig", "KILL")
"""The servers end with their owner, also after SIGKILL (SGLang's children follow their parent)."""
_SGLANG_CPU = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


class ServerFailedError(RuntimeError):
    """A server died, did not come up or did not answer; the message ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a replica is started. ``extra`` None means the usual one for flexkv: threshold, path and a small size.

    ``linker``: without a host cache, the device pools linked straight to the storage.
    """

    model: Path
    storage: Path
    log: Path
    backend: str = "flexkv"
    extra: Mapping[str, object] | None = None
    page_size: int = 16
    layout: Layout = "page_first"
    io_backend: str | None = None
    prefetch_policy: str = "wait_complete"
    through_serve: bool = False
    linker: bool = False
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    netns: str | None = None  # network namespace it runs in

    def on_host(self, act: Callable[[], _T]) -> _T:
        """Call ``act`` where the server's loopback is."""
        return act() if self.netns is None else inside(self.netns, act)

    def extra_config(self) -> Json:
        """The JSON of ``--hicache-storage-backend-extra-config``."""
        if self.extra is not None:
            return {"prefetch_threshold": self.page_size, **self.extra}
        return flexkv_extra(self.storage, self.page_size)

    def command(self, port: int) -> list[str]:
        """The server's command line; ``sglang serve`` or the module, which are two ways in."""
        entry = [sys.executable, "-P", "-m", "sglang.launch_server"]
        if self.through_serve:
            entry = [str(Path(sys.executable).with_name("sglang")), "serve"]
        host = [] if self.netns is None else ["ip", "netns", "exec", self.netns]
        entry = [*_DIE_WITH_OWNER, *host, *entry]
        flags = {
            "model-path": self.model,
            "device": "cpu",
            "host": "127.0.0.1",
            "port": port,
            "mem-fraction-static": 0.1,
            "max-total-tokens": 4096,
            "page-size": self.page_size,
            **(self._linker_flags() if self.linker else self._hicache_flags()),
        }
        switches = [
            "--enable-unified-cache-external-linker"
            if self.linker
            else "--enable-hierarchical-cache",
            "--enable-cache-report",
            "--sleep-on-idle",
            *self.arguments,
        ]
        return [*entry, *(part for k, v in flags.items() for part in (f"--{k}", str(v))), *switches]

    def _hicache_flags(self) -> Json:
        return {
            "hicache-size": 1,
            "hicache-write-policy": "write_through",
            "hicache-storage-prefetch-policy": self.prefetch_policy,
            "hicache-mem-layout": self.layout,
            "hicache-io-backend": self.io_backend or IO_BACKEND[self.layout],
            "hicache-storage-backend": self.backend,
            "hicache-storage-backend-extra-config": json.dumps(self.extra_config()),
        }

    def _linker_flags(self) -> Json:
        config = self.extra_config()
        if self.backend == "dynamic":
            config = {**DYNAMIC_LINKER, "linker_extra_config": config}
        return {
            "unified-cache-external-linker-backend": self.backend,
            "unified-cache-external-linker-config": json.dumps(config),
        }


VARIANTS: dict[str, Json] = {"plain": {}, "memory": {}, "threads": {"io_engine": "threads"}}
"""Ways to run every test: one disk; a memory tier above it; the disk without io_uring."""

variant = "plain"
"""The one in use; set by ``pytest --e2e-variant``."""


def flexkv_extra(storage: Path, page_size: int = 16) -> Json:
    """The usual extra config. The size keeps a test from reserving a quarter of the disk."""
    extra = {"prefetch_threshold": page_size, **VARIANTS[variant]}
    disk = {"path": str(storage), "size": "256MiB"}
    if variant == "memory":
        return {**extra, "tiers": [{"path": str(memory_of(storage)), "size": "64MiB"}, disk]}
    return {**extra, **disk}


def free_port() -> int:
    """A loopback port that was free a moment ago. 0.5.14 derives another from it, 10000 higher."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55000:
            return port


class Replica:
    """One server. States: new -> started -> ready -> stopped; ``start`` may be called again after that.

    ``terminate`` is the orderly end (SIGTERM, drains, closes the storage), ``kill`` the crash (SIGKILL of
    every process at once). Used by one thread.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._family: set[psutil.Process] = set()

    def __enter__(self) -> Replica:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Launch the processes; returns at once. The log of an earlier run is kept, the new one follows."""
        assert self._process is None, "this replica runs already"
        self.port = self.settings.on_host(free_port)
        self.settings.log.parent.mkdir(parents=True, exist_ok=True)
        with self.settings.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.settings.command(self.port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.settings.log.parent,
                env={**os.environ, **_SGLANG_CPU, **self.settings.environment},
                start_new_session=True,
            )
        self._family = {psutil.Process(self._process.pid)}

    def wait_ready(
        self, timeout_s: float = START_TIMEOUT_S, waiting: Callable[[float], None] | None = None
    ) -> float:
        """Wait until /health answers 200 (warm-up done). Returns the seconds. ``waiting`` is called meanwhile."""
        begin = time.monotonic()
        while (waited := time.monotonic() - begin) < timeout_s:
            self._check_alive()
            if self._healthy():
                self._note_family()
                return waited
            if waiting is not None:
                waiting(waited)
            time.sleep(_POLL_S)
        raise self._failure(f"not ready after {timeout_s:.0f} s")

    def generate(self, input_ids: Sequence[int], max_new_tokens: int = 8) -> Answer:
        """Greedy completion of a prompt given as token ids."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        reply = json.loads(
            self._request(
                "POST", "/generate", {"input_ids": list(input_ids), "sampling_params": sampling}
            )
        )
        meta = reply["meta_info"]
        cached = meta.get("cached_tokens_details") or {}
        return Answer(
            output_ids=tuple(reply.get("output_ids") or ()),
            text=reply["text"],
            prompt_tokens=meta["prompt_tokens"],
            device=cached.get("device", 0),
            host=cached.get("host", 0),
            storage=cached.get("storage", 0),
        )

    def flush_cache(self) -> None:
        """Empty the device and host tiers; storage stays. Waits for running requests to end."""
        self._request("POST", "/flush_cache?timeout=30")

    def clear_storage(self) -> None:
        """Ask the storage backend to clear all pages."""
        self._request("POST", "/hicache/storage-backend/clear")

    def attach(self, name: str, extra: Mapping[str, object]) -> str:
        """Attach a storage backend at run time. Needs ``--admin-api-key`` among the arguments."""
        body = {
            "hicache_storage_backend": name,
            "hicache_storage_backend_extra_config_json": json.dumps(dict(extra)),
            "hicache_storage_prefetch_policy": self.settings.prefetch_policy,
        }
        return self._request("PUT", "/hicache/storage-backend", body)

    def set_policies(self, *, write: str | None = None, prefetch: str | None = None) -> str:
        """Change policies of the attached backend. Needs ``--admin-api-key`` among the arguments."""
        body = {
            "hicache_storage_backend": self.settings.backend,
            "hicache_write_policy": write,
            "hicache_storage_prefetch_policy": prefetch,
        }
        return self._request("PUT", "/hicache/storage-backend", body)

    def detach(self) -> str:
        """Detach the storage backend at run time. Needs ``--admin-api-key`` among the arguments."""
        return self._request("DELETE", "/hicache/storage-backend")

    def update_weights(self, model: Path, *, flush: bool = True) -> str:
        """Load other weights from disk into the running server. Needs ``--admin-api-key`` among the arguments."""
        body = {"model_path": str(model), "flush_cache": flush}
        return self._request("POST", "/update_weights_from_disk", body)

    def metric(self, name: str) -> float:
        """Sum of one series at /metrics over all its labels. Needs ``--enable-metrics`` among the arguments."""
        lines = self._request("GET", "/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    def terminate(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM and wait; a process that is left afterwards is an error, and is killed."""
        assert self._process is not None, "this replica is not running"
        self._note_family()
        self._process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(self._family, timeout=timeout_s)
        names = [process.pid for process in alive]
        self.kill()
        if names:
            raise self._failure(
                f"{len(names)} processes survived SIGTERM for {timeout_s:.0f} s: {names}"
            )

    def kill(self) -> None:
        """SIGKILL of all processes at once, as a power cut would; harmless when nothing runs."""
        if self._process is None:
            return
        self._note_family()
        for process in self._family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs(self._family, timeout=STOP_TIMEOUT_S)
        self._process.wait(timeout=STOP_TIMEOUT_S)
        assert not alive, f"processes survived SIGKILL: {alive}"
        self._process = None
        self._family = set()

    def log_text(self) -> str:
        """Everything this replica's servers have logged."""
        return self.settings.log.read_text(errors="replace") if self.settings.log.exists() else ""

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def _note_family(self) -> None:
        """Remember descendants while their parents live: orphans could not be found any more."""
        for parent in list(self._family):
            try:
                self._family.update(parent.children(recursive=True))
            except psutil.NoSuchProcess:
                continue

    def _check_alive(self) -> None:
        self._note_family()
        status = None if self._process is None else self._process.poll()
        if self._process is None or status is not None:
            raise self._failure(f"the server ended with status {status}")

    def _healthy(self) -> bool:
        try:
            self._ask("GET", "/health", None, 2.0)
        except OSError:  # refused, reset, timed out, 503 while warming up
            return False
        return True

    def _request(self, method: str, path: str, body: Json | None = None) -> str:
        try:
            return self._ask(method, path, body, REQUEST_TIMEOUT_S)
        except urllib.error.HTTPError as exc:
            with exc:
                reason = exc.read().decode(errors="replace").strip()
            raise self._failure(f"{method} {path}: HTTP {exc.code}: {reason}") from None
        except OSError as exc:
            raise self._failure(f"{method} {path}: {exc}") from exc

    def _ask(self, method: str, path: str, body: Json | None, timeout_s: float) -> str:
        return self.settings.on_host(lambda: self._open(method, path, body, timeout_s))

    def _open(self, method: str, path: str, body: Json | None, timeout_s: float) -> str:
        headers = {"Content-Type": "application/json"}
        if "--admin-api-key" in self.settings.arguments:
            key = self.settings.arguments[self.settings.arguments.index("--admin-api-key") + 1]
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers=headers,
            method=method,
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: no proxy
        with opener.open(request, timeout=timeout_s) as response:
            return str(response.read().decode())

    def _failure(self, what: str) -> ServerFailedError:
        return ServerFailedError(f"{what}\n--- end of {self.settings.log} ---\n{self.log_tail()}")
