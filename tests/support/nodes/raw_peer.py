"""A peer that a test controls: a bare DEALER that sends exactly the given messages."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType

import zmq

from flexkv_sglang.backends.fleet.wire import answers, requests


class RawPeer:
    """Connected to ``address``. ``greet``: send HELLO first. ``queue``: unread messages it accepts, 0: all."""

    def __init__(
        self, address: str, *, greet: bool = True, cluster_id: str = "default", queue: int = 0
    ) -> None:
        self._context = zmq.Context()
        self.sock = self._context.socket(zmq.DEALER)
        self.sock.linger = 0
        self.sock.rcvhwm = queue
        self.sock.connect(f"tcp://{address}")
        if greet:
            self.say(requests.pack_hello(requests.Hello(bytes(16), cluster_id)))
            self.greeting = self.hear()

    def say(self, frames: list[bytes]) -> None:
        """Send one message."""
        self.sock.send_multipart(frames)

    def hear(self, seconds: float = 10.0) -> answers.Answer | None:
        """The next answer; None: none came in time."""
        if not self.sock.poll(int(seconds * 1000)):
            return None
        return answers.decode_answer(self.sock.recv_multipart())

    def hear_all(self) -> list[answers.Answer]:
        """Answers up to an END; pages that came in one message are taken apart."""
        heard: list[answers.Answer] = []
        while not isinstance(answer := self.hear(), answers.End):
            assert answer is not None, heard
            heard += one_by_one(answer) if isinstance(answer, answers.PagesHeader) else [answer]
        return [*heard, answer]

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sock.close(0)
        self._context.term()


def one_by_one(pages: answers.PagesHeader) -> list[answers.PagesHeader]:
    """Split one message into messages of one page."""
    return [
        replace(pages, index=pages.index + place, checksums=(checksum,))
        for place, checksum in enumerate(pages.checksums)
    ]
