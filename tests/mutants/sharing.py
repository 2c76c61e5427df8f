"""Seeded bugs in sharing between machines, for ``run.py``: (name, file, old line, new line, tests)."""

from __future__ import annotations

RUN, REMOTE, NODE = (
    f"flexkv_sglang/sharing/{name}.py" for name in ("run_dir", "remote_pages", "node_pages")
)
RUNS = "tests/sharing/test_run_dir.py"
READS = "tests/sharing/test_remote_pages.py"
SERVES = "tests/sharing/test_node_pages.py"
KEEPS = "tests/sharing/test_backfill.py"
SETTINGS = "tests/config/test_share.py"
DOCTOR = "tests/cli/test_doctor_sharing.py"
FLEET = "tests/fleet/test_sharing.py::test_an_unused_agent_ends"
REMOVED = "tests/fleet/test_failures.py::test_the_run_directory_is_removed"

MUTANTS = (
    (
        "sharing: pages that arrived do not end a row of misses",
        REMOTE,
        "                self._misses.pop(node_id, None)",
        "                pass",
        f"{READS}::test_a_node_that_misses_time_after_time_is_doubted",
    ),
    (
        "sharing: a snapshot for one doubt again and again",
        "flexkv_sglang/sharing/agent.py",
        "if n > self._doubts.get(key, 0)}",
        "if n > 0}",
        "tests/fleet/test_sharing.py::test_a_wrong_set_is_requested_again",
    ),
    (
        "sharing: a rank's lock is seen before it is held",
        "backends/file_lock.py",
        "            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n            hidden.rename(path)\n",
        "            hidden.rename(path)\n            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        RUNS,
    ),
    (
        "sharing: a lock whose file was replaced counts",
        "backends/file_lock.py",
        "return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)",
        "return mine.st_dev == there.st_dev",
        RUNS,
    ),
    (
        "sharing: settings that matter are not compared",
        "flexkv_sglang/sharing/lifecycle/fitness.py",
        "if key not in _LOCAL}",
        'if key != "cluster_id"}',
        RUNS,
    ),
    (
        "sharing: garbage is a node's mark",
        "flexkv_sglang/sharing/node_identity.py",
        'return text if len(text) == 8 and all(c in "0123456789abcdef" for c in text) else ""',
        "return text",
        "tests/sharing/test_node_identity.py",
    ),
    (
        "sharing: a removed run directory is not created again",
        "flexkv_sglang/sharing/agent_launcher.py",
        "            self._recreate_run_dir()\n",
        "",
        REMOVED,
    ),
    (
        "sharing: the agent ends beside living ranks",
        "flexkv_sglang/sharing/agent.py",
        "            self._needed_at = time.monotonic()\n        for path",
        "            pass\n        for path",
        FLEET,
    ),
    (
        "sharing: pages behind a hole count",
        REMOTE,
        "broken = got < run.stop - run.start",
        "broken = False",
        READS,
    ),
    (
        "sharing: an abandoned read writes",
        REMOTE,
        "                pending.cut(0)\n                pending.wait()\n",
        "                pass\n",
        READS,
    ),
    (
        "sharing: a missing page is requested again",
        REMOTE,
        "            self._remember_miss(run.peer, lost)\n",
        "            pass\n",
        READS,
    ),
    (
        "sharing: an agent with other settings is trusted",
        REMOTE,
        "return self._usable() and self._refresh() and self._reader.alive",
        "return self._refresh() and self._reader.alive",
        READS,
    ),
    (
        "sharing: a prefix that is computed sooner is fetched",
        REMOTE,
        "seconds > pages * self._page_tokens / speed:",
        "seconds < 0:",
        READS,
    ),
    (
        "sharing: each turn gets the whole deadline",
        "flexkv_sglang/cache/tiers.py",
        "begin_get(keys, part, limits[number])",
        "begin_get(keys, part, time.monotonic() + 20)",
        READS,
    ),
    (
        "sharing: the agent takes no second look",
        NODE,
        "elif outcome is Outcome.DONE and same:",
        "elif outcome is Outcome.DONE:",
        SERVES,
    ),
    (
        "sharing: a page that rots is served on",
        NODE,
        "                self._hidden[key] = None\n",
        "",
        SERVES,
    ),
    (
        "sharing: pages of a departed owner stay published",
        "backends/slots/neighbours.py",
        "            self._departed += journal.keys()\n",
        "            pass\n",
        SERVES,
    ),
    (
        "sharing: kept pages lie one upon the other",
        "flexkv_sglang/sharing/backfill.py",
        "                target += length\n",
        "",
        KEEPS,
    ),
    (
        "sharing: room for kept pages does not come back",
        "flexkv_sglang/sharing/backfill.py",
        "            self._free += job.rows\n",
        "            pass\n",
        KEEPS,
    ),
    (
        "sharing: errors show a password",
        "flexkv_sglang/config/parsers.py",
        "return printable(repr(without_secrets(value, name)))",
        "return repr(value)",
        SETTINGS,
    ),
    (
        "sharing: weights without a name are shared",
        "flexkv_sglang/sharing/rank.py",
        '        if fields.get("epoch"):\n            return None\n',
        "",
        "tests/sharing/test_rank.py",
    ),
    (
        "sharing: doctor takes other namespaces for its own",
        "flexkv_sglang/cli/doctor/sharing.py",
        "if not ours or not theirs or ours & theirs:",
        "if not ours or not theirs:",
        DOCTOR,
    ),
)
