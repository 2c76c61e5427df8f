"""Members: a silent source changes nothing, a missing node is down. Snapshots: when they are asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexkv_sglang.backends.fleet.members.follower import (
    ASK_AGAIN_MAX_S,
    ASK_AGAIN_S,
    NEW_EPOCH_S,
    SnapshotQueue,
)
from flexkv_sglang.backends.fleet.members.members import MEMBERS_MAX, REMOVE_AFTER_S, Members
from flexkv_sglang.backends.fleet.vocabulary import NodeId, NodeInfo

A = NodeInfo(NodeId("a"), 1, "a:1")
B = NodeInfo(NodeId("b"), 2, "b:1")
FEED = ("ns", NodeId("a"))


def up(members: Members) -> set[str]:
    return {node_id for node_id, member in members.known.items() if member.up}


def test_a_missing_node_is_down_and_removed_after_a_minute() -> None:
    members = Members()
    members.update_members("redis", [A, B], 0.0)
    members.update_members("redis", [B], 10.0)
    assert up(members) == {"b"}
    assert members.tick(10.0 + REMOVE_AFTER_S - 1) == []
    assert members.tick(10.0 + REMOVE_AFTER_S) == ["a"]
    assert set(members.known) == {"b"}


def test_a_node_that_comes_back_is_up_again() -> None:
    members = Members()
    members.update_members("redis", [A], 0.0)
    members.update_members("redis", [], 1.0)
    members.update_members("redis", [replace(A, epoch=9)], 2.0)
    assert members.known[A.node_id].info.epoch == 9
    assert members.tick(1000.0) == []


def test_a_silent_source_changes_nothing() -> None:
    members = Members()
    members.update_members("redis", [A], 0.0)
    assert members.tick(1e6) == []
    assert up(members) == {"a"}


def test_a_list_that_lost_members_takes_no_node_down_for_a_while() -> None:
    members = Members()
    members.update_members("redis", [A, B], 0.0)
    members.update_members("redis", [B], 10.0, grace_s=5.0)
    members.update_members("redis", [B], 14.0)
    assert up(members) == {"a", "b"}
    members.update_members("redis", [B], 15.0)
    assert up(members) == {"b"}


def test_one_source_is_enough_and_a_nodes_own_answer_counts_more() -> None:
    members = Members()
    members.update_members("redis", [A], 0.0)
    members.update_members("peer x", [replace(A, epoch=5)], 1.0)
    assert members.known[A.node_id].info.epoch == 5
    members.update_members("redis", [], 2.0)
    assert up(members) == {"a"}
    members.update_members("peer x", [], 3.0)
    assert up(members) == set()


def test_members_are_bounded() -> None:
    members = Members()
    many = [NodeInfo(NodeId(f"n{number}"), 1, "a:1") for number in range(MEMBERS_MAX + 5)]
    members.update_members("redis", many, 0.0)
    assert len(members.known) == MEMBERS_MAX
    assert members.refused == 5


@pytest.fixture
def queue() -> SnapshotQueue:
    return SnapshotQueue(lambda low, high: 0.0)


def test_a_snapshot_is_asked_for_once_at_a_time(queue: SnapshotQueue) -> None:
    queue.want(FEED, 0.0)
    assert queue.take(0.0) == FEED
    queue.want(FEED, 0.1)
    assert queue.take(100.0) is None
    queue.done(FEED, failed=False)
    queue.want(FEED, 1.0)
    assert queue.take(ASK_AGAIN_S - 0.1) is None
    assert queue.take(ASK_AGAIN_S) == FEED


def test_a_peer_that_does_not_answer_is_asked_less_often(queue: SnapshotQueue) -> None:
    now, pauses = 0.0, []
    for _ in range(5):
        queue.want(FEED, now)
        due = now + 1e-9
        while queue.take(due) is None:
            due += 0.5
        pauses.append(due - now)
        now = due
        queue.done(FEED, failed=True)
    assert pauses[0] < 0.1
    assert pauses[1:] == sorted(pauses[1:])
    assert ASK_AGAIN_S < pauses[2] < pauses[-1] + 1 <= ASK_AGAIN_MAX_S + 2


def test_a_new_epoch_is_asked_for_sooner(queue: SnapshotQueue) -> None:
    queue.want(FEED, 0.0)
    assert queue.take(0.0) == FEED
    queue.want(FEED, 0.2, new_epoch=True)  # while the old one is under way
    queue.done(FEED, failed=True)
    queue.want(FEED, 0.3)
    assert queue.take(NEW_EPOCH_S) == FEED


def test_many_nodes_do_not_ask_at_once() -> None:
    spread: list[float] = []
    queue = SnapshotQueue(lambda low, high: spread.append(high) or low)
    queue.want(FEED, 0.0)
    queue.nodes = 100
    queue.want(("ns", NodeId("b")), 0.0)
    assert spread == [0.5, 5.0]
