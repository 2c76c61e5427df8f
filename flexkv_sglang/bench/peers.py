"""Contenders outside of this process: fio as the ceiling, and NIXL's POSIX plug-in."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from flexkv_sglang.bench.contenders import MissingContender, PassDuration
from flexkv_sglang.bench.memory import HostMemory

NIXL_PYTHON = Path(".venv-nixl/bin/python")
"""Path that ``scripts/setup-nixl`` makes in the checkout."""


class FioContender:
    """The ceiling: io_uring, O_DIRECT, pages in ascending order as in our file, no checksums.

    It uses our slot file and our memory: on a virtual disk the places of two files of one size can change speed by
    half. Its depth is the number of pages of one of our calls, so that it uses the same memory; we never have more
    in flight.
    """

    def __init__(self, path: Path, memory: HostMemory, pages: int, *, registered: bool) -> None:
        """``path``: overwritten. ``registered``: buffers and file with the ring. ``MissingContender``: no fio here."""
        if shutil.which("fio") is None:
            raise MissingContender("fio is not installed (apt-get install fio)")
        self.name = "fio" if registered else "fio-plain"
        self._registered = int(registered)
        self._path, self._memory, self.pages = path, memory, pages
        self._page_bytes = memory.page_bytes

    @staticmethod
    def version() -> str:
        """Version as printed by fio."""
        found = subprocess.run(["fio", "--version"], check=True, capture_output=True, text=True)
        return found.stdout.strip()

    def write(self, _generation: int) -> PassDuration:
        """Overwrites the file. Our pages in it are lost."""
        return self._run("write")

    def read(self, _generation: int) -> PassDuration:
        """Cold reads, with O_DIRECT."""
        return self._run("read")

    def close(self) -> None:
        """Nothing to remove: the file is ours."""

    def _run(self, how: str) -> PassDuration:
        command = [
            "fio",
            "--name=page",
            f"--filename={self._path}",
            "--direct=1",
            "--ioengine=io_uring",
            f"--rw={how}",
            f"--bs={self._page_bytes}",
            f"--iodepth={self._memory.pages}",
            f"--mem=mmapshared:{self._memory.path}",
            f"--fixedbufs={self._registered}",
            f"--registerfiles={self._registered}",
            f"--size={self._page_bytes * self.pages}",
            "--output-format=json",
            "--fallocate=none",
        ]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        job = json.loads(result.stdout)["jobs"][0]
        seconds = self._page_bytes * self.pages / job[how]["bw_bytes"]
        return PassDuration(
            seconds, (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
        )


class NixlContender:
    """NIXL POSIX in its own process; see ``nixl_child.py``."""

    def __init__(self, directory: Path, memory: HostMemory, pages: int, engine: str) -> None:
        """``engine``: "aio" or "uring". ``MissingContender``: its environment is missing or does not work."""
        self.name, self.pages = f"nixl-{engine}", pages
        if not NIXL_PYTHON.exists():
            raise MissingContender(
                f"NIXL is not installed: {NIXL_PYTHON} is not there (scripts/setup-nixl, in a checkout)"
            )
        self._directory = directory / self.name
        self._directory.mkdir()
        child = Path(__file__).with_name("nixl_child.py")
        arguments = [
            str(self._directory),
            str(memory.path),
            str(memory.page_bytes),
            str(memory.pages),
            str(pages),
            engine,
        ]
        self._process = subprocess.Popen(
            [str(NIXL_PYTHON.absolute()), "-P", str(child), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        if not first:
            self.close()
            raise MissingContender(f"NIXL does not start: {' '.join(arguments[2:])}")
        self.version = f"nixl-{json.loads(first)['version']}"

    def write(self, generation: int) -> PassDuration:
        """New files; the old ones are removed before the clock starts."""
        self._ask("CLEAR", generation)
        return self._ask("WRITE", generation)

    def read(self, generation: int) -> PassDuration:
        """Cold reads, with O_DIRECT."""
        return self._ask("READ", generation)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()
        shutil.rmtree(self._directory)

    def _ask(self, operation: str, generation: int) -> PassDuration:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"op": operation, "generation": generation}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise MissingContender(f"{self.name} ended in the middle of a {operation}")
        return PassDuration(**json.loads(line))
