"""Chance: each thing has random numbers of its own, whatever else is drawn; and what is drawn from them."""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

Choice = TypeVar('Choice')

_STREAMS = ('itinerary', 'person', 'stranger', 'camera', 'track', 'person image', 'junk image', 'distractor image')


def generator(seed: int, stream: str, *key: int) -> np.random.Generator:
    """Random numbers that belong to (seed, stream, key) alone. A stream's keys must all have one length."""
    return np.random.default_rng(np.random.SeedSequence((seed, _STREAMS.index(stream), *key)))


def choose(rng: np.random.Generator, weights: Mapping[Choice, int]) -> Choice:
    """A key of `weights`, with probability in proportion to its weight."""
    keys = list(weights)
    cumulative = np.cumsum(list(weights.values()))
    return keys[int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side='right'))]


def clipped_normal(rng: np.random.Generator, mean: float, deviation: float, low: float, high: float) -> float:
    """A normal deviate, moved to the nearer limit where it lies outside of low..high."""
    return min(max(float(rng.normal(mean, deviation)), low), high)
