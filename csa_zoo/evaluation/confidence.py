"""How sure retrieval metrics are: bootstrap intervals of a run, and the paired comparison of two runs.

Queries of one person share their gallery images, so that they are not independent: persons are drawn with replacement,
each with all of its queries (the cluster bootstrap, Davison & Hinkley, 1997). Drawing single queries would promise too
much: Market-1501's 3,368 queries show 750 persons.
"""

from collections.abc import Sequence

import numpy as np

from csa_zoo.evaluation.retrieval import QueryResults


def confidence_intervals(
    results: QueryResults, ranks: Sequence[int] = (1, 5, 10), level: float = 0.95, samples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of the metrics. They cover the choice of persons, not the luck of a training run.

    Args:
        results: Of one run.
        ranks: The k of `rank<k>`.
        level: Coverage, in (0, 1).
        samples: Number of bootstrap samples.
        seed: Of the draw; one seed, one result.

    Returns:
        (low, high) by the names of `reid_metrics`.

    Raises:
        ValueError: If no query has a positive, or an argument is out of range.
    """
    measures = results.measures(ranks)
    means = _bootstrap(np.stack(list(measures.values()), 1), results.person_id[results.is_valid], samples, seed)
    return dict(zip(measures, _interval(means, level), strict=True))


def compare_runs(
    first: QueryResults,
    second: QueryResults,
    ranks: Sequence[int] = (1, 5, 10),
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Second minus first on the same queries: paired, because most of the variance is that some queries are hard.

    Args:
        first: Of one run.
        second: Of another, on the same queries in the same order.
        ranks: The k of `rank<k>`.
        level: Coverage of the interval, in (0, 1).
        samples: Number of bootstrap samples.
        seed: Of the draw.

    Returns:
        By the names of `reid_metrics`: `difference`, its bootstrap interval `low` and `high`, and the two-sided
        `p_value` of no difference, never below 1 / (samples + 1).

    Raises:
        ValueError: If the queries differ, or as `confidence_intervals`.
    """
    for name in ('person_id', 'camera_id', 'num_positives'):
        if not np.array_equal(getattr(first, name), getattr(second, name)):
            raise ValueError(
                f'the two runs differ in {name} ({len(first)} and {len(second)} queries): '
                'they must have been evaluated on the same queries, in the same order, and the same gallery'
            )
    before, after = first.measures(ranks), second.measures(ranks)
    differences = np.stack([after[name] - before[name] for name in before], 1)
    means = _bootstrap(differences, first.person_id[first.is_valid], samples, seed)
    tails = np.minimum((means <= 0).sum(0), (means >= 0).sum(0))
    p_values = np.minimum(1, 2 * (tails + 1) / (samples + 1))
    columns = zip(before, differences.mean(0), _interval(means, level), p_values, strict=True)
    return {
        name: {'difference': float(difference), 'low': low, 'high': high, 'p_value': float(p_value)}
        for name, difference, (low, high), p_value in columns
    }


def _bootstrap(values: np.ndarray, person_id: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(samples, metrics) means of (queries, metrics) values, over persons drawn with replacement."""
    if samples < 1:
        raise ValueError(f'samples must be at least 1, not {samples}')
    persons, person = np.unique(person_id, return_inverse=True)
    sums = np.stack([np.bincount(person, column) for column in values.T], 1)
    draws = np.random.default_rng(seed).multinomial(len(persons), np.full(len(persons), 1 / len(persons)), samples)
    return (draws @ sums) / (draws @ np.bincount(person))[:, None]


def _interval(means: np.ndarray, level: float) -> list[tuple[float, float]]:
    if not 0 < level < 1:
        raise ValueError(f'level must be between 0 and 1, not {level}')
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0).tolist()
    return list(zip(low, high, strict=True))
