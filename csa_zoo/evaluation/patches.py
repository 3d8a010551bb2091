"""Metrics of patch descriptors. The false positive rate at 95 % recall is PhotoTour's (Brown, Hua & Winder, 2011)."""

import math

import numpy as np
import torch
from torch import Tensor


def fpr_at_recall(distances: Tensor | np.ndarray, is_match: Tensor | np.ndarray, recall: float = 0.95) -> float:
    """Share of non-matching pairs accepted at the threshold that accepts `recall` of the matching ones (FPR95).

    The threshold is the distance of the ⌈recall · P⌉-th nearest of the P matching pairs. Non-matching pairs at
    exactly this distance count as accepted: ties count against the descriptor, so that constant descriptors score 1.

    Args:
        distances: (P + N,) distances, small for alike; compared in float64.
        is_match: (P + N,) truth of each pair.
        recall: In (0, 1].

    Returns:
        The rate in [0, 1] (papers print it in %).

    Raises:
        ValueError: If shapes differ, a distance is NaN, a kind of pair is absent, or `recall` is out of range.
    """
    distances = torch.as_tensor(distances).detach().to('cpu', torch.float64)
    is_match = torch.as_tensor(is_match).cpu()
    if distances.ndim != 1 or distances.shape != is_match.shape:
        raise ValueError(
            f'distances and is_match must be of one shape (pairs,), not {tuple(distances.shape)} and '
            f'{tuple(is_match.shape)}'
        )
    if not 0 < recall <= 1:
        raise ValueError(f'recall is {recall}, but it must be above 0 and at most 1')
    if distances.isnan().any():
        raise ValueError(f'{int(distances.isnan().sum())} of {len(distances)} distances are NaN: check the descriptors')
    is_match = is_match.bool()
    matching, others = distances[is_match], distances[~is_match]
    if not len(matching) or not len(others):
        raise ValueError(
            f'{len(matching)} matching and {len(others)} non-matching pairs: the rate needs at least one of each'
        )
    # The product is rounded because 0.07 * 100 is a little above 7 in binary, and its ceiling would be 8.
    rank = max(1, math.ceil(round(recall * len(matching), 9)))
    threshold = matching.kthvalue(rank).values
    return (others <= threshold).double().mean().item()
