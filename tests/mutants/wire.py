"""Seeded bugs in the data plane between nodes. ``scripts/mutants wire:`` applies them."""

from __future__ import annotations

CLIENT, SERVER = (
    "tests/backends/fleet/reader/test_client.py",
    "tests/backends/fleet/server/test_server.py",
)
WIRE, CURVE = (
    "tests/backends/fleet/wire/test_messages.py",
    "tests/backends/fleet/wire/test_curve.py",
)
READ, CHANNEL = "backends/fleet/reader/read.py", "backends/fleet/reader/channel.py"
QUEUE, PAGES = "backends/fleet/server/queue.py", "backends/fleet/server/pages.py"
ANSWERS, PROTOCOL = "backends/fleet/wire/answers.py", "backends/fleet/wire/protocol.py"
KEYS = "backends/fleet/wire/curve.py"

MUTANTS: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "wire: a page's checksum is not compared",
        READ,
        "if self._checksum(pages.kind, index, start, lengths) != checksum:",
        "if self._checksum(pages.kind, index, start, lengths) < 0:",
        f"{CLIENT}::test_a_corrupt_page_is_never_delivered_and_reported",
    ),
    (
        "wire: any kind of checksum is accepted",
        READ,
        "if pages.kind not in self.read.accepted:",
        "if not self.read.accepted:",
        f"{CLIENT}::test_a_weaker_checksum_than_wanted_is_a_miss",
    ),
    (
        "wire: a late page is written",
        READ,
        "if self._closed or index >= self._end",
        "if index >= self._end",
        f"{CLIENT}::test_a_page_that_comes_after_wait_is_not_written",
    ),
    (
        "wire: a page's length is not compared",
        CHANNEL,
        "if pages.length != out.pending.page_bytes:",
        "if pages.length < out.pending.page_bytes:",
        f"{CLIENT}::test_pages_of_another_size_are_not_taken",
    ),
    (
        "wire: old bytes of the slab are sent between pages",
        PAGES,
        "if length < stride:",
        "if length > stride:",
        "tests/backends/fleet/server/test_pages.py::test_small_pages_travel_together_with_zeros_between_them",
    ),
    (
        "wire: pages of a message lie without a gap",
        READ,
        "address + place * stride",
        "address + place * self.page_bytes",
        f"{CLIENT}::test_pages_that_are_not_a_multiple_of_4096_arrive",
    ),
    (
        "wire: more pages than announced",
        ANSWERS,
        "if body is None or not length or len(body) != expected:",
        "if body is None or not length or len(body) < length:",
        WIRE,
    ),
    (
        "wire: silence does not open the breaker",
        CHANNEL,
        ">= (now - pending.begun) / 2:",
        ">= 1e9:",
        f"{CLIENT}::test_a_stopped_server_costs_one_deadline_and_comes_back",
    ),
    (
        "wire: an absent peer is not noticed",
        CHANNEL,
        "                link.watch()  # only",
        "                pass  # only",
        f"{CLIENT}::test_an_absent_server_fails_at_once",
    ),
    (
        "wire: corrupt pages are not reported",
        CHANNEL,
        "            link.send(requests.pack_report_corrupt(",
        "            len(requests.pack_report_corrupt(",
        f"{CLIENT}::test_a_corrupt_page_is_never_delivered_and_reported",
    ),
    (
        "wire: the breaker closes without a greeting",
        "backends/fleet/reader/health.py",
        "return not self._open and now >= self._busy_until",
        "return (not self._open or self._backoff.due) and now >= self._busy_until",
        f"{CLIENT}::test_pauses_of_the_breaker_double_and_end",
    ),
    (
        "wire: a slab is used again at once",
        PAGES,
        "            while frames and frames[0][0].done:",
        "            while frames:",
        f"{SERVER}::test_memory_is_not_reused_before_its_bytes_have_left",
    ),
    (
        "wire: the budget is in seconds",
        PAGES,
        "ask.budget_ms / 1000",
        "ask.budget_ms",
        f"{SERVER}::test_a_request_whose_budget_is_over_is_late",
    ),
    (
        "wire: no limit per reader",
        QUEUE,
        "min(self._limit_per_reader - reader.reserved, free) // slot_bytes",
        "free // slot_bytes",
        f"{SERVER}::test_pages_beyond_a_readers_limit_are_busy_at_once",
    ),
    (
        "wire: queues without a limit",
        QUEUE,
        "if len(reader.requests) >= QUEUE_MAX:",
        "if len(reader.requests) < 0:",
        f"{SERVER}::test_a_long_queue_is_busy",
    ),
    (
        "wire: readers do not take turns",
        QUEUE,
        "        self._turns.rotate(-1)",
        "        pass",
        f"{SERVER}::test_readers_take_turns",
    ),
    (
        "wire: served before the proof",
        "backends/fleet/server/server.py",
        "elif reader is None or not reader.welcomed:",
        "elif reader is None:",
        f"{CURVE}::test_hmac_takes_one_proof_for_one_challenge",
    ),
    (
        "wire: any proof is accepted",
        "backends/fleet/server/server.py",
        "if hmac.compare_digest(ask.proof, self._proof(",
        "if ask.proof and len(self._proof(",
        f"{CURVE}::test_hmac_takes_one_proof_for_one_challenge",
    ),
    (
        "wire: any key is admitted",
        "backends/fleet/wire/auth.py",
        "and hmac.compare_digest(credentials[0], self._allowed)",
        "and len(credentials[0]) == len(self._allowed)",
        f"{CURVE}::test_curve_lets_in_the_derived_key_only",
    ),
    (
        "wire: an open address without a secret",
        "backends/fleet/wire/addresses.py",
        "if secret is None and not share.insecure:",
        "if secret is None and share.insecure is None:",
        f"{CURVE}::test_an_address_that_strangers_can_reach_needs_a_secret",
    ),
    (
        "wire: the group may read the secret",
        "backends/safe_files.py",
        "if mode & 0o037:",
        "if mode & 0o017:",
        f"{CURVE}::test_bad_secret_files",
    ),
    (
        "wire: longer frames than announced",
        PROTOCOL,
        "if len(frame) != layout.size + rest:",
        "if len(frame) < layout.size + rest:",
        f"{WIRE}::test_invalid_requests_are_refused",
    ),
    (
        "wire: snapshots of any size",
        ANSWERS,
        "or count > SNAPSHOT_KEYS_MAX:",
        "or count < 0:",
        f"{WIRE}::test_invalid_answers_are_refused",
    ),
    (
        "wire: a part's checksum is not compared",
        ANSWERS,
        "if xxhash.xxh3_64_intdigest(data) != checksum:",
        "if xxhash.xxh3_64_intdigest(data) < 0:",
        f"{WIRE}::test_invalid_answers_are_refused",
    ),
)
"""(name, file, old, new, tests); ``old`` occurs exactly once."""
