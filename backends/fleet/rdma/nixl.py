"""NIXL (its UCX back-end) as an RDMA transport. Loaded only for ``share.engine: nixl``.

Measured with 1.5.1 (decision 018): a killed peer is an error within 0.4 s; a stopped one stays PROC for ever with any
keep-alive of UCX, so every deadline is the caller's; memory that is freed before it is deregistered ends the process
with SIGSEGV; UCX listens on all interfaces, on ports of its own. NIXL's threads move the bytes on both sides.

Threads: one at a time.
"""

from __future__ import annotations

import importlib
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from flexkv_sglang.backends.fleet.transport import Move, RdmaError, TransferState
from flexkv_sglang.errors import ConfigError

logger = logging.getLogger(__name__)

MODULES = ("nixl._api", "nixl_cu12._api", "nixl_cu13._api")
"""Its module in different releases. SGLang imports the first too, so one process has one copy."""

SETTLE_S = 10.0
"""In one trial of 8 s no byte came after the error."""

REMOTES_MAX = 256
"""Other sides at most; beyond it the least recently read one is forgotten."""


def open_transport(_host: Callable[[], str]) -> NixlTransport:
    """Called by ``transport.open_transport``. NIXL finds this machine's addresses without help."""
    return NixlTransport()


def load_api() -> Any:
    """NIXL's Python interface. Raises ``ConfigError`` if NIXL is not installed."""
    reasons = []
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as exc:
            reasons.append(str(exc))
    raise ConfigError(
        f"share.engine: 'nixl', but NIXL cannot be imported ({'; '.join(reasons)}). Install it"
        " (without CUDA: pip install --no-deps nixl-cu12 numpy). Valid without it: 'zmq'"
    )


def errors_of(api: Any) -> tuple[type[Exception], ...]:
    """The exceptions its calls raise: its own, which have no common base, and Python's through C++."""
    bindings = importlib.import_module(api.nixl_agent.__module__.replace("_api", "_bindings"))
    own = [kind for kind in vars(bindings).values() if isinstance(kind, type)]
    own = [kind for kind in own if issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, TypeError, LookupError, MemoryError, OverflowError)


class NixlTransfer:
    """One transfer request. It is released when it ends; a request that cannot be released is still RUNNING."""

    def __init__(self, agent: Any, handle: Any, errors: tuple[type[Exception], ...]) -> None:
        self._agent, self._handle, self._errors = agent, handle, errors
        self._state = TransferState.RUNNING
        self._failed = False

    def post(self) -> None:
        """Start."""
        self._take(self._agent.transfer)

    def poll(self) -> TransferState:
        """As ``Transfer``."""
        if self._state is TransferState.RUNNING:
            self._take(self._agent.check_xfer_state)
        return self._state

    def _take(self, ask: Callable[[Any], str]) -> None:
        try:
            answer = "ERR" if self._failed else ask(self._handle)
        except self._errors:  # nixlRemoteDisconnectError, for one
            logger.debug("a transfer of NIXL has failed", exc_info=True)
            answer = "ERR"
        if answer == "PROC":
            return
        self._failed = answer != "DONE"
        try:
            self._handle.release()
        except self._errors:
            logger.debug("a transfer of NIXL cannot be released", exc_info=True)
            return  # it still runs
        self._state = TransferState.FAILED if self._failed else TransferState.DONE


class NixlTransport:
    """An agent with the UCX back-end. Raises ``ConfigError`` if NIXL or that back-end is missing."""

    name = "nixl"
    settle_s = SETTLE_S

    def __init__(self) -> None:
        api = load_api()
        self._errors = errors_of(api)
        self._memory: Any = None
        self._remotes: dict[bytes, str] = {}  # blob -> NIXL's name, the last used last
        self._running: list[tuple[str, NixlTransfer]] = []
        try:
            self._agent = api.nixl_agent(
                f"flexkv-{secrets.token_hex(8)}", api.nixl_agent_config(backends=["UCX"])
            )
        except self._errors as exc:
            raise ConfigError(
                f"share.engine: 'nixl', but NIXL does not start: {_why(exc)}. Valid without it: 'zmq'"
            ) from exc
        if "UCX" not in self._agent.backends:
            raise ConfigError(
                "share.engine: 'nixl', but this NIXL has no UCX back-end. Valid without it: 'zmq'"
            )

    def register(self, address: int, byte_count: int) -> None:
        """As ``RdmaTransport``."""
        assert self._memory is None, "registered twice"
        try:
            self._memory = self._agent.register_memory([(address, byte_count, 0, "")], "DRAM")
        except self._errors as exc:
            raise RdmaError(f"NIXL cannot register {byte_count} bytes: {_why(exc)}") from exc

    def blob(self) -> bytes:
        """As ``RdmaTransport``."""
        try:
            return bytes(self._agent.get_agent_metadata())
        except self._errors as exc:
            raise RdmaError(f"NIXL does not give its metadata: {_why(exc)}") from exc

    def read(self, blob: bytes, moves: Sequence[Move]) -> NixlTransfer:
        """As ``RdmaTransport``."""
        self._forget_failed()
        try:
            remote = self._remote(blob)
            ours = [(move.target, move.byte_count, 0) for move in moves]
            theirs = [(move.source, move.byte_count, 0) for move in moves]
            handle = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs(ours, "DRAM"),
                self._agent.get_xfer_descs(theirs, "DRAM"),
                remote,
            )
        except self._errors as exc:
            raise RdmaError(f"NIXL cannot read: {_why(exc)}") from exc
        transfer = NixlTransfer(self._agent, handle, self._errors)
        self._running.append((remote, transfer))
        transfer.post()
        return transfer

    def _remote(self, blob: bytes) -> str:
        remote = self._remotes.pop(blob, None) or str(_text(self._agent.add_remote_agent(blob)))
        self._remotes[blob] = remote
        if len(self._remotes) > REMOTES_MAX:
            self._forget(next(iter(self._remotes)))
        return remote

    def _forget_failed(self) -> None:
        """Forget sides whose transfer failed: NIXL reconnects only to a side that it does not know."""
        states = [(remote, transfer, transfer.poll()) for remote, transfer in self._running]
        self._running = [(r, t) for r, t, state in states if state is TransferState.RUNNING]
        failed = {remote for remote, _, state in states if state is TransferState.FAILED}
        for blob in [blob for blob, remote in self._remotes.items() if remote in failed]:
            self._forget(blob)

    def _forget(self, blob: bytes) -> None:
        remote = self._remotes[blob]
        if any(remote == running for running, _ in self._running):
            return  # later: a transfer still uses it
        del self._remotes[blob]
        try:
            self._agent.remove_remote_agent(remote)
        except self._errors:
            logger.debug("NIXL cannot forget %s", remote, exc_info=True)

    def close(self) -> bool:
        """As ``RdmaTransport``."""
        self._forget_failed()
        if self._running:
            return False
        memory, self._memory = self._memory, None
        if memory is not None:
            for blob in list(self._remotes):
                self._forget(blob)
            try:
                self._agent.deregister_memory(memory)
            except self._errors:
                logger.warning("NIXL cannot deregister its memory", exc_info=True)
                return False
        return True


def _text(name: object) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _why(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"
