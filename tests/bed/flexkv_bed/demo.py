"""The demo for a laptop: two SGLang servers share pages on a disk, and a killed one gets them back.

Replica A answers a prompt cold and backs its pages up. Replica B, a server of its own with empty caches,
answers the same prompt from A's pages. Then A is killed with SIGKILL, started again, and answers from
storage too. The last line of the output is one JSON object; the exit status is 0 only when both took every
page that SGLang can reuse from storage and all answers are equal.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from flexkv_bed import REPLACED_ON_CPU
from flexkv_bed.server import (
    IO_BACKEND,
    Answer,
    Replica,
    ServerFailedError,
    Settings,
    reusable_tokens,
)
from flexkv_bed.storage import bytes_on_disk, files, state, wait_written
from flexkv_bed.tiny_model import VOCAB_SIZE, make_tiny_model

PROMPT_TOKENS = 600
TICK_S = 5.0
_MODE = re.compile(r"io_engine=(\w+) o_direct=(true|false)")


@dataclass(slots=True)
class Outcome:
    """Results of the demo, for the JSON line."""

    prompt_tokens: int
    reusable_tokens: int
    replica_b_storage_tokens: int
    restart_storage_tokens: int
    outputs_equal: bool
    io_engine: str
    o_direct: bool
    bytes_on_disk: int
    pages_path: str

    @property
    def good(self) -> bool:
        from_storage = {self.replica_b_storage_tokens, self.restart_storage_tokens}
        return from_storage == {self.reusable_tokens} and self.outputs_equal

    def line(self) -> str:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({"ok": self.good, **fields})


class Narrator:
    """Lines on stdout; while something takes time, a ticking counter (terminal) or a line every 5 s."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._next_tick_s = TICK_S

    def say(self, text: str) -> None:
        print(text, flush=True)

    @contextmanager
    def during(self, what: str) -> Iterator[Callable[[float], None]]:
        """Announce a wait; yields a function that takes the seconds waited."""
        self._next_tick_s = TICK_S
        self.say(f"{what} ...")
        begin = time.monotonic()
        yield self._tick
        clear = "\r\x1b[K" if self._live else ""
        self.say(f"{clear}    done in {time.monotonic() - begin:.1f} s")

    def _tick(self, waited_s: float) -> None:
        if self._live:
            print(f"\r    {waited_s:4.0f} s", end="", flush=True)
        elif waited_s >= self._next_tick_s:
            self._next_tick_s += TICK_S
            self.say(f"    {waited_s:.0f} s")


def prompt() -> list[int]:
    """Token ids, the same in every run; the first 16 are none of the tokenizer's special ones."""
    return [
        16 + (7 * position * position + 3 * position) % (VOCAB_SIZE - 16)
        for position in range(PROMPT_TOKENS)
    ]


def ask(narrator: Narrator, replica: Replica, who: str) -> Answer:
    """One request, and the sources of its prompt tokens."""
    answer = replica.generate(prompt())
    narrator.say(
        f"    {who}: {answer.prompt_tokens} prompt tokens = device {answer.device} + host {answer.host} "
        f"+ storage {answer.storage} + computed {answer.computed}; answer {list(answer.output_ids)}"
    )
    return answer


def start(narrator: Narrator, replica: Replica, what: str) -> None:
    replica.start()
    with narrator.during(f"{what} (port {replica.port}, log {replica.settings.log})") as waiting:
        replica.wait_ready(waiting=waiting)


def cold_answer(narrator: Narrator, replica: Replica, pages: Path) -> Answer:
    """A's first answer, computed in full, and its pages in storage.

    In a directory of an earlier run the prompt is there already: it is cleared first, and asked again.
    """
    before = state(pages)
    answer = ask(narrator, replica, "A, cold")
    if answer.storage:
        narrator.say(
            "    the directory held these pages from an earlier run: clearing them, asking again"
        )
        replica.clear_storage()
        replica.flush_cache()
        before = state(pages)
        answer = ask(narrator, replica, "A, cold")
    with narrator.during("waiting until A's pages are in storage") as waiting:
        wait_written(pages, before, waiting=waiting)
    return answer


def run(narrator: Narrator, a: Replica, b: Replica) -> Outcome:
    """Run all steps with two replicas that are not running yet; the caller kills the processes that are left."""
    pages = a.settings.storage
    start(narrator, a, "1. starting replica A")
    cold = cold_answer(narrator, a, pages)
    engine, o_direct = io_mode(a.log_text())
    path = pages_path(pages)
    narrator.say(
        f"    pages are in {path}: I/O engine {engine}, O_DIRECT {'yes' if o_direct else 'no'}, "
        f"{bytes_on_disk(pages):,} bytes on disk (slots are reserved ahead)"
    )
    start(
        narrator,
        b,
        "2. starting replica B on the same directory, its own device and host tiers empty",
    )
    warm = ask(narrator, b, "B, first request")
    narrator.say("3. killing replica A: SIGKILL to all its processes")
    a.kill()
    start(narrator, a, "4. starting replica A again")
    again = ask(narrator, a, "A, first request after the crash")
    return Outcome(
        prompt_tokens=cold.prompt_tokens,
        reusable_tokens=reusable_tokens(cold.prompt_tokens, a.settings.page_size),
        replica_b_storage_tokens=warm.storage,
        restart_storage_tokens=again.storage,
        outputs_equal=cold.storage == 0 and cold.output_ids == warm.output_ids == again.output_ids,
        io_engine=engine,
        o_direct=o_direct,
        bytes_on_disk=bytes_on_disk(pages),
        pages_path=str(path),
    )


def io_mode(log: str) -> tuple[str, bool]:
    """The log line of flexkv about its I/O."""
    found = _MODE.search(log)
    return (found[1], found[2] == "true") if found else ("unknown", False)


def pages_path(storage: Path) -> Path:
    """The directory of the slot files; one model in one layout has one."""
    holders = {path.parent for path in files(storage) if path.suffix == ".slots"}
    return holders.pop() if len(holders) == 1 else storage


def work_directory() -> Path:
    """A fresh directory on a disk: a temporary folder in memory would not test direct I/O."""
    usual = Path(tempfile.gettempdir())
    in_memory = {
        Path(part.mountpoint) for part in psutil.disk_partitions(all=True) if part.fstype == "tmpfs"
    }
    if in_memory & {usual, *usual.parents} - {Path("/")}:
        return Path(tempfile.mkdtemp(prefix="flexkv-demo-", dir="/var/tmp"))
    return Path(tempfile.mkdtemp(prefix="flexkv-demo-"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Two SGLang servers on a CPU share pages through flexkv."
    )
    parser.add_argument(
        "--dir", type=Path, help="keep everything here (default: temporary, removed at the end)"
    )
    parser.add_argument("--keep", action="store_true", help="do not remove the temporary directory")
    parser.add_argument("--page-size", type=int, default=16, choices=(1, 16, 64))
    parser.add_argument("--layout", default="page_first", choices=tuple(IO_BACKEND))
    return parser.parse_args()


def tell(narrator: Narrator, options: argparse.Namespace, work: Path) -> Outcome:
    """Prepare the replicas, run, and leave no process behind."""
    with narrator.during("0. making a tiny random Llama"):
        model = make_tiny_model(work / "model")
    storage = work / "pages"
    storage.mkdir(parents=True, exist_ok=True)
    a, b = (
        Replica(
            Settings(
                model=model,
                storage=storage,
                log=work / f"replica-{name}.log",
                page_size=options.page_size,
                layout=options.layout,
            )
        )
        for name in "ab"
    )
    try:
        return run(narrator, a, b)
    finally:
        a.kill()
        b.kill()


def stop(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM like Ctrl-C: the servers have to go first."""
    raise KeyboardInterrupt


def main() -> int:
    """0 when the pages came from storage as promised, 1 when not, 130 when interrupted."""
    options = arguments()
    signal.signal(signal.SIGTERM, stop)
    narrator = Narrator()
    work = (options.dir or work_directory()).resolve()
    narrator.say("Two stock SGLang servers on this machine's CPU, sharing KV pages through flexkv.")
    narrator.say(
        "Real: SGLang's server, scheduler, radix tree, cache controller, host pools; all of flexkv."
    )
    narrator.say(f"Replaced: {REPLACED_ON_CPU}. Times here say nothing about a GPU.")
    try:
        outcome = tell(narrator, options, work)
    except (ServerFailedError, TimeoutError, OSError) as exc:
        narrator.say(f"failed: {exc}")
        narrator.say(json.dumps({"ok": False, "error": str(exc).splitlines()[0]}))
        return 1
    except KeyboardInterrupt:
        narrator.say(json.dumps({"ok": False, "error": "interrupted"}))
        return 130
    finally:
        if options.dir is None and not options.keep:
            shutil.rmtree(work, ignore_errors=True)
    narrator.say(verdict(outcome))
    narrator.say(outcome.line())
    return 0 if outcome.good else 1


def verdict(outcome: Outcome) -> str:
    return (
        f"B took {outcome.replica_b_storage_tokens} and A after the crash {outcome.restart_storage_tokens} of "
        f"{outcome.reusable_tokens} reusable tokens from storage (a last part page is never cached); "
        f"answers {'are equal' if outcome.outputs_equal else 'DIFFER'}"
    )


if __name__ == "__main__":
    sys.exit(main())
