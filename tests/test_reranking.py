"""Re-ranking against the dense loops of its definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csa_zoo.evaluation.reranking import rerank
from csa_zoo.evaluation.retrieval import reid_per_query, reid_per_query_from_distances


def twin(query, gallery, k1, k2, weight):
    """Sets as Python sets, memberships as dense rows (Zhong et al., 2017, section 3)."""
    images = np.concatenate([query, gallery]).astype(np.float64)
    total = len(images)
    distance = ((images[:, None] - images) ** 2).sum(2)
    distance /= distance.max(1, keepdims=True)
    lists = distance.argsort(1)

    def reciprocal(i, k):
        return {j for j in lists[i, : k + 1].tolist() if i in lists[j, : k + 1]}

    member = np.zeros((total, total))
    for i in range(total):
        own = reciprocal(i, k1)
        extended = set(own)
        for j in own:
            near = reciprocal(j, round(k1 / 2))
            if len(near & own) > 2 / 3 * len(near):
                extended |= near
        chosen = sorted(extended)
        member[i, chosen] = np.exp(-distance[i, chosen])
        member[i] /= member[i].sum()
    member = np.stack([member[lists[i, :k2]].mean(0) for i in range(total)])
    result = np.empty((len(query), len(gallery)))
    for i in range(len(query)):
        for j in range(len(gallery)):
            other = member[len(query) + j]
            jaccard = 1 - np.minimum(member[i], other).sum() / np.maximum(member[i], other).sum()
            result[i, j] = (1 - weight) * jaccard + weight * distance[i, len(query) + j]
    return result


def clusters(rng, count, persons, dim=6):
    centers = rng.normal(size=(persons, dim))
    ids = rng.integers(0, persons, count)
    return centers[ids] + 0.5 * rng.normal(size=(count, dim)), ids


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 7), st.floats(0, 1))
def test_equals_the_twin(seed, k1, k2, weight):
    rng = np.random.default_rng(seed)
    k2 = min(k2, k1 + 1)
    images, _ = clusters(rng, rng.integers(k1 + 12, 90), rng.integers(1, 9))
    query, gallery = np.split(images, [rng.integers(1, 11)])
    distances = rerank(query, gallery, k1, k2, weight)
    assert distances.dtype == torch.float64
    np.testing.assert_allclose(distances, twin(query, gallery, k1, k2, weight), atol=1e-9)


def test_defaults_in_float32_in_chunks_and_for_the_better(monkeypatch):
    rng = np.random.default_rng(0)
    images, ids = clusters(rng, 220, 12, dim=5)
    monkeypatch.setattr('csa_zoo.evaluation.distances.CHUNK_BYTES', 220 * 4 * 33)
    query, gallery = images[:50], images[50:]
    distances = rerank(query.astype(np.float32), gallery.astype(np.float32))
    assert distances.dtype == torch.float32
    np.testing.assert_allclose(distances, twin(query, gallery, 20, 6, 0.3), atol=1e-5)
    labels = ids[:50], ids[50:], np.zeros(50, int), np.ones(170, int)
    before = reid_per_query(query, gallery, *labels).metrics()
    after = reid_per_query_from_distances(distances, *labels).metrics()
    assert after['mAP'] > before['mAP'] + 0.02


def test_bad_input_is_named():
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(5, 4)), rng.normal(size=(30, 4))
    with pytest.raises(ValueError, match=r'5 \+ 10 embeddings are too few for k1 = 20'):
        rerank(query, gallery[:10])
    with pytest.raises(ValueError, match=r'k2 must be in \[1, k1 \+ 1\].* 0 \(k1 = 20\)'):
        rerank(query, gallery, k2=0)
    with pytest.raises(ValueError, match='original_weight in'):
        rerank(query, gallery, original_weight=1.5)
    gallery[7] = np.nan
    with pytest.raises(ValueError, match='1 of 30 gallery embeddings hold NaN or Inf: rows 7'):
        rerank(query, gallery)
