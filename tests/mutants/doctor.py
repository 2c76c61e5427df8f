"""Seeded bugs in ``flexkv doctor``, for ``run.py``: (name, file, old line, new line, tests)."""

from __future__ import annotations

TRAFFIC = "tests/cli/test_doctor_traffic.py"
SETUP = "tests/cli/test_doctor_setup.py"

MUTANTS = (
    (
        "doctor: dead processes are counted beside live ones",
        "flexkv_sglang/cli/doctor/facts.py",
        "counts = item.live and (item.owner.alive or not self.alive)",
        "counts = item.live and not item.owner.alive",
        TRAFFIC,
    ),
    (
        "doctor: ranks of one server are other namespaces",
        "flexkv_sglang/cli/doctor/namespace_diff.py",
        "kept[name] = kept[name][1]",
        "pass",
        TRAFFIC,
    ),
    (
        "doctor: the farthest pair comes first",
        "flexkv_sglang/cli/doctor/namespace_diff.py",
        "key=lambda pair: len(pair.fields))",
        "key=lambda pair: -len(pair.fields))",
        TRAFFIC,
    ),
    (
        "doctor: a server's own verify level is not looked at",
        "flexkv_sglang/cli/doctor/traffic.py",
        'ACCEPTED_KINDS[config.verify] if config else ACCEPTED_KINDS["full"]',
        'ACCEPTED_KINDS["full"]',
        TRAFFIC,
    ),
    (
        "doctor: pages served by device memory are not looked at",
        "flexkv_sglang/cli/doctor/traffic.py",
        "if _above(server) < _SERVED_ABOVE * max(1.0, _prompt_tokens(server)):",
        "if _above(server) >= 0:",
        TRAFFIC,
    ),
    (
        "doctor: a run-time detach is not seen",
        "flexkv_sglang/cli/doctor/server.py",
        "return now[name] if name in now else self.flags.get(name)",
        "return self.flags.get(name)",
        SETUP,
    ),
    (
        "doctor: another backend's dynamic is taken for ours",
        "flexkv_sglang/cli/doctor/server.py",
        'name == "dynamic" and server.extra.get("class_name") == "FlexKVStorage"',
        'name == "dynamic"',
        SETUP,
    ),
    (
        "doctor: a note sets the exit code",
        "flexkv_sglang/cli/doctor/command.py",
        'return 1 if any(finding.severity == "cause" for finding in findings) else 0',
        "return 1 if findings else 0",
        SETUP,
    ),
    (
        "doctor: the white list is not asked",
        "flexkv_sglang/cli/doctor/plugin_check.py",
        'answer["listed"] = NAME in loaded',
        'answer["listed"] = bool(points) or NAME in loaded',
        SETUP,
    ),
)
