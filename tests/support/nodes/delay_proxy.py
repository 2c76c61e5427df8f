"""A TCP proxy in this process that delays, limits or swallows bytes: a bad network without root.

    with DelayProxy(target) as proxy:      # target and proxy.address: "host:port"
        proxy.cut()                        # a black hole: bytes wait, nothing is refused, no reset
        proxy.heal()

A node behind it needs ``advertise`` = the proxy's address. Threads: any; the proxy runs in one of its own.
"""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType

_PIECE = 1 << 16


class DelayProxy:
    """``delay_s``: each way. ``rate``: bytes per second each way and connection, 0: no limit."""

    def __init__(self, target: str, delay_s: float = 0.0, rate: float = 0.0) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.delay_s, self.rate = delay_s, rate
        self.passed = 0  # bytes, both ways
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="delay-proxy", daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def cut(self) -> None:
        """Let no more bytes pass."""
        self._call(self._open.clear)

    def heal(self) -> None:
        """Let waiting and later bytes pass again."""
        self._call(self._open.set)

    def close(self) -> None:
        """End all connections."""
        self._call(self._end.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _call(self, what: object) -> None:
        assert callable(what)
        done = threading.Event()

        def run() -> None:
            what()
            done.set()

        self._loop.call_soon_threadsafe(run)
        assert done.wait(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._open, self._end = asyncio.Event(), asyncio.Event()
        self._open.set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = [back]
        ways: list[asyncio.Future[None]] = []
        try:
            await self._open.wait()
            far, out = await asyncio.open_connection(*self._target)
            writers.append(out)
            ways = [
                asyncio.ensure_future(self._pump(near, out)),
                asyncio.ensure_future(self._pump(far, back)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for writer in writers:
                writer.transport.abort()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(64)
        loop = asyncio.get_running_loop()

        async def out() -> None:
            while (item := await queue.get()) is not None:
                due, data = item
                await asyncio.sleep(max(0.0, due - loop.time()))
                await self._open.wait()
                writer.write(data)
                await writer.drain()
                self.passed += len(data)
                if self.rate:
                    await asyncio.sleep(len(data) / self.rate)

        sender = asyncio.ensure_future(out())
        try:
            while data := await reader.read(_PIECE):
                await queue.put((loop.time() + self.delay_s, data))
            await queue.put(None)
            await sender
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    def __enter__(self) -> DelayProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
