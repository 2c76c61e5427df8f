"""The documents are true: versions, settings, metrics, commands, paths, names, links and lines, against the code."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import runpy
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from flexkv_sglang.backends.fleet.replica import files as replica_files
from flexkv_sglang.backends.fleet.vocabulary import PROTOCOL
from flexkv_sglang.backends.fleet.wire.protocol import Kind
from flexkv_sglang.backends.slots.records import FORMAT_VERSION
from flexkv_sglang.cli.doctor.command import CAUSES
from flexkv_sglang.cli.main import _parser
from flexkv_sglang.config import settings, share
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.metrics.catalog import CATALOG

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *DOCS.rglob("*.md"),
        ROOT / "triton_kernels" / "README.md",
    ]
)
FOLDERS = ("flexkv_sglang", "backends", "triton_kernels", "tests", "scripts", "benchmarks", "docs")
FORMER = {"flexkv_sglang.adapter", "flexkv_sglang.hierarchy"}
"""Modules that CHANGELOG.md names because they are gone."""

PROSE_MAX, ARCHITECTURE_MAX, README_MAX = 130, 120, 130
EIGHT = ("get?", "put?", "victim", "Redis", "tier?", "setting?", "metric?", "cause?")


def named(path: Path) -> str:
    """For messages and test ids."""
    return str(path.relative_to(ROOT))


def outside_of_code(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of every line that is not in a code block."""
    code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            yield number, line


def spans(path: Path) -> list[str]:
    """The texts between backticks, outside of code blocks; a span may go on in the next line."""
    text = "\n".join(line for _, line in outside_of_code(path))
    return [re.sub(r"\s+", " ", found) for found in re.findall(r"`([^`]+)`", text)]


def section(path: Path, heading: str) -> str:
    """The text below one heading, up to the next one."""
    text = path.read_text()
    assert text.count(f"\n{heading}\n") == 1, f"{named(path)}: {heading}"
    return re.split(r"\n#+ ", text.split(f"\n{heading}\n", 1)[1])[0]


def rows(text: str) -> list[list[str]]:
    """Cells of every table row, without heads and rules."""
    found: list[list[str]] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        rule_follows = number + 1 < len(lines) and lines[number + 1].startswith("|---")
        if line.startswith("|") and not line.startswith("|---") and not rule_follows:
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


@cache
def source_words() -> frozenset[str]:
    """Every word of the program, its tests, scripts and settings."""
    paths = [path for folder in FOLDERS[:-1] for path in (ROOT / folder).rglob("*")]
    texts = [
        path.read_text()
        for path in [*paths, ROOT / "setup.cfg", ROOT / "pyproject.toml"]
        if path.is_file() and path.suffix in ("", ".py", ".cfg", ".toml", ".txt")
    ]
    return frozenset(re.findall(r"\w+", "\n".join(texts)))


# --- versions and formats ---


def test_versions_of_formats_and_of_the_protocol() -> None:
    text = (DOCS / "DATA_FILE.md").read_text()
    flat = re.sub(r"\s+", " ", text)
    assert f"format on disk {FORMAT_VERSION} " in flat
    assert f"membership replica {replica_files.VERSION} " in flat
    assert f"protocol between nodes {PROTOCOL} " in flat
    assert f"\nProtocol version {PROTOCOL}. " in text
    cells = {row[0]: row[1] for row in rows(section(DOCS / "DATA_FILE.md", "## In Redis"))}
    assert cells["`proto`"].startswith(f"{PROTOCOL}, ")
    header = rows(section(DOCS / "DATA_FILE.md", "## Header, 4096 bytes"))
    assert ["8", "4", f"version: {FORMAT_VERSION}"] in header
    replica = rows(section(DOCS / "DATA_FILE.md", "## The membership replica"))
    assert replica.count(["8", "4", f"version: {replica_files.VERSION}"]) == 2
    assert set(re.findall(r"`(\w+)`", cells["`engines`"])) == {"zmq", "nixl", "mooncake"}
    for name in ("zmq", "nixl", "mooncake"):
        share.parse_share("share", {"engine": name})
    with pytest.raises(ConfigError):
        share.parse_share("share", {"engine": "carrier pigeon"})


def test_every_message_between_nodes_is_in_the_table() -> None:
    table = rows(section(DOCS / "DATA_FILE.md", "## On the wire between nodes"))
    described = {row[0] for row in table if row[1] in ("reader", "server", "follower")}
    assert described == {f"{kind.value} {kind.name}" for kind in Kind}


# --- settings ---


def literal(text: str) -> str:
    """A default as it is written."""
    return text.strip().strip("`")


def test_settings_and_their_defaults_in_the_readme() -> None:
    table = {literal(row[0]): row[1] for row in rows(section(README, "## Settings"))}
    assert set(table) == {*settings._TIER_PARSERS, *settings._PARSERS}
    config = settings.FlexKVConfig()
    assert literal(table["path"]) == config.tiers[0].path[0]
    for key in ("durability", "verify", "io_engine"):
        assert literal(table[key]) == getattr(config, key), key
    assert literal(table["require_mount"]) == str(config.tiers[0].require_mount).lower()
    assert (config.share, literal(table["share"])) == (share.ShareConfig(), "{}")
    for key in ("redis_url", "peers"):
        assert not getattr(config.share, key), key
        assert table[key] == "none", key
    compared = ("path", "require_mount", "durability", "verify", "io_engine")
    prose = [key for key in table if key not in compared]
    assert set(prose) == {*("size", "tiers", "min_free", "model_id", "redis_url", "peers")} | {
        "share",
        "pool_density",
    }, "a setting whose default nothing compares"


def test_settings_of_sharing_and_their_defaults() -> None:
    found: dict[str, str] = {}
    for row in rows(section(DOCS / "OPERATING.md", "## Sharing between machines")):
        keys = [literal(key) for key in row[0].split(",")]
        values = row[1].split(",") if len(keys) == row[1].count(",") + 1 else [row[1]] * len(keys)
        found.update({key: literal(value) for key, value in zip(keys, values, strict=True)})
    aliases = {"pod"}
    assert set(found) == set(share._PARSERS) - aliases
    default = share.ShareConfig()
    for key in found:
        field, parse = share._PARSERS[key]
        value = getattr(default, field)
        if value is None or value == ():
            assert not re.match(r"^[\d\"]", found[key]), key
            continue
        text = {"none": "", "empty": "", "true": "true", "false": "false"}.get(
            found[key], found[key]
        )
        if isinstance(value, bool):
            assert text == str(value).lower(), key
        elif isinstance(value, int | float):
            assert parse(key, float(text)) == value, key
        else:
            assert text == value, key


def test_fixed_times_of_sharing_and_settings_that_are_gone() -> None:
    default = share.ShareConfig()
    text = section(DOCS / "OPERATING.md", "## Sharing between machines")
    text = re.sub(r"\s+", " ", text.split("**Fixed times.**")[1].split("**How it works.**")[0])
    assert f"heartbeat every {default.heartbeat_s:g} s" in text
    assert f"after {default.node_ttl_s:g} s without one" in text
    assert f"waits {1000 * default.remote_deadline_s:g} ms" in text
    assert f"collected for {1000 * default.publish_flush_s:g} ms" in text
    assert f"used for {default.replica_ttl_s:g} s" in text
    assert f"ends {default.agent_linger_s:g} s after" in text
    for key in share._REMOVED:
        naming = [path.name for path in DOCUMENTS if f"`{key}`" in path.read_text()]
        assert naming == ["CHANGELOG.md"], key


# --- metrics and the doctor ---


def test_the_table_of_metrics_is_the_catalogue() -> None:
    described: dict[str, tuple[str, str]] = {}
    for row in rows(section(DOCS / "OPERATING.md", "## Metrics")):
        kind, label = row[1].split(",")[0], literal(row[2])
        described.update({literal(name): (kind, label) for name in row[0].split(",")})
    actual = {
        metric.prometheus_name.removeprefix("sglang:flexkv_").removesuffix("_total")
        if metric.kind == "counter"
        else metric.prometheus_name.removeprefix("sglang:flexkv_"): metric.kind
        for metric in CATALOG.values()
    }
    assert {name: kind for name, (kind, _) in described.items()} == actual


def test_metrics_of_the_linker_exist() -> None:
    known = {metric.prometheus_name.removeprefix("sglang:flexkv_") for metric in CATALOG.values()}
    for path in DOCUMENTS:
        for span in spans(path):
            if re.fullmatch(r"linker_\w+s", span):
                assert span in known, f"{named(path)}: {span}"


def test_words_of_the_doctor() -> None:
    folder = ROOT / "flexkv_sglang" / "cli" / "doctor"
    said: set[str] = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                said |= {c.value for c in ast.walk(node.args[0]) if isinstance(c, ast.Constant)}
    table = rows(section(DOCS / "OPERATING.md", "## Why is my hit rate 0?"))
    described = {literal(word) for row in table if row[0][0] == "`" for word in row[0].split(",")}
    missing = described - source_words()
    assert not missing
    assert len(CAUSES) > 20
    assert {word for word in said if re.fullmatch(r"[a-z_]+", word)} <= described


# --- commands ---


def commands() -> dict[str, set[str]]:
    """Every command of ``flexkv`` with its flags."""
    (sub,) = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    found: dict[str, set[str]] = {}
    for name, parser in sub.choices.items():
        flags = {flag for action in parser._actions for flag in action.option_strings}
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    flags |= {flag for a in inner._actions for flag in a.option_strings}
        found[name] = flags
    return found


def named_commands(path: Path, first: str) -> Iterator[str]:
    """Texts that begin with a command: spans, and lines of code blocks without their comments."""
    yield from (span for span in spans(path) if span.startswith(first))
    code = False
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            code = not code
        elif code and line.removeprefix("$ ").startswith(first):
            yield line.removeprefix("$ ").split("  #")[0]


def flags_of(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][\w-]*", text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_commands_and_their_flags_exist(path: Path) -> None:
    known = commands()
    for text in named_commands(path, "flexkv "):
        word = text.split()[1]
        if not re.fullmatch(r"[a-z]+", word):
            continue
        assert word in known, text
        assert not [flag for flag in flags_of(text) if flag not in known[word]], text


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_scripts_and_their_flags_exist(path: Path) -> None:
    names: list[str] = []
    for text in named_commands(path, "scripts/"):
        name, *words = text.split()
        script = ROOT / name
        assert script.is_file(), text
        stem = script.name.replace("-", "_")
        sources = [script, ROOT / "tests" / "bed" / "flexkv_bed" / f"{stem}.py"]
        sources += [script.with_name(f"{stem}.py")]
        sources += [ROOT / "tests" / "mutants" / "run.py"] * (script.name == "mutants")
        source = "\n".join(path.read_text() for path in sources if path.is_file())
        assert not [flag for flag in flags_of(text) if flag not in source], text
        if script.name == "mutants":
            names += [word for word in words if word.endswith(":")]
    if names:
        tables = [p for p in (ROOT / "tests" / "mutants").glob("*.py") if p.name != "run.py"]
        bugs = [bug[0] for table in tables for bug in runpy.run_path(str(table))["MUTANTS"]]
        assert not [word for word in names if not any(word in bug for bug in bugs)]


OTHER_FLAGS = {*("--no-deps", "--shm-size", "--kernels-on", "--e2e-variant", "--mib", "--gbit")}
"""Of pip, Docker, pytest and benchmarks."""


@pytest.mark.sglang
def test_flags_of_sglang_exist() -> None:
    """Flags that no command of ours has are SGLang's: its arguments name them, with underscores."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    (place,) = [Path(found) / "srt" for found in spec.submodule_search_locations or ()]
    sources = [place / "server_args.py", *(place / "arg_groups").rglob("*.py")]
    known = frozenset(re.findall(r"\w+", "\n".join(path.read_text() for path in sources)))
    ours = set().union(*commands().values()) | OTHER_FLAGS
    for path in DOCUMENTS:
        text = path.read_text()
        for command in sorted(named_commands(path, "scripts/"), key=len, reverse=True):
            text = text.replace(command, "")
        for flag in set(flags_of(text)) - ours:
            assert flag[2:].replace("-", "_") in known, f"{named(path)}: {flag}"


# --- paths, modules and names ---


@cache
def file_names() -> frozenset[str]:
    found = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    return frozenset(found | {path.name for path in ROOT.iterdir()})


def exists(text: str, path: Path) -> bool:
    """Is there such a file or folder, from the root, the package, or the document's folder?"""
    if "/" not in text:
        return text in file_names()
    bases = (ROOT, ROOT / "flexkv_sglang", ROOT / "flexkv_sglang" / "backends", path.parent)
    return any((base / text).exists() or any(base.glob(text)) for base in bases)


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_files_and_folders_exist(path: Path) -> None:
    texts = {span for span in spans(path) if re.fullmatch(r"[\w./*-]+", span)}
    files = {text for text in texts if re.search(r"\w\.(py|md|csv|svg|cfg|toml)$", text)}
    files |= {text for text in texts if text.split("/")[0] in FOLDERS and "/" in text}
    text = "\n".join(line for _, line in outside_of_code(path))
    files |= set(re.findall(r"(?<![\w/.])docs/[\w/]+\.md", text))
    missing = {name for name in files if not name.startswith("/") and not exists(name, path)}
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_modules_exist(path: Path) -> None:
    for name in set(re.findall(r"flexkv_sglang(?:\.[A-Za-z_]\w*)+", path.read_text())):
        if name in FORMER and path.name == "CHANGELOG.md":
            continue
        place, rest = ROOT, name.split(".")
        while rest and (place / rest[0]).is_dir():
            place /= rest.pop(0)
        if rest and (place / f"{rest[0]}.py").is_file():
            place /= f"{rest.pop(0)}.py"
        module = place if place.is_file() else place / "__init__.py"
        assert not rest or rest[0] in re.findall(r"\w+", module.read_text()), name


CODE_NAME = re.compile(r"[A-Z][a-z]+[A-Z]\w*(\.\w+)?|_?[a-z]\w*_\w+(\.\w+)?(\(\))?|[A-Z]+_[A-Z_]+")


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_names_of_code_exist(path: Path) -> None:
    """Classes, functions, fields and constants in backticks. A rename that leaves a document behind is seen."""
    known = source_words()
    text = [span for span in spans(path) if CODE_NAME.fullmatch(span)]
    missing = {span for span in text if not set(re.findall(r"\w+", span)) <= known}
    assert not missing - FOREIGN_NAMES


FOREIGN_NAMES = {
    *(
        "weight_version",
        "_from_tensor",
        "_from_distributed",
        "_from_ipc",
        "bootstrap_host",
    ),  # SGLang
    *("UCX_NET_DEVICES", "MC_TCP_PROGRESS_TIMEOUT_SEC"),
    *("batch_transfer_sync_read", "get_batch_transfer_status"),  # Mooncake
    *(
        "pages_miss",
        "pages_busy",
        "pages_late",
        "pages_unknown_namespace",
    ),  # put together at run time
}
"""Names that stand in no file of ours."""


# --- links, lines, lists ---


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_and_anchors_resolve(path: Path) -> None:
    text = "\n".join(line for _, line in outside_of_code(path))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if anchor:
            heads = [line.lstrip("#") for _, line in outside_of_code(file) if line[:1] == "#"]
            assert anchor in {slug(head) for head in heads}, target


def test_sections_that_texts_name_exist() -> None:
    sources = [file for folder in FOLDERS[:4] for file in (ROOT / folder).rglob("*.py")]
    found = 0
    for path in {*DOCUMENTS, *sources} - {Path(__file__)}:
        naming = r"""\b(README|[A-Z_]+(?=\.md))(?:\.md)?, ["']([A-Z][^"'\n]+)["']"""
        for name, heading in re.findall(naming, path.read_text()):
            document = README if name == "README" else DOCS / f"{name}.md"
            assert document.is_file(), f"{named(path)}: {name}"
            heads = [line for _, line in outside_of_code(document) if line.startswith("#")]
            assert heading in {head.lstrip("# ") for head in heads}, f"{named(path)}: {heading}"
            found += 1
    assert found > 3


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_lines_of_prose_are_short(path: Path) -> None:
    long = []
    for number, line in outside_of_code(path):
        prose = re.sub(r"\]\([^)]*\)", "]", line)
        if len(prose) > PROSE_MAX and not line.lstrip().startswith("|"):
            long.append((number, len(line)))
    assert not long


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_tables_have_whole_rows_and_headings_a_line_before_them(path: Path) -> None:
    before, columns = "", 0
    for number, line in outside_of_code(path):
        if line.startswith("|"):
            count = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line)))
            assert not columns or count == columns, f"line {number}: {count} bars, not {columns}"
            columns = count
        else:
            columns = 0
        if re.match(r"#+ ", line) and number > 1:
            assert not before.strip() or before.startswith(("#", "```")), f"line {number}"
        assert not re.match(r"(<<<<<<<|=======|>>>>>>>)", line), f"line {number}: a merge"
        before = line


def test_one_page_documents_are_one_page() -> None:
    assert len((DOCS / "ARCHITECTURE.md").read_text().splitlines()) <= ARCHITECTURE_MAX
    assert len(README.read_text().splitlines()) <= README_MAX
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 100


def test_the_trails_of_the_eight_questions_are_short() -> None:
    table = rows(section(DOCS / "ARCHITECTURE.md", "## Where do I look"))
    assert len(table) == len(EIGHT)
    for (question, trail), word in zip(table, EIGHT, strict=True):
        assert word in question
        files = set(re.findall(r"`([\w/]+\.(?:py|md))`", trail))
        assert 1 < len(files) <= 6, question
        for name, inside in re.findall(r"`([\w/]+\.py)` \(`([\w.]+)`", trail):
            text = (ROOT / "flexkv_sglang" / name).read_text()
            assert set(inside.split(".")) <= set(re.findall(r"\w+", text)), f"{name}: {inside}"


def test_the_glossary_is_used() -> None:
    words = [word.strip() for row in rows(section(DOCS / "ARCHITECTURE.md", "## Words"))
             for word in row[0].split(",")]  # fmt: skip
    assert 25 <= len(words) <= 45
    assert len(set(words)) == len(words)
    text = "\n".join(
        file.read_text().lower() for folder in FOLDERS[:3] for file in (ROOT / folder).rglob("*.py")
    )
    assert not [word for word in words if not re.search(rf"\b{word}", text.replace("_", " "))]
    needed = {
        *[
            "page",
            "key",
            "slot",
            "tier",
            "owner",
            "neighbour",
            "node",
            "peer",
            "namespace",
            "journal",
            "snapshot",
        ]
    }
    needed |= {
        *[
            "tombstone",
            "adopt",
            "pin",
            "lease",
            "leaf",
            "fingerprint",
            "breaker",
            "backoff",
            "victim",
        ]
    }
    assert needed <= set(words)


def test_threads_of_ours_are_named_in_the_architecture() -> None:
    made: set[str] = set()
    for folder in FOLDERS[:2]:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and re.search(
                    r"Thread|JobPool|Executor", ast.unparse(node.func)
                ):
                    made |= set(re.findall(r"flexkv-[a-z-]*[a-z]", ast.unparse(node)))
    text = section(DOCS / "ARCHITECTURE.md", "## Threads")
    described = set(re.findall(r"`(flexkv-[a-z-]*[a-z])(?:-[A-Z]+)?`", text))
    assert described == made


def test_every_decision_is_in_the_list() -> None:
    folder = DOCS / "decisions"
    text = (folder / "README.md").read_text()
    listed = re.findall(
        r"^\| \[(\d{3})\]\((\1-[\w-]+\.md)\) \| [\w`].{20,} \|$", text, re.MULTILINE
    )
    assert [name for _, name in listed] == sorted(path.name for path in folder.glob("[0-9]*.md"))
    for number, name in listed:
        assert (folder / name).read_text().startswith(f"# {number}: "), name


def test_every_folder_of_the_product_says_what_belongs_there() -> None:
    silent = []
    for folder in FOLDERS[:2]:
        for place in {file.parent for file in (ROOT / folder).rglob("*.py")}:
            text = ast.get_docstring(ast.parse((place / "__init__.py").read_text())) or ""
            if len(text.split()) < 5 or "." not in text:
                silent.append(named(place))
    assert not silent
    assert not (ROOT / "triton_kernels" / "__init__.py").exists()
    assert "`__init__.py`" in (ROOT / "triton_kernels" / "README.md").read_text()


def test_tests_mirror_the_folders_of_the_product() -> None:
    text = section(DOCS / "TESTING.md", "## Where tests lie")
    apart = {
        name for name in re.findall(r"`tests/(\w+)`", text) if (ROOT / "tests" / name).is_dir()
    }
    assert {"kernels", "fleet", "crash", "e2e", "contract", "support"} <= apart
    folders = {file.parent.relative_to(ROOT / "tests") for file in ROOT.glob("tests/**/test_*.py")}
    lost = [
        str(place)
        for place in folders
        if not {*place.parts} & apart
        and not (ROOT / "flexkv_sglang" / place).is_dir()
        and not (ROOT / place).is_dir()
    ]
    assert not lost
