"""Fuzzed messages: noise, and valid messages with errors; for decoders and a real server."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Iterator

import numpy as np
import zmq

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.fleet.reader.read import PageOutcome
from flexkv_sglang.backends.fleet.vocabulary import Change, NodeInfo, Op, PageStatus, Snapshot
from flexkv_sglang.backends.fleet.wire import answers, protocol, requests
from flexkv_sglang.config.share import ShareConfig
from nodes.copy_transport import CopyTransport
from nodes.page_servers import EPOCH, NAME, NID, SPACE, begin, reading, serving
from nodes.page_sources import ListedChanges, MemorySource, PageMemory, keys_of

Frames = list[bytes]
KEYS = keys_of(8)
SNAPSHOT = Snapshot(EPOCH, 40, np.arange(1000, dtype=np.uint64) * np.uint64(7))
CHANGES = [
    Change(EPOCH, 1, Op.ADD, np.arange(5, dtype=np.uint64)),
    Change(EPOCH, 6, Op.CLEAR, np.empty(0, np.uint64)),
    Change(EPOCH, 7, Op.DROP, np.arange(2, dtype=np.uint64)),
]
OFFERED = answers.Offered(
    13, 5, 5000,
    (
        answers.OfferedPage(PageStatus.OK, ChecksumKind.XXH3_64, 4096, 1 << 63, 1 << 40),
        answers.OfferedPage(PageStatus.MISS, ChecksumKind.NONE, 0, 0, 0),
    ),
    b"blob",
)  # fmt: skip


def valid_requests() -> list[Frames]:
    """One valid message of each kind that a server takes."""
    return [
        requests.pack_hello(requests.Hello(bytes(16), "default")),
        requests.pack_proof(bytes(32)),
        requests.pack_read(requests.Read(9, SPACE, 500, requests.STOP_AT_FIRST, tuple(KEYS))),
        requests.pack_read(requests.Read(10, bytes(16), 500, 0, tuple(KEYS[:1]))),
        requests.pack_cancel(9),
        requests.pack_report_corrupt(SPACE, KEYS[:2]),
        requests.pack_snapshot_request(11, SPACE),
        requests.pack_poll(requests.Poll(12, SPACE, EPOCH, 3)),
        requests.pack_offer(requests.Read(13, SPACE, 500, requests.STOP_AT_FIRST, tuple(KEYS))),
        requests.pack_done(1),
    ]


def valid_answers() -> list[Frames]:
    """One valid message of each kind that a client takes."""
    info = NodeInfo(NID, EPOCH, "10.0.0.1:7", "rack", (NAME, NAME), version="1")
    full, none = ChecksumKind.XXH3_64, ChecksumKind.NONE
    return [
        answers.pack_challenge(bytes(16)),
        answers.pack_welcome(answers.Welcome(bytes(16), bytes(32), info, 1 << 26, 32)),
        answers.pack_refused(answers.Refusal.CLUSTER),
        [answers.pack_pages(answers.PagesHeader(9, 0, PageStatus.OK, full, 64, (5,))), bytes(64)],
        [
            answers.pack_pages(answers.PagesHeader(9, 1, PageStatus.OK, full, 64, (5, 6))),
            bytes(4096 + 64),
        ],
        [answers.pack_pages(answers.PagesHeader(9, 3, PageStatus.MISS, none, 0, (0,)))],
        answers.pack_end(9, 4),
        [bytes(frame) for frame in answers.pack_part(11, SNAPSHOT, 0)],
        answers.pack_changes(12, CHANGES),
        answers.pack_unavailable(12, answers.UnavailableReason.LOST),
        answers.pack_offered(OFFERED),
    ]


def spoiled(valid: list[Frames], rng: random.Random) -> Frames:
    """A valid message with an error, or noise."""
    if rng.random() < 0.1:
        return [rng.randbytes(rng.randrange(300)) for _ in range(rng.randrange(1, 4))]
    frames = list(rng.choice(valid))
    place = rng.randrange(len(frames))
    data = bytearray(frames[place])
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        change = rng.randrange(6)
        at = rng.randrange(len(data)) if data else 0
        if change == 0 and data:
            data[at] = rng.randrange(256)
        elif change == 1 and data:
            data[at : at + rng.choice((2, 4, 8))] = rng.choice((b"\xff" * 8, bytes(8), b"\x7f" * 4))
        elif change == 2:
            del data[at:]
        elif change == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif change == 4 and len(data) > 4:
            data[3] = rng.randrange(20)
        else:
            data += rng.randbytes(rng.choice((1, 8, 16, 32)))
    frames[place] = bytes(data)
    if rng.random() < 0.05:
        frames.insert(rng.randrange(len(frames) + 1), rng.randbytes(rng.randrange(40)))
    return frames


def fuzz_decoders(count: int, seed: int) -> dict[str, int]:
    """Feed ``count`` messages to both decoders. Each gives a value or ``WireError``; other errors are raised."""
    rng = random.Random(seed)
    asked, answered = valid_requests(), valid_answers()
    understood = refused = 0
    for _ in range(count):
        for decode, valid in ((requests.decode_request, asked), (answers.decode_answer, answered)):
            frames = spoiled(valid, rng)
            try:
                decode(frames)
                understood += 1
            except protocol.WireError:
                refused += 1
    return {"understood": understood, "refused": refused}


def memory_bytes() -> int:
    """Memory of this process that is in use now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def fuzz_server(count: int, seed: int, senders: int = 4) -> dict[str, int]:
    """Send ``count`` messages to a real server from several connections; an honest client reads all the time."""
    rng = random.Random(seed)
    source = MemorySource(KEYS, 4096)
    log = ListedChanges(CHANGES, SNAPSHOT)
    share = ShareConfig(listen="127.0.0.1:0", serve_inflight=8 << 20, serve_inflight_peer=2 << 20)
    context = zmq.Context()
    served = 0
    with (
        serving(source, share, {NAME: log}, CopyTransport()) as (server, address),
        reading() as client,
    ):
        socks = [_connect(context, address) for _ in range(senders)]
        began, highest = 0, 0
        try:
            for number, sock in _turns(socks, count):
                if rng.random() < 0.01:
                    sock.close(0)
                    socks[socks.index(sock)] = sock = _connect(context, address)
                sock.send_multipart(spoiled(valid_requests(), rng))
                _drain(sock)
                if number % 5000 == 0:
                    served += _honest(client, address)
                    highest = max(highest, memory_bytes())
                    began = began or highest
            served += _honest(client, address)
        finally:
            for sock in socks:
                sock.close(0)
            context.term()
        counts = dict(server.counts)
    return {"served": served, "grown_kib": max(0, highest - began) >> 10, **counts}


def _turns(socks: list[zmq.Socket], count: int) -> Iterator[tuple[int, zmq.Socket]]:
    for number in range(1, count + 1):
        yield number, socks[number % len(socks)]


def _connect(context: zmq.Context, address: str) -> zmq.Socket:
    sock = context.socket(zmq.DEALER)
    sock.linger = 0
    sock.sndtimeo = 10_000
    sock.connect(f"tcp://{address}")
    sock.send_multipart(requests.pack_hello(requests.Hello(bytes(16), "default")))
    return sock


def _drain(sock: zmq.Socket) -> None:
    while sock.poll(0):
        answer = answers.decode_answer(
            sock.recv_multipart()
        )  # the server sends only valid messages
        if isinstance(answer, answers.Offered):
            sock.send_multipart(requests.pack_done(answer.lease))


def _honest(client: object, address: str) -> int:
    """Read until all pages are served; their count."""
    end = time.monotonic() + 30
    while True:
        memory = PageMemory(8, [4096])
        outcomes = begin(client, address, KEYS, memory).wait()  # type: ignore[arg-type]
        if outcomes == [PageOutcome.OK] * 8:
            return 8
        assert time.monotonic() < end, outcomes
        time.sleep(0.05)
