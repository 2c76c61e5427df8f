"""The table of states and events in the docstring is the one that the code follows."""

from __future__ import annotations

import pytest

from flexkv_sglang.pools.state import Event, State, StoresState

ROWS = {
    words[0]: [State[word] for word in words[1:5]]
    for words in map(str.split, (StoresState.__doc__ or "").splitlines())
    if words and words[0] in Event.__members__
}


def test_every_event_has_a_row() -> None:
    assert ROWS.keys() == Event.__members__.keys()


@pytest.mark.parametrize("event", list(Event))
def test_events_lead_to_the_states_of_the_table(event: Event) -> None:
    for before, after in zip(State, ROWS[event.name], strict=True):
        state = StoresState()
        state.start(before)
        assert state.apply(event) is after
        assert state.now is after


def test_a_state_begins_closed() -> None:
    assert StoresState().now is State.CLOSED
