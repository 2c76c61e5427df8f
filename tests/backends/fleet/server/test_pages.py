"""Pages of a READ in messages."""

from __future__ import annotations

from collections.abc import Sequence

from flexkv_sglang.backends.fleet.vocabulary import PageStatus, ServedPage
from flexkv_sglang.backends.fleet.wire import answers, protocol, requests
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.types import PageKey
from nodes.page_servers import SPACE, serving, until
from nodes.page_sources import MemorySource, keys_of
from nodes.raw_peer import RawPeer

OK = PageStatus.OK


def test_small_pages_travel_together_with_zeros_between_them() -> None:
    """The gap must not contain old bytes of the slab."""
    keys = keys_of(20)
    source = MemorySource(keys, 5000)
    share = ShareConfig(listen="127.0.0.1:0", serve_inflight=1 << 20)
    with serving(source, share) as (server, address), RawPeer(address) as peer:
        memory = server._pages._slabs.memory
        memory[:] = bytes([0xAB]) * len(memory)
        missing = keys_of(1, seed=9)
        asked = (*keys[:12], *missing, *keys[12:])
        peer.say(requests.pack_read(requests.Read(1, SPACE, 5000, 0, asked)))
        headers, sizes = [], []
        while len(frames := peer.sock.recv_multipart()) == 2 or frames[0][3] != protocol.Kind.END:
            head = answers.decode_answer(frames)
            assert isinstance(head, answers.PagesHeader)
            headers.append((head.index, head.status, len(head.checksums)))
            for place in range(len(frames) > 1 and len(head.checksums)):
                page = frames[1][8192 * place : 8192 * (place + 1)]
                key = keys[head.index + place - (head.index > 12)]
                assert page[:5000] == source.pages[key]
                assert not any(page[5000:])
                sizes.append(len(page))
        assert headers == [(0, OK, 1), (1, OK, 11), (12, PageStatus.MISS, 1), (13, OK, 8)]
        assert sizes.count(5000) == 3  # a message ends with the bytes of its last page
        until(lambda: server._pages.reserved_bytes == 0)


class ShortSource(MemorySource):
    """Gives no answer for the last page."""

    def read(
        self, keys: Sequence[PageKey], addresses: Sequence[int], deadline: float
    ) -> list[ServedPage]:
        return super().read(keys, addresses, deadline)[:-1]


def test_a_source_that_answers_for_too_few_pages_costs_no_memory() -> None:
    keys = keys_of(4)
    with serving(ShortSource(keys, 4096)) as (server, address), RawPeer(address) as peer:
        peer.say(requests.pack_read(requests.Read(1, SPACE, 5000, 0, tuple(keys))))
        assert [answer.status for answer in peer.hear_all()[:-1]] == [PageStatus.MISS] * 4
        until(lambda: server._pages.reserved_bytes == 0)
