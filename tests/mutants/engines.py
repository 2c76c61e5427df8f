"""Seeded bugs in the one-sided engines. ``scripts/mutants engine:`` applies them."""

from __future__ import annotations

TESTS, HELD = (
    "tests/backends/fleet/reader/test_rdma_reads.py",
    "tests/backends/fleet/server/test_holds.py",
)
HOLDS, READS = "backends/fleet/server/holds.py", "backends/fleet/reader/rdma_memory.py"
CHANNEL, MOONCAKE = "backends/fleet/reader/rdma_channel.py", "backends/fleet/rdma/mooncake.py"
PLAYED = "tests/backends/fleet/rdma/test_mooncake_transfers.py"

MUTANTS: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "engine: anybody ends a hold",
        HOLDS,
        "if hold is None or hold.request.reader is not reader:",
        "if hold is None:",
        f"{HELD}::test_a_hold_lasts_until_done_of_the_same_reader",
    ),
    (
        "engine: a hold has no end",
        HOLDS,
        "if hold.until <= now]",
        "if hold.until < 0]",
        f"{HELD}::test_memory_in_a_hold_is_not_used_and_comes_back_when_its_time_is_over",
    ),
    (
        "engine: memory that is still written to is used again",
        READS,
        "            elif state is TransferState.DONE or (",
        "            elif state is not None or (",
        f"{TESTS}::test_a_transfer_that_hangs_is_left_at_the_deadline_and_its_memory_is_not_used",
    ),
    (
        "engine: a hold is counted from the offer",
        READS,
        "fetch.deadline = fetch.begun + hold_ms / 2000",
        "fetch.deadline = time.monotonic() + hold_ms / 2000",
        f"{TESTS}::test_an_offer_that_comes_behind_half_of_its_hold_is_not_fetched",
    ),
    (
        "engine: no pause after an error",
        CHANNEL,
        "        self._fallback.failed(FALLBACK_S)",
        "        self._fallback.failed(0.0)",
        f"{TESTS}::test_an_error_of_the_engine_costs_nothing_but_the_engine",
    ),
    (
        "engine: memory of a failed transfer does not rest",
        READS,
        "now >= failed_at + self._engine.settle_s",
        "now >= failed_at",
        f"{TESTS}::test_memory_of_a_failed_transfer_rests_as_long_as_its_engine_wants",
    ),
    (
        "engine: a transfer of mooncake has failed with its first page",
        MOONCAKE,
        "                return self._state\n            self._batches.popleft()",
        "                break\n            self._batches.popleft()",
        f"{PLAYED}::test_a_transfer_with_a_failed_page_runs_until_the_others_have_ended",
    ),
    (
        "engine: a transfer of mooncake is done before all its pages are given",
        MOONCAKE,
        "        if started:\n",
        "        if started or not self._batches:\n",
        f"{PLAYED}::test_a_transfer_runs_while_its_pages_are_being_given_to_mooncake",
    ),
    (
        "engine: a call of mooncake that hangs holds up reads from other nodes",
        MOONCAKE,
        "if since and time.monotonic() - since > STUCK_S:",
        "if since < 0:",
        f"{PLAYED}::test_a_call_that_hangs_holds_up_no_read_from_another_node",
    ),
)
"""(name, file, old, new, tests); ``old`` occurs exactly once."""
