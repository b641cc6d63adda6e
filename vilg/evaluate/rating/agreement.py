"""How far raters agree, and how sure a mean is."""

from collections.abc import Sequence

import numpy as np

from vilg.evaluate.rating.kinds import Level

RESAMPLES = 10_000
_CHUNK = 500  # resamples at once


def krippendorff_alpha(units: Sequence[Sequence[float]], level: Level) -> float | None:
    """Krippendorff's alpha: 1 is full agreement, 0 that of chance (K. Krippendorff, Computing Krippendorff's
    Alpha-Reliability, 2011, section C).

    units: the values that each rated thing got, in any number; those with fewer than two say nothing. level: squared
    distances, or whether values differ. None if nothing was rated twice or all values are the same.
    """
    pairable = [np.asarray(values, np.float64) for values in units if len(values) > 1]
    if not pairable:
        return None
    everything = np.concatenate(pairable)
    observed = sum(_disagreement(values, level) / (len(values) - 1) for values in pairable) / len(everything)
    expected = _disagreement(everything, level) / (len(everything) * (len(everything) - 1))
    return 1 - observed / expected if expected > 0 else None


def _disagreement(values: np.ndarray, level: Level) -> float:
    """Sum over ordered pairs of values of their distance; from counts, so that many values cost little."""
    kinds, counts = np.unique(values, return_counts=True)
    apart = kinds[:, None] - kinds[None, :]
    distance = apart**2 if level == "interval" else (apart != 0).astype(np.float64)
    return float(counts @ distance @ counts)


def equal_pairs(units: Sequence[Sequence[float]]) -> float | None:
    """Share of pairs of raters that gave the same thing the same value; None without a pair."""
    same = pairs = 0
    for values in units:
        counts = np.unique(np.asarray(values), return_counts=True)[1]
        same += int((counts * (counts - 1)).sum())
        pairs += len(values) * (len(values) - 1)
    return same / pairs if pairs else None


def mean_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): low and high are the 2.5 and 97.5 percentiles of the means of resampled values (Efron's
    percentile bootstrap), which asks for no shape of the distribution. values: one or more, one an item."""
    array = np.asarray(values, np.float64)
    generator = np.random.Generator(np.random.Philox(seed))
    means = np.concatenate(
        [array[generator.integers(0, len(array), (_CHUNK, len(array)))].mean(1) for _ in range(RESAMPLES // _CHUNK)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)
