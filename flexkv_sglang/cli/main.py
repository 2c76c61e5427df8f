"""Arguments and exit codes of ``flexkv``. Each command is imported when it runs, so that ``--help`` is fast.

Exit codes: 0 fine, 1 problems found (check: problems that are not repaired; gc: files that could not be
removed; doctor: causes found; anything that could not be read), 2 usage. An error is one line, never a traceback.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from flexkv_sglang.cli.bench import PEERS, run_bench
from flexkv_sglang.cli.output import complain
from flexkv_sglang.config.parsers import shown
from flexkv_sglang.errors import ConfigError, FlexKVError
from flexkv_sglang.printable import printable

_AGE = re.compile(r"^(\d+(?:\.\d+)?)([smhd])$")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Arguments(argparse.ArgumentParser):
    """A parser whose errors show no control characters and no passwords."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` without the program's name. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that this terminal cannot show
    arguments = _parser().parse_args(argv)
    try:
        code = _checked(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has closed it
        _forget_output()
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as exc:  # noqa: BLE001 - the boundary of the command
        _forget_output()
        complain(_said(exc))
        return 2 if isinstance(exc, ConfigError) else 1
    return code


def _checked(arguments: argparse.Namespace) -> int:
    if "directory" in arguments and arguments.command != "doctor":
        try:
            there = arguments.directory.is_dir()
        except OSError as exc:  # a folder above it, or an endless name
            complain(f"{arguments.directory}: {exc.strerror or exc}")
            return 1
        except ValueError as exc:
            complain(f"{str(arguments.directory)!r}: {exc}")
            return 2
        if not there:
            complain(f"{arguments.directory} is not a directory")
            return 2
    return _run(arguments)


def _said(exc: Exception) -> str:
    if isinstance(exc, PermissionError):
        return f"{exc.filename or 'a file'}: {exc.strerror or exc}; the files belong to the servers' user"
    if isinstance(exc, OSError):
        return (
            f"{exc.filename}: {exc.strerror or exc}" if exc.filename else str(exc.strerror or exc)
        )
    if isinstance(exc, FlexKVError):
        return str(exc)
    where = exc.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    at = "" if where is None else f" ({where.tb_frame.f_code.co_filename}:{where.tb_lineno})"
    return f"a fault of this command, please report it: {type(exc).__name__}: {exc}{at}"


def _forget_output() -> None:
    """What is still buffered would fail once more at the end of the process, with a message of Python's."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if null > 2:
            os.close(null)


def _doctor(arguments: argparse.Namespace) -> int:
    """Doctor alone accepts a directory that is missing or unreadable: that is a finding."""
    from flexkv_sglang.cli.doctor.command import run_doctor

    try:
        wrong = arguments.directory is not None and arguments.directory.is_file()
    except (OSError, ValueError):
        wrong = False
    if wrong:
        complain(f"{arguments.directory} is not a directory")
        return 2
    return run_doctor(arguments.directory, arguments.url, as_json=arguments.json)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "doctor":
        return _doctor(arguments)
    if arguments.command == "agent":
        from flexkv_sglang.cli.agent import run_agent

        return run_agent(
            arguments.config,
            arguments.run_dir,
            for_ranks=arguments.for_ranks,
            succeed=arguments.succeed,
        )
    if arguments.command == "nodes":
        from flexkv_sglang.cli.nodes import run_nodes

        return run_nodes(arguments.run_dir, as_json=arguments.json)
    if arguments.command == "check":
        from flexkv_sglang.cli.directory.check import run_check

        return run_check(arguments.directory, repair=arguments.repair, as_json=arguments.json)
    if arguments.command == "stats":
        from flexkv_sglang.cli.directory.stats import run_stats

        return run_stats(arguments.directory, as_json=arguments.json)
    if arguments.command == "bench":
        return run_bench(
            arguments.directory,
            page_bytes=arguments.page_bytes,
            seconds=arguments.seconds,
            against=arguments.against,
            as_json=arguments.json,
        )
    from flexkv_sglang.cli.directory.gc import Selection, run_gc

    selection = Selection(arguments.namespace, arguments.older_than)
    return run_gc(
        arguments.directory,
        selection,
        dry_run=arguments.dry_run,
        yes=arguments.yes,
        as_json=arguments.json,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="flexkv",
        description="Inspect and maintain the directories where FlexKV for SGLang stores KV cache pages.",
        epilog="Exit codes: 0 fine, 1 problems found, 2 usage.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = _command(commands, "check", "verify journals, snapshots and every page's checksum")
    check.add_argument(
        "--repair",
        action="store_true",
        help="drop bad pages, torn tails and leftovers of owners that are dead",
    )
    _command(commands, "stats", "show stored pages, their owners and hit rates")
    gc = _command(commands, "gc", "remove files of dead owners")
    which = gc.add_mutually_exclusive_group()
    which.add_argument("--namespace", metavar="N", help="dead owners of this namespace (a prefix)")
    which.add_argument(
        "--older-than", metavar="AGE", type=_age, help="untouched for this time: 90s, 30m, 12h, 7d"
    )
    gc.add_argument("--dry-run", action="store_true", help="only show the files to remove")
    gc.add_argument("--yes", action="store_true", help="do not ask")
    _add_doctor(commands)
    _add_bench(commands)
    _add_fleet(commands)
    return parser


def _add_fleet(commands: argparse._SubParsersAction[Arguments]) -> None:
    agent = commands.add_parser(
        "agent",
        help="share this node's pages with other nodes",
        description="Runs this node's agent in the foreground until SIGTERM. Servers start an agent "
        "automatically; this one stays when no server is left. If an agent runs already, this one ends at once.",
    )
    agent.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="FILE",
        help="the JSON file of the servers' extra config",
    )
    nodes = commands.add_parser(
        "nodes",
        help="list the nodes that this one shares pages with",
        description="Lists the nodes that this node's agents see: their pages, how far behind they are, and trouble.",
    )
    nodes.add_argument("--json", action="store_true", help="one JSON object as the last line")
    for parser in (agent, nodes):
        parser.add_argument(
            "--run-dir", type=Path, metavar="DIR", help="share.run_dir, if it is configured"
        )
    agent.add_argument("--for-ranks", action="store_true", help=argparse.SUPPRESS)
    agent.add_argument("--succeed", default="", help=argparse.SUPPRESS)


def _add_doctor(commands: argparse._SubParsersAction[Arguments]) -> None:
    text = "find out why hits are zero, and the remedy"
    doctor = commands.add_parser(
        "doctor",
        help=text,
        description="Finds out why hits are zero: the likeliest cause first, with numbers and a remedy. "
        "Run it as the servers' user, in their environment. Writes and removes a file of 4 KiB in DIRECTORY.",
    )
    doctor.add_argument(
        "directory",
        type=Path,
        nargs="?",
        help="a configured 'path' (default: the server's, else ~/.cache/flexkv-sglang)",
    )
    doctor.add_argument(
        "--url", type=_url, help="address of a running server, such as http://127.0.0.1:30000"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object as the last line")


def _add_bench(commands: argparse._SubParsersAction[Arguments]) -> None:
    bench = commands.add_parser("bench", help="measure a disk", description="Measure a disk.")
    subjects = bench.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    ssd = subjects.add_parser(
        "ssd",
        help="pages through the storage backend, beside fio, SGLang's file and NIXL",
        description="Writes and reads pages through the storage backend with checksums, and in turns with other tools. "
        "Takes 0.5 GiB per tool in DIRECTORY and removes it. Tools that are not installed are left out.",
    )
    ssd.add_argument(
        "directory",
        type=Path,
        nargs="?",
        default=Path(),
        help="on the disk (default: here)",
    )
    ssd.add_argument("--page-bytes", type=_page_bytes, nargs="+", default=[1 << 20], metavar="N")
    ssd.add_argument("--seconds", type=float, default=60.0, help="approximate time per page size")
    ssd.add_argument("--against", type=_peers, default=list(PEERS), metavar="A,B")
    ssd.add_argument(
        "--json", action="store_true", help="no table: one JSON object as the last line"
    )


def _url(text: str) -> str:
    if not re.match(r"^https?://[^/\s]+", text):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not an address such as http://127.0.0.1:30000"
        )
    if "@" in text.split("/")[2]:
        raise argparse.ArgumentTypeError(f"{shown(text)} has a user name or password; without it")
    return text.rstrip("/")


def _page_bytes(text: str) -> int:
    if not text.isdigit() or int(text) < 8192 or int(text) % 8192:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 8192 bytes")
    return int(text)


def _peers(text: str) -> list[str]:
    found = text.split(",")
    unknown = sorted(set(found) - set(PEERS))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: unknown. Valid: {', '.join(PEERS)}"
        )
    return found


def _command(
    commands: argparse._SubParsersAction[Arguments], name: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("directory", type=Path, help="a configured 'path', or one namespace in it")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser


def _age(text: str) -> float:
    match = _AGE.match(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age such as 90s, 30m, 12h or 7d")
    return float(match[1]) * _SECONDS[match[2]]
