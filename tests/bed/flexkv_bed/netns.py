"""Hosts on one machine: network namespaces joined by a bridge, with cables that can be cut.

A host is a network namespace; files and processes are the machine's. A cut cable loses packets in silence, as a
real one does: neither side gets an error. Needs root and iproute2; ``Unavailable`` names the missing part.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

_CLONE_NEWNET = 0x40000000
_SUBNET = "10.77.0"
_COMMAND_S = 20.0
_KILL_S = 5.0

T = TypeVar("T")


class UnavailableError(RuntimeError):
    """This machine cannot have network namespaces."""


class Cluster:
    """Hosts by name; the first has the address 10.77.0.1, and so on. Leaving the context kills and removes all."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = tuple(hosts)
        self._prefix = f"fk{secrets.token_hex(2)}"
        self._switch = f"{self._prefix}-sw"

    def __enter__(self) -> Cluster:
        if shutil.which("ip") is None:
            raise UnavailableError("iproute2 is not installed")
        if os.getuid() != 0:
            raise UnavailableError("network namespaces need root")
        try:
            self._up()
        except subprocess.CalledProcessError as exc:
            self._down()
            reason = (exc.stderr or b"").decode(errors="replace").strip()
            raise UnavailableError(f"network namespaces do not work here: {reason}") from exc
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._down()

    def name(self, host: str) -> str:
        """The namespace's name."""
        assert host in self.hosts, host
        return f"{self._prefix}-{host}"

    def address(self, host: str) -> str:
        """IPv4 address."""
        return f"{_SUBNET}.{self.hosts.index(host) + 1}"

    def command(self, host: str) -> list[str]:
        """Words before a command that make it run on the host."""
        return ["ip", "netns", "exec", self.name(host)]

    def cut(self, host: str) -> None:
        """Pull its cable."""
        _ip("-n", self._switch, "link", "set", f"v{host}", "down")

    def heal(self, host: str) -> None:
        """Put it back."""
        _ip("-n", self._switch, "link", "set", f"v{host}", "up")

    def run(self, host: str, act: Callable[[], T]) -> T:
        """Call ``act`` in a thread that is on the host: sockets it makes are the host's."""
        return inside(self.name(host), act)

    def _up(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for host in self.hosts:
            name = self.name(host)
            _ip("netns", "add", name)
            peer = ("type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "add", f"v{host}", "netns", self._switch, *peer)
            _ip("-n", self._switch, "link", "set", f"v{host}", "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")

    def _down(self) -> None:
        names = subprocess.run(
            ["ip", "netns", "list"], capture_output=True, timeout=_COMMAND_S, check=False
        )
        for line in names.stdout.decode().splitlines():
            name = line.split()[0] if line.split() else ""
            if name.startswith(f"{self._prefix}-"):
                self._kill_in(name)
                subprocess.run(["ip", "netns", "del", name], timeout=_COMMAND_S, check=False)

    @staticmethod
    def _kill_in(name: str) -> None:
        """A namespace lives on, unnamed, while a process is in it."""
        until = time.monotonic() + _KILL_S
        while time.monotonic() < until:
            found = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, timeout=_COMMAND_S, check=False
            )
            pids = [int(text) for text in found.stdout.split()]
            if not pids:
                return
            for pid in pids:
                for number in (signal.SIGCONT, signal.SIGKILL):
                    try:
                        os.kill(pid, number)
                    except ProcessLookupError:
                        break
            time.sleep(0.02)


def inside(namespace: str, act: Callable[[], T]) -> T:
    """Call ``act`` in a thread that is in this network namespace; its exceptions are raised here."""
    result: list[T] = []
    trouble: list[BaseException] = []

    def enter() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(fd, _CLONE_NEWNET):
                error = ctypes.get_errno()
                raise OSError(error, f"setns: {os.strerror(error)}")
        finally:
            os.close(fd)

    def run() -> None:
        try:
            enter()
            result.append(act())
        except BaseException as exc:  # noqa: BLE001 - raised in the caller's thread
            trouble.append(exc)

    thread = threading.Thread(target=run, name=f"in-{namespace}")
    thread.start()
    thread.join()
    if trouble:
        raise trouble[0]
    return result[0]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, timeout=_COMMAND_S, check=True)
