"""Verification: are two images the same person? ROC, true positive rate at a false positive rate, EER, thresholds.

Retrieval metrics say nothing about a threshold; whoever deploys an embedding needs one. All pairs of the single-query
protocol count, in two histograms of squared distances that are filled chunk by chunk, so that no pair is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from csa_zoo.evaluation.retrieval import Labels, prepare

# Of squared distance, between 0 and the largest that the norms permit. For unit vectors a bin is 4e-6 of cosine wide.
NUM_BINS = 1 << 20


@dataclass(frozen=True)
class RocCurve:
    """Rates of accepting pairs at or below a distance, at ascending distances.

    Each point is exact; only the distances to choose from are rounded up to the edge of a bin.
    """

    distance: np.ndarray  # Euclidean; for unit vectors the cosine is 1 − distance² / 2
    true_positive_rate: np.ndarray
    false_positive_rate: np.ndarray
    num_positives: int
    num_negatives: int

    def at_false_positive_rate(self, rate: float) -> tuple[float, float]:
        """The largest true positive rate with at most this false positive rate, and its distance.

        Where every acceptance costs more than that, the answer is (0, −inf): accept nothing.

        Raises:
            ValueError: If `rate` is not in [0, 1].
        """
        if not 0 <= rate <= 1:
            raise ValueError(f'the false positive rate must be in [0, 1], not {rate}')
        point = int(np.searchsorted(self.false_positive_rate, rate, 'right')) - 1
        return float(self.true_positive_rate[point]), float(self.distance[point])

    def equal_error(self) -> tuple[float, float]:
        """The equal error rate and its distance: where the larger of misses and false alarms is least.

        It is an operating point that exists, not an interpolation between two: constant embeddings have 1, not 0.5.
        """
        errors = np.maximum(self.false_positive_rate, 1 - self.true_positive_rate)
        point = int(errors.argmin())
        return float(errors[point]), float(self.distance[point])


def reid_roc(
    query: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels,
    gallery_cams: Labels,
) -> RocCurve:
    """The ROC curve of all query-gallery pairs: of one person in two cameras, against pairs of different persons.

    Args:
        query: As in `csa_zoo.evaluation.reid_metrics`, as are the others.

    Raises:
        ValueError: As `reid_metrics`, or if all pairs are of one kind.
    """
    protocol, proximity = prepare(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams)
    largest = (proximity.query_norms.max().sqrt() + proximity.gallery_norms.max().sqrt()).square().item()
    scale = (NUM_BINS - 1) / max(largest, NUM_BINS * torch.finfo(proximity.dtype).tiny)
    everyone = torch.zeros(NUM_BINS, dtype=torch.int64, device=proximity.device)
    positives, junk = torch.zeros_like(everyone), torch.zeros_like(everyone)
    for queries, scores in proximity.chunks('verifying'):
        row, column, is_positive = (
            torch.from_numpy(pairs).to(scores.device) for pairs in protocol.same_person(queries)
        )
        bins = proximity.squared_distances(queries, scores).mul_(scale).ceil_().clamp_(max=NUM_BINS - 1).int()
        everyone += bins.flatten().bincount(minlength=NUM_BINS)
        same = bins[row, column]
        positives += same[is_positive].bincount(minlength=NUM_BINS)
        junk += same[~is_positive].bincount(minlength=NUM_BINS)
    return _curve(positives.cpu().numpy(), (everyone - positives - junk).cpu().numpy(), scale)


def reid_verification(
    query: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels,
    gallery_cams: Labels,
    false_positive_rates: Sequence[float] = (1e-4, 1e-3, 1e-2),
) -> dict[str, float]:
    """Verification metrics, with the distance threshold that attains each of them.

    Args:
        query: As in `csa_zoo.evaluation.reid_metrics`, as are the others.
        false_positive_rates: At which the true positive rate is reported.

    Returns:
        `EER` and `EER_threshold`, and for each rate, for instance, `TPR@0.001` and `threshold@0.001`: accept a pair
        whose Euclidean distance is at most the threshold.

    Raises:
        ValueError: As `reid_roc`, or if a rate is not in [0, 1].
    """
    curve = reid_roc(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams)
    metrics = dict(zip(('EER', 'EER_threshold'), curve.equal_error(), strict=True))
    for rate in false_positive_rates:
        metrics[f'TPR@{rate:g}'], metrics[f'threshold@{rate:g}'] = curve.at_false_positive_rate(rate)
    return metrics


def _curve(positives: np.ndarray, negatives: np.ndarray, scale: float) -> RocCurve:
    if not positives.any() or not negatives.any():
        raise ValueError(
            f'{positives.sum()} pairs of one person and {negatives.sum()} of different persons: '
            'verification needs at least one of each'
        )
    # Between bins that hold something nothing changes. The first point accepts nothing.
    edge = np.flatnonzero(positives + negatives)
    true, false = positives[edge].cumsum(), negatives[edge].cumsum()
    return RocCurve(
        distance=np.concatenate([[-np.inf], np.sqrt(edge / scale)]),
        true_positive_rate=np.concatenate([[0.0], true / true[-1]]),
        false_positive_rate=np.concatenate([[0.0], false / false[-1]]),
        num_positives=int(true[-1]),
        num_negatives=int(false[-1]),
    )
