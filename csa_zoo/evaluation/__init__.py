"""Metrics of the two tasks, and the embeddings that they are taken from."""

from .confidence import compare_runs, confidence_intervals
from .embedding import embed
from .hpatches import hpatches_metrics
from .patches import fpr_at_recall
from .people import embed_people
from .reranking import rerank
from .retrieval import (
    QueryResults,
    RankedLists,
    camera_pair_metrics,
    ranked_lists,
    reid_metrics,
    reid_per_query,
    reid_per_query_from_distances,
)
from .verification import RocCurve, reid_roc, reid_verification

__all__ = [
    'QueryResults',
    'RankedLists',
    'RocCurve',
    'camera_pair_metrics',
    'compare_runs',
    'confidence_intervals',
    'embed',
    'embed_people',
    'fpr_at_recall',
    'hpatches_metrics',
    'ranked_lists',
    'reid_metrics',
    'reid_per_query',
    'reid_per_query_from_distances',
    'reid_roc',
    'reid_verification',
    'rerank',
]
