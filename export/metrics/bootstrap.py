"""How sure a mean over clips is: a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 10_000
CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile interval of the mean, by resampling clips (Efron 1979); None for a single clip.

    Of the differences between two networks, clip by clip, this is the paired interval: clips vary more than
    networks do. Of very few clips it is coarse, and rather too narrow.
    """
    if len(values) < 2:
        return None
    interval = bootstrap(
        (np.asarray(values, float),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)
