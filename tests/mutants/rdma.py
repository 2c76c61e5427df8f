"""Seeded bugs in the RDMA transports. ``scripts/mutants rdma:`` applies them."""

from __future__ import annotations

TESTS, LEASED = (
    "tests/backends/fleet/reader/test_rdma_reads.py",
    "tests/backends/fleet/server/test_offers.py",
)
OFFERS, MEMORY = "backends/fleet/server/offers.py", "backends/fleet/reader/rdma_memory.py"
CHANNEL, MOONCAKE = "backends/fleet/reader/rdma_channel.py", "backends/fleet/rdma/mooncake.py"
PLAYED = "tests/backends/fleet/rdma/test_mooncake_transfers.py"

MUTANTS: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "rdma: any reader ends a lease",
        OFFERS,
        "if lease is not None and lease.request.reader is reader:",
        "if lease is not None:",
        f"{LEASED}::test_a_lease_lasts_until_done_of_the_same_reader",
    ),
    (
        "rdma: a lease has no end",
        OFFERS,
        "if lease.until <= now]",
        "if lease.until < 0]",
        f"{LEASED}::test_leased_memory_is_not_reused_before_the_lease_expires",
    ),
    (
        "rdma: memory that is still written to is used again",
        MEMORY,
        "            elif state is TransferState.DONE or (",
        "            elif state is not None or (",
        f"{TESTS}::test_a_hanging_transfer_ends_at_the_deadline_and_its_memory_is_not_reused",
    ),
    (
        "rdma: a lease is counted from the offer",
        MEMORY,
        "fetch.deadline = fetch.begun + lease_ms / 2000",
        "fetch.deadline = time.monotonic() + lease_ms / 2000",
        f"{TESTS}::test_an_offer_after_half_of_its_lease_is_not_fetched",
    ),
    (
        "rdma: no pause after an error",
        CHANNEL,
        "        self._fallback.failed(FALLBACK_S)",
        "        self._fallback.failed(0.0)",
        f"{TESTS}::test_after_an_error_of_the_transport_pages_come_over_zmq",
    ),
    (
        "rdma: memory of a failed transfer does not rest",
        MEMORY,
        "now >= failed_at + self._transport.settle_s",
        "now >= failed_at",
        f"{TESTS}::test_memory_of_a_failed_transfer_is_not_reused_before_settle_s",
    ),
    (
        "rdma: a transfer of mooncake has failed with its first page",
        MOONCAKE,
        "                return self._state\n            self._batches.popleft()",
        "                break\n            self._batches.popleft()",
        f"{PLAYED}::test_a_transfer_with_a_failed_page_runs_until_the_others_have_ended",
    ),
    (
        "rdma: a transfer of mooncake is done before all its pages are given",
        MOONCAKE,
        "        if started:\n",
        "        if started or not self._batches:\n",
        f"{PLAYED}::test_a_transfer_runs_while_its_pages_are_being_given_to_mooncake",
    ),
    (
        "rdma: a call of mooncake that hangs holds up reads from other nodes",
        MOONCAKE,
        "if since and time.monotonic() - since > STUCK_S:",
        "if since < 0:",
        f"{PLAYED}::test_a_hanging_call_delays_no_read_from_another_node",
    ),
)
"""(name, file, old, new, tests); ``old`` occurs exactly once."""
