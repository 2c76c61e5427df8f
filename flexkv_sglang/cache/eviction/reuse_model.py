"""ReuseTimes: intervals between two uses of a page, per class, and the value of keeping a page. Pure.

An interval that ends with a use is *observed*. One that is not over, or whose end cannot be seen any more, is
*censored*: it is longer than the page's age. Both go into a hazard per age (the estimate of Kaplan and Meier,
"Nonparametric Estimation from Incomplete Observations", 1958). Without the censored ones a class would look dead at
every age that few of its pages have had the time to reach.
"""

from __future__ import annotations

import numpy as np

from flexkv_sglang.types import F64, I64

CLASSES = 4
BUCKETS = 64  # two per octave of age
FADE = 0.95  # of the learned counts, at each ``learn``
_PRIOR_PAGES = 50.0  # pseudo-count of the prior, in pages


class ReuseTimes:
    """``observed``, ``censored``: counts since the last ``learn``, added by the policy at ``class << 6 | bucket``."""

    def __init__(self) -> None:
        self.observed = [0] * (CLASSES * BUCKETS)
        self.censored = [0] * (CLASSES * BUCKETS)
        self._observed = np.zeros((CLASSES, BUCKETS))
        self._censored = np.zeros((CLASSES, BUCKETS))
        self.learned = False
        # Before the first ``learn``: the older, the less.
        self.value = [[1.0 / (bucket + 1) for bucket in range(BUCKETS)] for _ in range(CLASSES)]
        """By class and bucket of age: hits to expect per slot and tick."""

    def learn(self, waiting: F64) -> None:
        """Compute ``value`` again. ``waiting``: pages not used again yet, float ``[classes, buckets]``."""
        shape = (CLASSES, BUCKETS)
        self._observed = self._observed * FADE + np.array(self.observed, float).reshape(shape)
        self._censored = self._censored * FADE + np.array(self.censored, float).reshape(shape)
        self.observed, self.censored = [0] * (CLASSES * BUCKETS), [0] * (CLASSES * BUCKETS)
        open_ended = self._censored + waiting
        beyond = np.cumsum((self._observed + open_ended)[:, ::-1], axis=1)[:, ::-1]
        # Half of the intervals censored within a bucket count as longer than it.
        reached = beyond - 0.5 * open_ended
        share = _PRIOR_PAGES / (beyond[:, 0].sum() + 1.0)
        observed = self._observed + self._observed.sum(0) * share
        reached = reached + reached.sum(0) * share
        hazard = np.minimum(observed / np.maximum(reached, 0.5), 1.0)
        self.value = [best_rates(row) for row in hazard]
        self.learned = True


def bucket_of(age: int) -> int:
    """Bucket of an age in ticks, two per octave: the bit length and the bit below the highest."""
    bits = age.bit_length()
    return min(2 * bits + (age >> (bits - 2) & 1), BUCKETS - 1) if bits > 1 else 2 * bits


def buckets_of(ages: I64) -> I64:
    """``bucket_of`` of each."""
    mantissa, bits = np.frexp(ages.astype(float))
    both: I64 = 2 * bits.astype(np.int64) + ((mantissa >= 0.75) & (bits > 1))
    return np.minimum(both, BUCKETS - 1)


def _widths() -> F64:
    edges = [0.0, 0.5, 1.0, 1.5]  # ages 0 and 1 are buckets 0 and 2; 1 and 3 stay empty
    for bits in range(2, BUCKETS // 2 + 1):
        edges += [2.0 ** (bits - 1), 1.5 * 2.0 ** (bits - 1)]
    return np.diff(np.array(edges[: BUCKETS + 1]))


_WIDTH = _widths()


def best_rates(hazard: F64) -> list[float]:
    """Per age bucket: the largest (next uses) / (slot ticks) over all later ages to stop keeping at.

    ``hazard``: of the intervals that reach a bucket, the share that ends in it, float ``[buckets]``.
    """
    alive = np.concatenate(([1.0], np.cumprod(1.0 - hazard)))
    before = 1.0 - alive
    kept = np.maximum(alive[:-1] * (1.0 - 0.5 * hazard), 1e-9)
    spent = np.concatenate(([0.0], np.cumsum(kept * _WIDTH)))
    # Intervals that end before they begin are clamped to 0 and never win.
    rate = before[1:] - before[:-1, None]
    cost = spent[1:] - spent[:-1, None]
    np.maximum(rate, 0.0, out=rate)
    np.maximum(cost, 1e-12, out=cost)
    rate /= cost
    best: list[float] = rate.max(1).tolist()
    return best
