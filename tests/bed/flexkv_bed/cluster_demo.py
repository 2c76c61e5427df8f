"""Three hosts on one machine, one cache: real SGLang servers share a prompt through Redis and peer to peer reads.

Hosts are network namespaces joined by a bridge, each with its own directory and its own agent; a fourth runs
Redis. Host h1 answers a prompt cold; h2 takes its pages over the network; h1's server is stopped, and h3 still
gets them, because h1's agent serves them. Then h1's cable is cut: the others compute a new prompt of h1 again,
and nothing else happens; when the cable is back, they take its pages. The last line is one JSON object; the exit
status is 0 only if all of that was so.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexkv_bed.demo import Narrator, stop, work_directory
from flexkv_bed.netns import Cluster, UnavailableError
from flexkv_bed.server import Answer, Replica, ServerFailedError, Settings, reusable_tokens
from flexkv_bed.storage import state, wait_written
from flexkv_bed.tiny_model import VOCAB_SIZE, make_tiny_model

PROMPT_TOKENS = 600
PAGE_TOKENS = 16
HOSTS = ("h1", "h2", "h3")
_REDIS_PORT = 6379
_WAIT_S = 60.0


@dataclass(slots=True)
class Story:
    """Results for the JSON line: tokens that came from storage, out of ``reusable_tokens``."""

    prompt_tokens: int = PROMPT_TOKENS
    reusable_tokens: int = reusable_tokens(PROMPT_TOKENS, PAGE_TOKENS)
    h2_storage_tokens: int = -1
    h3_storage_tokens_after_h1_stopped: int = -1
    storage_tokens_while_cut: int = -1
    seconds_while_cut: float = -1.0
    storage_tokens_after_heal: int = -1
    seconds_to_heal: float = -1.0
    outputs_equal: bool = False
    nodes: dict[str, str] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        shared = {
            self.h2_storage_tokens,
            self.h3_storage_tokens_after_h1_stopped,
            self.storage_tokens_after_heal,
        }
        return (
            shared == {self.reusable_tokens}
            and self.storage_tokens_while_cut == 0
            and self.outputs_equal
        )


class Fleet:
    """Redis and three replicas in a cluster of namespaces."""

    def __init__(self, cluster: Cluster, model: Path, work: Path) -> None:
        self.cluster = cluster
        self.work = work
        secret = work / "secret"
        secret.write_bytes(secrets.token_bytes(32))
        secret.chmod(0o600)
        self.replicas = {
            host: Replica(
                Settings(
                    model=model,
                    storage=work / host / "pages",
                    log=work / host / "server.log",
                    page_size=PAGE_TOKENS,
                    extra=self._extra(host, secret),
                    netns=cluster.name(host),
                )
            )
            for host in HOSTS
        }
        for host in HOSTS:
            (work / host / "pages").mkdir(parents=True)

    def _extra(self, host: str, secret: Path) -> dict[str, object]:
        return {
            "path": str(self.work / host / "pages"),
            "size": "128MiB",
            "redis_url": f"redis://{self.cluster.address('redis')}:{_REDIS_PORT}/0",
            "share": {
                "nid": host,
                "secret_file": str(secret),
                "run_dir": str(self.work / host / "run"),
            },
        }

    def nodes(self, host: str) -> dict[str, dict[str, Any]]:
        """Peers of a host's agent, from ``flexkv nodes``; ``breaker``: the reason why a rank does not ask it, or ""."""
        command = [sys.executable, "-P", "-m", "flexkv_sglang.cli", "nodes", "--json", "--run-dir"]
        done = subprocess.run(
            [*command, str(self.work / host / "run")], capture_output=True, timeout=30, check=False
        )
        (agent,) = json.loads(done.stdout)["agents"]
        open_at: dict[str, str] = {}
        for states in agent["breakers"].values():
            open_at |= states
        peers = agent["status"].get("peers", [])
        return {peer["nid"]: {**peer, "breaker": open_at.get(peer["nid"], "")} for peer in peers}

    def wait_pages(self, narrator: Narrator, host: str, peer: str, pages: int) -> float:
        """Wait until ``host`` knows of that many pages at ``peer``. Returns the seconds."""
        begin = time.monotonic()
        with narrator.during(f"waiting until {host} knows of {pages} pages at {peer}") as waiting:
            while (waited := time.monotonic() - begin) < _WAIT_S:
                seen = self.nodes(host).get(peer, {})
                up = seen.get("state") == "up" and not seen["breaker"]
                if up and seen["pages"] >= pages:
                    return waited
                waiting(waited)
                time.sleep(0.1)
        raise TimeoutError(f"{host} does not see {pages} pages at {peer}: {self.nodes(host)}")

    def close(self) -> None:
        for replica in self.replicas.values():
            replica.kill()


@contextmanager
def redis_server(cluster: Cluster, work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """On the host "redis", no persistence."""
    work.mkdir(parents=True, exist_ok=True)
    options = ["--port", str(_REDIS_PORT), "--bind", cluster.address("redis"), "--save", ""]
    options += ["--protected-mode", "no", "--dir", str(work)]
    with (work / "redis.log").open("ab") as log:
        process = subprocess.Popen(
            [*cluster.command("redis"), "redis-server", *options], stdout=log, stderr=log
        )
    try:
        _wait_port(cluster, cluster.address("redis"), _REDIS_PORT)
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_port(cluster: Cluster, address: str, port: int) -> None:
    until = time.monotonic() + 10
    while True:
        try:
            cluster.run("redis", lambda: socket.create_connection((address, port), 1).close())
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


def prompt(seed: int) -> list[int]:
    """Token ids, the same in every run."""
    return [
        16 + (7 * i * i + 3 * i + 1009 * seed) % (VOCAB_SIZE - 16) for i in range(PROMPT_TOKENS)
    ]


def ask(narrator: Narrator, replica: Replica, host: str, seed: int) -> Answer:
    answer = replica.generate(prompt(seed))
    narrator.say(
        f"    {host}: {answer.prompt_tokens} prompt tokens = device {answer.device} + host {answer.host} + "
        f"storage {answer.storage} + computed {answer.computed}; answer {list(answer.output_ids)}"
    )
    return answer


def start(narrator: Narrator, fleet: Fleet, host: str) -> Replica:
    replica = fleet.replicas[host]
    replica.start()
    with narrator.during(
        f"    starting a server on {host} ({fleet.cluster.address(host)})"
    ) as waiting:
        replica.wait_ready(waiting=waiting)
    return replica


def cold(narrator: Narrator, fleet: Fleet, host: str, seed: int) -> Answer:
    """Compute a new prompt and wait until its pages are in the host's storage."""
    replica = fleet.replicas[host]
    before = state(replica.settings.storage)
    answer = ask(narrator, replica, f"{host}, cold", seed)
    with narrator.during("    waiting until its pages are on disk") as waiting:
        wait_written(replica.settings.storage, before, waiting=waiting)
    return answer


def run(narrator: Narrator, fleet: Fleet) -> Story:
    """Run all steps; the caller stops the servers that are left."""
    story = Story()
    pages = story.reusable_tokens // PAGE_TOKENS
    narrator.say("1. h1 answers a prompt that nobody knows")
    h1 = start(narrator, fleet, "h1")
    first = cold(narrator, fleet, "h1", 1)
    narrator.say("2. h2, with a directory of its own, is asked the same")
    h2 = start(narrator, fleet, "h2")
    fleet.wait_pages(narrator, "h2", "h1", pages)
    second = ask(narrator, h2, "h2", 1)
    story.h2_storage_tokens = second.storage
    narrator.say("3. h1 answers a second prompt, then its server is stopped; its agent stays")
    other = cold(narrator, fleet, "h1", 2)
    h1.terminate()
    h3 = start(narrator, fleet, "h3")
    fleet.wait_pages(narrator, "h3", "h1", 2 * pages)
    third = ask(narrator, h3, "h3", 2)
    story.h3_storage_tokens_after_h1_stopped = third.storage
    narrator.say("4. h1's cable is cut; h2 is asked for h1's second prompt")
    fleet.cluster.cut("h1")
    fleet.cluster.cut("h3")  # it keeps what it read
    begin = time.monotonic()
    cut = ask(narrator, h2, "h2, h1 and h3 cut off", 2)
    story.seconds_while_cut = round(time.monotonic() - begin, 2)
    story.storage_tokens_while_cut = cut.storage
    narrator.say("5. the cables are back; h2 forgets what it computed, and is asked again")
    fleet.cluster.heal("h1")
    fleet.cluster.heal("h3")
    healed, story.seconds_to_heal = heal(narrator, h2, story.reusable_tokens)
    story.storage_tokens_after_heal = healed.storage
    story.outputs_equal = first.output_ids == second.output_ids and (
        other.output_ids == third.output_ids == cut.output_ids == healed.output_ids
    )
    story.nodes = {node_id: str(peer["state"]) for node_id, peer in fleet.nodes("h2").items()}
    return story


def heal(narrator: Narrator, replica: Replica, wanted: int) -> tuple[Answer, float]:
    """Ask until the pages come from another host again: a greeting every few seconds closes breakers."""
    begin = time.monotonic()
    while True:
        replica.clear_storage()
        replica.flush_cache()
        answer = ask(narrator, replica, "h2", 2)
        waited = time.monotonic() - begin
        if answer.storage == wanted or waited > _WAIT_S:
            return answer, round(waited, 2)
        time.sleep(1)


def tell(narrator: Narrator, work: Path) -> Story:
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(("redis", *HOSTS)))
        with narrator.during(
            "0. three hosts and a Redis in network namespaces, a tiny random Llama"
        ):
            model = make_tiny_model(work / "model")
            stack.enter_context(redis_server(cluster, work / "redis"))
        fleet = Fleet(cluster, model, work)
        stack.callback(fleet.close)
        return run(narrator, fleet)


def main() -> int:
    """0: pages were shared as promised; 1: they were not; 3: network namespaces are impossible here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, help="keep everything here (default: temporary)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    narrator = Narrator()
    work = (options.dir or work_directory()).resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        story = tell(narrator, work)
    except UnavailableError as exc:
        narrator.say(json.dumps({"ok": False, "skipped": True, "error": str(exc)}))
        return 3
    except (ServerFailedError, TimeoutError, OSError) as exc:
        narrator.say(f"failed: {exc}")
        narrator.say(json.dumps({"ok": False, "error": str(exc).splitlines()[0]}))
        return 1
    except KeyboardInterrupt:
        narrator.say(json.dumps({"ok": False, "error": "interrupted"}))
        return 130
    finally:
        if options.dir is None:
            shutil.rmtree(work, ignore_errors=True)
    narrator.say(json.dumps({"ok": story.good, **asdict(story)}))
    return 0 if story.good else 1


if __name__ == "__main__":
    sys.exit(main())
