"""Metrics of the two tasks, and the embeddings that they are taken from."""

from .embedding import embed
from .patches import fpr_at_recall
from .retrieval import reid_metrics, reid_per_query

__all__ = ['embed', 'fpr_at_recall', 'reid_metrics', 'reid_per_query']
