"""What SGLang may use of a partly successful answer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexkv_sglang.prefix import cut_after_first_failure, leading_run

flags = st.lists(st.booleans())


@given(flags)
def test_leading_run_counts_up_to_the_first_false(values: list[bool]) -> None:
    run = leading_run(values)
    assert all(values[:run])
    assert run == len(values) or not values[run]


@given(flags)
def test_nothing_is_true_behind_a_hole(values: list[bool]) -> None:
    cut = cut_after_first_failure(values)
    assert len(cut) == len(values)
    assert sum(cut) == leading_run(values) == leading_run(cut)
