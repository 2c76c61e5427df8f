"""Seeded bugs in the life of an agent, for ``run.py``: (name, file, old line, new line, tests)."""

from __future__ import annotations

FIT = "flexkv_sglang/sharing/lifecycle/fitness.py"
LAUNCHER = "flexkv_sglang/sharing/agent_launcher.py"
CLIENT = "backends/fleet/reader/client.py"
FITS = "tests/sharing/test_fitness.py"
REPLACES = "tests/sharing/test_replacement.py"
READS = "tests/backends/fleet/reader/test_client.py"

MUTANTS = (
    (
        "agents: the content of the secret is not compared",
        FIT,
        """            ("secret", self.secret.kid, "holds secret {} (here {})"),\n""",
        "",
        FITS,
    ),
    (
        "agents: one that others need is replaced",
        LAUNCHER,
        """        if needed_by or card.get("by_hand"):""",
        """        if card.get("by_hand"):""",
        f"{REPLACES}::test_an_agent_that_others_need_stays_until_they_have_gone",
    ),
    (
        "agents: a process that refuses one keeps it alive",
        "flexkv_sglang/sharing/run_dir.py",
        """        if "unfit" not in report""",
        "        if True",
        "tests/sharing/test_run_dir.py",
    ),
    (
        "agents: an exception ends remote reads for good",
        CLIENT,
        "                time.sleep(_PAUSE_S)",
        "                return",
        f"{READS}::test_a_round_that_raises_fails_its_reads_and_the_next_ones_work",
    ),
)
