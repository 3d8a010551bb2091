"""Metrics of patch descriptors.

The false positive rate at 95 % recall is PhotoTour's (Brown, Hua & Winder, 2011). The mean average precision of ratios
in each image is that of "PhotoTour revisited" (Mishkin, 2020).
"""

import math

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from csa_zoo.evaluation.distances import Proximity, as_matrix


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


def average_precision(negatives_before: Tensor, positives: int) -> tuple[Tensor, Tensor]:
    """Average precision, from the number of negatives that precede each positive in a ranking.

    Args:
        negatives_before: (..., F) of the F positives that are found, in the order of the ranking.
        positives: Of these and of those that are not found, at least 1.

    Returns:
        By trapezoids under the curve of precision over recall, which begins at a precision of 1, and by steps (the mean
        precision at the positives), each (...,) float64.
    """
    before = negatives_before.double()
    found = torch.arange(before.shape[-1], device=before.device)
    precision = (found + 1) / (found + 1 + before)
    previous = (found / (found + before)).nan_to_num(1.0)  # 0 of 0 is where the curve begins
    return (precision + previous).sum(-1) / (2 * positives), precision.sum(-1) / positives


def phototour_ratio_map(
    descriptors: Tensor | np.ndarray, point_ids: Tensor | np.ndarray, image_ids: Tensor | np.ndarray
) -> float:
    """Mean average precision of matching by Lowe's ratio, as in "PhotoTour revisited"; in agreement with real matching.

    Within each reference image every ordered pair of patches of one point is compared with the first patch's nearest
    patch of another point. The pair is right if it is nearer, and pairs are ranked by the ratio of the smaller distance
    to the larger. The mean is over images; those without a pair, or with one point only, are left out. Ties count
    against the descriptor, so that constant descriptors score 0.

    Args:
        descriptors: (N, D) floating point.
        point_ids: (N,) integer.
        image_ids: (N,) integer, such as `csa_zoo.data.phototour.load_reference_images` reads.

    Returns:
        In [0, 1].

    Raises:
        ValueError: If shapes differ, a descriptor is NaN or infinite, or no image can be evaluated.
    """
    descriptors = as_matrix(descriptors, 'descriptors')
    points, images = (torch.as_tensor(ids).to(descriptors.device) for ids in (point_ids, image_ids))
    if points.shape != descriptors.shape[:1] or images.shape != points.shape:
        raise ValueError(
            f'{len(descriptors)} descriptors need as many point_ids and image_ids, not {tuple(points.shape)} and '
            f'{tuple(images.shape)}'
        )
    order = images.argsort(stable=True)
    _, sizes = images.unique(return_counts=True)
    scores = [
        _ratio_average_precision(descriptors[rows], points[rows])
        for rows in tqdm(order.split(sizes.tolist()), 'matching by ratio', disable=None, leave=False)
        if 1 < len(points[rows].unique()) < len(rows)
    ]
    if not scores:
        raise ValueError(f'none of {len(sizes)} images has two patches of one point and a patch of another')
    return torch.stack(scores).mean().item()


def _ratio_average_precision(x: Tensor, points: Tensor) -> Tensor:
    rival, pairs = torch.empty_like(points), []
    proximity = Proximity(x, x)
    for rows, scores in proximity.chunks('matching by ratio'):
        same = points[rows, None] == points
        rival[rows] = scores.masked_fill_(same, -torch.inf).argmax(1)
        pairs.append(same.nonzero() + torch.tensor([rows.start, 0], device=x.device))
    anchor, positive = torch.cat(pairs).T
    anchor, positive = anchor[anchor != positive], positive[anchor != positive]
    x = x.to(proximity.dtype)
    right = (x[anchor] - x[positive]).norm(dim=1)
    wrong = (x[anchor] - x[rival[anchor]]).norm(dim=1)
    correct = right < wrong
    ratio = (torch.minimum(right, wrong) / torch.maximum(right, wrong)).nan_to_num(1.0)
    order = correct.byte().argsort(stable=True)  # among equal ratios the wrong pairs come first
    correct = correct[order[ratio[order].argsort(stable=True)]]
    before = (~correct).cumsum(0)[correct]
    return average_precision(before, max(1, len(before)))[1]
