"""95 % intervals: how far a measured value may lie from what endless testing would give."""

import math

import numpy as np

Z = 1.959964  # 97.5 % quantile of the normal distribution


def wilson(right: float, n: int) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927): sound near 0 and 1 and for small n.

    Args:
        right: successes; n: trials, at least 1.
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"got {right} right of {n}, expected at least one trial and 0 to n right")
    share = right / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # At 0 and n the interval ends at the share itself, but for the last bit.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def bootstrap(
    scores: list[float], weights: list[float], generator: np.random.Generator, draws: int = 2000
) -> tuple[float, float]:
    """Percentile interval of a weighted mean, the items drawn again with replacement.

    Word error rates of sentences are no proportion (errors come in clumps, and may exceed 1), so
    the sentences are resampled (Bisani and Ney 2004).

    Args:
        scores, weights: of each item; for word error rates the rate and the words of a sentence.
        generator: source of the draws.
        draws: resampled means.
    """
    score, weight = np.asarray(scores, dtype=float), np.asarray(weights, dtype=float)
    if not score.size or score.shape != weight.shape:
        raise ValueError(f"got {score.size} scores and {weight.size} weights, expected as many")
    chosen = generator.integers(0, score.size, size=(draws, score.size))
    means = (score * weight)[chosen].sum(1) / weight[chosen].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
