"""Retrieval, verification and their confidence against loops written from the definitions."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score

from csa_zoo.evaluation import distances as distances_module
from csa_zoo.evaluation.confidence import compare_runs, confidence_intervals
from csa_zoo.evaluation.retrieval import (
    QueryResults,
    camera_pair_metrics,
    num_at_least,
    num_at_least_by_search,
    ranked_lists,
    reid_metrics,
    reid_per_query,
    reid_per_query_from_distances,
)
from csa_zoo.evaluation.verification import reid_roc, reid_verification

MEASURES = ('num_positives', 'first_rank', 'ap', 'ap_market', 'inp')


def twin(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams):
    """Query by query, image by image; AP in the loop form of Market-1501's code. (Q, 5) in the order of MEASURES."""
    rows = []
    for q, person, camera in zip(np.asarray(query, np.float64), query_ids, query_cams, strict=True):
        images = []
        for g, other, where in zip(np.asarray(gallery, np.float64), gallery_ids, gallery_cams, strict=True):
            if other == -1 or (other == person and where == camera):
                continue
            images.append((((q - g) ** 2).sum(), other == person))
        images.sort()  # False before True: of equals, negatives first
        total = sum(good for _, good in images)
        found, last, old_precision, old_recall, step, market = 0, 0, 1.0, 0.0, 0.0, 0.0
        first = 0
        for rank, (_, good) in enumerate(images, 1):
            if good:
                found, last, first = found + 1, rank, first or rank
                step += found / rank / total
            if total:
                recall, precision = found / total, found / rank
                market += (recall - old_recall) * (old_precision + precision) / 2
                old_recall, old_precision = recall, precision
        rows.append((total, first, step, market, total / last) if total else (0, 0, np.nan, np.nan, np.nan))
    return np.array(rows)


def as_rows(results: QueryResults) -> np.ndarray:
    return np.stack([getattr(results, name) for name in MEASURES], 1)


def problem(seed, num_queries=40, num_gallery=300, dim=8, persons=12, cameras=4, dtype=np.float32):
    """Embeddings that know a little about their person, among junk and strangers."""
    rng = np.random.default_rng(seed)
    query_ids, gallery_ids = rng.integers(0, persons, num_queries), rng.integers(-1, persons + 3, num_gallery)
    centers = rng.normal(size=(persons + 4, dim))
    query = (centers[query_ids] + 1.5 * rng.normal(size=(num_queries, dim))).astype(dtype)
    gallery = (centers[gallery_ids] + 1.5 * rng.normal(size=(num_gallery, dim))).astype(dtype)
    cams = rng.integers(1, cameras + 1, num_queries), rng.integers(1, cameras + 1, num_gallery)
    return query, gallery, query_ids, gallery_ids, *cams


@pytest.mark.parametrize(
    ('ranks', 'step', 'market', 'inp'),
    [
        ([1], 1, 1, 1),
        ([2], 0.5, 0.25, 0.5),
        ([1, 3], 0.833333, 0.791667, 0.666667),
        ([2, 4, 5], 0.533333, 0.405556, 0.6),
        ([1, 2, 3, 10], 0.85, 0.841667, 0.4),
        ([10], 0.1, 0.05, 0.1),
        ([3, 7, 20, 100], 0.202262, 0.138910, 0.04),
    ],
)
def test_known_ranks_give_the_published_measures(ranks, step, market, inp):
    gallery = torch.arange(1.0, 121.0)[:, None]
    ids = [7 if rank in ranks else 3 for rank in range(1, 121)]
    metrics = reid_metrics(torch.zeros(1, 1), gallery, [7], ids, [1], [2] * 120, ranks=(1, 5, ranks[0]))
    assert metrics['mAP'] == pytest.approx(step, abs=1e-6)
    assert metrics['mAP_market'] == pytest.approx(market, abs=1e-6)
    assert metrics['mINP'] == pytest.approx(inp, abs=1e-6)
    assert metrics['rank1'] == float(ranks[0] == 1) and metrics['rank5'] == float(ranks[0] <= 5)
    assert metrics[f'rank{ranks[0]}'] == 1 and metrics['num_queries'] == 1 and metrics['num_skipped'] == 0
    assert all(type(value) in (float, int) for value in metrics.values())


@st.composite
def small_problems(draw):
    """Few persons on a small grid, perhaps far away: ties, junk, distractors and queries without a positive abound."""
    place = draw(st.sampled_from([0, 5000]))
    num_queries, num_gallery = draw(st.integers(1, 5)), draw(st.integers(1, 14))

    def integers(low, high, *shape):
        return draw(arrays(np.int64, shape, elements=st.integers(low, high)))

    embeddings = [(place + integers(-2, 2, count, 2)).astype(np.float32) for count in (num_queries, num_gallery)]
    ids = integers(0, 2, num_queries), integers(-1, 2, num_gallery)
    return *embeddings, *ids, integers(1, 2, num_queries), integers(1, 2, num_gallery)


@pytest.mark.filterwarnings('ignore:all .* embeddings are equal')
@settings(max_examples=150, deadline=None)
@given(small_problems())
def test_every_query_equals_the_loops(data):
    expected = twin(*data)
    if (data[3] == -1).all():
        with pytest.raises(ValueError, match='are junk'):
            reid_per_query(*data)
        return
    results = reid_per_query(*data)
    np.testing.assert_allclose(as_rows(results), expected, rtol=1e-12)
    if not results.is_valid.any():
        with pytest.raises(ValueError, match='has an image of its person from another camera'):
            reid_metrics(*data)
        return
    metrics = reid_metrics(*data, ranks=(1, 3))
    valid = expected[expected[:, 0] > 0]
    assert metrics['num_queries'] == len(valid) and metrics['num_skipped'] == len(expected) - len(valid)
    assert metrics['rank3'] == pytest.approx((valid[:, 1] <= 3).mean())
    np.testing.assert_allclose(
        [metrics['mAP'], metrics['mAP_market'], metrics['mINP']], valid[:, 2:].mean(0), rtol=1e-12
    )


@pytest.mark.parametrize('place', [0, 100, 10_000])
@pytest.mark.parametrize('long', ['nothing', 'query', 'gallery', 'both'])
def test_float32_survives_long_rows_and_a_common_offset(place, long):
    query, gallery, *labels = problem(10, dim=32)
    query[3] *= 1e5 if long in ('query', 'both') else 1
    gallery[7] *= 1e5 if long in ('gallery', 'both') else 1
    query, gallery = query + np.float32(place), gallery + np.float32(place)
    results = as_rows(reid_per_query(query, gallery, *labels))
    np.testing.assert_allclose(results, twin(query, gallery, *labels), rtol=1e-12)
    # A process that has the long query among its own must not see the others otherwise.
    for rows in (slice(0, 13), slice(13, 40)):
        shard = reid_per_query(query[rows], gallery, labels[0][rows], labels[1], labels[2][rows], labels[3])
        np.testing.assert_array_equal(as_rows(shard), results[rows])


def test_step_ap_is_sklearns():
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams = data = problem(0, dtype=np.float64)
    results = reid_per_query(*data)
    assert results.is_valid.all()
    for i, ap in enumerate(results.ap):
        same = gallery_ids == query_ids[i]
        counts = (gallery_ids != -1) & ~(same & (gallery_cams == query_cams[i]))
        closeness = -np.linalg.norm(gallery[counts] - query[i], axis=1)
        assert ap == pytest.approx(average_precision_score(same[counts], closeness), abs=1e-12)
    assert (results.ap_market <= results.ap).all() and (results.ap_market < results.ap).any()


def test_memory_maps_chunks_devices_and_types_change_nothing(monkeypatch, tmp_path):
    query, gallery, *labels = problem(1, dim=32)
    query, gallery = query.astype(np.float16), gallery.astype(np.float16)
    whole = as_rows(reid_per_query(query.astype(np.float32), gallery.astype(np.float32), *labels))
    np.testing.assert_allclose(whole, twin(query, gallery, *labels), rtol=1e-12)

    np.save(tmp_path / 'gallery.npy', gallery)
    mapped = np.load(tmp_path / 'gallery.npy', mmap_mode='r')
    monkeypatch.setattr(distances_module, 'BLOCK_BYTES', 32 * 4 * 7)
    monkeypatch.setattr(distances_module, 'CHUNK_BYTES', 4 * 300 * 3)
    labels = [torch.tensor(labels[0]), labels[1].tolist(), labels[2].astype(np.int32), torch.tensor(labels[3])]
    sharded = reid_per_query(torch.tensor(query, requires_grad=True), mapped, *labels)
    np.testing.assert_array_equal(as_rows(sharded), whole)

    pairwise = np.linalg.norm(query[:, None].astype(np.float64) - gallery.astype(np.float64), axis=2)
    np.testing.assert_array_equal(as_rows(reid_per_query_from_distances(pairwise, *labels)), whole)


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, 'matmul'), reason='torch 2.8 has another switch')
def test_reduced_precision_around_it_is_not_used():
    data = problem(2, dim=64)
    expected = as_rows(reid_per_query(*data))
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = 'bf16'
        with torch.autocast('cpu', dtype=torch.bfloat16):
            np.testing.assert_array_equal(as_rows(reid_per_query(*data)), expected)
        assert matmul.fp32_precision == 'bf16'
    finally:
        matmul.fp32_precision = before


@pytest.mark.filterwarnings('ignore:all 30 query')
@pytest.mark.parametrize(('num_queries', 'seed'), [(1, 1), (1, 3), (30, 0)])
def test_constant_embeddings_are_worse_than_chance_and_reported(num_queries, seed):
    # With one query a matrix product may give equal columns unequal results, by their place.
    vector = torch.randn(2048, generator=torch.Generator().manual_seed(seed))
    ids = np.arange(1003) // 10  # in order: a sort that keeps it would look good
    data = (np.arange(num_queries), ids, np.zeros(num_queries, int), np.ones(1003, int))
    with pytest.warns(UserWarning, match='all 1003 gallery embeddings are equal'):
        results = reid_per_query(vector.expand(num_queries, -1), vector.repeat(1003, 1), *data)
    assert (results.first_rank == 994).all()
    noise = 1e-8 * torch.randn(1003, 2048, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match='all 1003 gallery embeddings are equal'):
        assert reid_metrics(vector.expand(num_queries, -1), vector + noise, *data)['mAP'] < 0.2


def test_equal_gallery_rows_tie_exactly():
    generator = torch.Generator().manual_seed(0)
    people = torch.nn.functional.normalize(torch.randn(500, 2047, generator=generator), dim=1)
    query = torch.nn.functional.normalize(torch.randn(3, 2047, generator=generator), dim=1)
    gallery = torch.cat([people, people.flip(0)])
    ids = np.concatenate([np.arange(500), np.full(500, 1000)])
    labels = ([4, 250, 499], ids, [1, 1, 1], np.full(1000, 2))
    # Each positive has a double under a wrong name: all who are nearer count twice, and so does it.
    nearer = ((query @ people.T) > (query * people[[4, 250, 499]]).sum(1, keepdim=True) + 1e-6).sum(1)
    np.testing.assert_array_equal(reid_per_query(query, gallery, *labels).first_rank, 2 * nearer.numpy() + 2)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_counting_by_search_equals_counting_by_comparison(seed):
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(-5, 6, (rng.integers(1, 6), rng.integers(1, 30))).astype(np.float32))
    scores[torch.rand(scores.shape) < 0.1] = -torch.inf
    row = np.sort(rng.integers(0, len(scores), rng.integers(1, 20)))
    threshold = rng.integers(-6, 7, len(row)).astype(np.float32)
    threshold = threshold[np.lexsort((-threshold, row))]
    expected = [(scores[i] >= float(t)).sum().item() for i, t in zip(row, threshold, strict=True)]
    np.testing.assert_array_equal(num_at_least(scores, row, threshold), expected)
    np.testing.assert_array_equal(num_at_least_by_search(scores, row, threshold), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_equals_cpu():
    query, gallery, *labels = problem(3, dim=64)
    expected = as_rows(reid_per_query(query, gallery, *labels))
    query, on_gpu = torch.from_numpy(query).cuda(), torch.from_numpy(gallery).cuda()
    np.testing.assert_array_equal(as_rows(reid_per_query(query, on_gpu, *labels)), expected)
    np.testing.assert_array_equal(as_rows(reid_per_query(query, gallery, *labels)), expected)


def test_random_embeddings_on_market_1501s_lists():
    root = os.environ.get('CSA_ZOO_DATA')
    if not root:
        pytest.skip('CSA_ZOO_DATA does not name a folder with reid/market1501_query.csv')

    def labels(name):
        with open(Path(root) / 'reid' / f'market1501_{name}.csv', encoding='utf-8') as file:
            rows = [(int(person), int(re.search(r'_c(\d)', image).group(1))) for person, image in csv.reader(file)]
        return np.array(rows).T

    (query_ids, query_cams), (gallery_ids, gallery_cams) = labels('query'), labels('test')
    assert len(query_ids) == 3368 and len(gallery_ids) == 19732
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(1502, 16))
    query = (centers[query_ids] + 0.9 * rng.normal(size=(3368, 16))).astype(np.float32)
    gallery = (centers[gallery_ids] + 0.9 * rng.normal(size=(19732, 16))).astype(np.float32)
    results = reid_per_query(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams)
    assert results.is_valid.all()
    assert results.num_positives.mean() == pytest.approx(14.74, abs=0.005) and results.num_positives.max() == 68

    picked = np.arange(0, 3368, 10)
    measures = []
    for i in picked:
        counts = (gallery_ids != -1) & ~((gallery_ids == query_ids[i]) & (gallery_cams == query_cams[i]))
        distance = ((gallery[counts].astype(np.float64) - query[i]) ** 2).sum(1)
        rank = 1 + np.flatnonzero(gallery_ids[counts][distance.argsort()] == query_ids[i])
        nth = np.arange(1, len(rank) + 1)
        before = np.where(rank == 1, 1.0, (nth - 1) / np.maximum(rank - 1, 1))
        market = ((nth / rank + before) / 2).mean()
        measures.append((len(rank), rank[0], (nth / rank).mean(), market, len(rank) / rank[-1]))
    np.testing.assert_allclose(as_rows(results)[picked], measures, atol=1e-6)
    metrics = results.select(picked).metrics()
    means = np.mean(measures, axis=0)
    assert metrics['mAP'] == pytest.approx(means[2], abs=1e-6)
    assert metrics['mAP_market'] == pytest.approx(means[3], abs=1e-6)
    assert metrics['mINP'] == pytest.approx(means[4], abs=1e-6)
    assert 0.02 < metrics['mAP'] < 0.9


def with_nan(rows, value=np.nan):
    return lambda data: data[0].__setitem__((rows, 3), value)


def replace(index, change):
    return lambda data: data.__setitem__(index, change(data[index]))


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (with_nan([4, 9]), r'2 of 40 query embeddings hold NaN or Inf: rows 4, 9'),
        (with_nan([7], np.inf), r'1 of 40 query embeddings hold NaN or Inf: rows 7'),
        (with_nan([5], 1e30), r'1 of 40 query embeddings are too long for torch.float32 \(rows 5\): normalise'),
        (replace(1, lambda x: x * np.nan), r'300 of 300 gallery embeddings .* rows 0, 1, 2, 3, 4, …'),
        (replace(0, lambda x: x[:0]), r'query must be a matrix.* \(0, 8\)'),
        (replace(1, lambda x: x[0]), r'gallery must be a matrix.* \(8,\)'),
        (replace(1, lambda x: x.astype(int)), 'gallery must be floating point, not torch.int64'),
        (replace(1, lambda x: x[:, :5]), 'query embeddings have 8 dimensions and gallery embeddings 5'),
        (replace(2, lambda x: x[:-1]), r'query_ids must be of shape \(40,\), .* not \(39,\)'),
        (replace(5, lambda x: x[1:]), r'gallery_cams must be of shape \(300,\), .* not \(299,\)'),
        (replace(3, lambda x: x + 0.5), 'gallery_ids must be integers, not float64'),
        (replace(2, lambda x: np.where(np.arange(40) < 3, -1, x)), '3 of 40 query ids are −1'),
        (replace(3, lambda x: x * 0 - 1), 'all 300 gallery images are junk'),
        (replace(2, lambda x: x + 1000), 'none of 40 queries has an image'),
    ],
)
def test_bad_input_is_named(spoil, message):
    data = list(problem(4))
    spoil(data)
    with pytest.raises(ValueError, match=message):
        reid_metrics(*data)


def test_other_arguments_are_checked():
    data = problem(4)
    with pytest.raises(ValueError, match='ranks must be at least 1'):
        reid_metrics(*data, ranks=(0, 1))
    with pytest.raises(ValueError, match='k must be at least 1'):
        ranked_lists(*data, k=0)
    distances = np.ones((40, 300))
    distances[[3, 8], 5] = np.nan
    with pytest.raises(ValueError, match='distances of 2 queries hold NaN or Inf, first of query 3'):
        reid_per_query_from_distances(distances, *data[2:])
    with pytest.raises(ValueError, match=r'query_ids must be of shape \(39,\)'):
        reid_per_query_from_distances(distances[1:], *data[2:])


PROCESS = """
import json, sys
import numpy as np, torch.distributed as dist
from csa_zoo.evaluation.retrieval import reid_per_query
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
data = np.load(f'{folder}/data.npz')
query, gallery, query_ids, gallery_ids, query_cams, gallery_cams = (data[f'arr_{i}'] for i in range(6))
mine = np.array_split(np.arange(len(query)), 2)[rank]
results = reid_per_query(query[mine], gallery, query_ids[mine], gallery_ids, query_cams[mine], gallery_cams).gather()
results.write_csv(f'{folder}/{rank}.csv')
json.dump(results.metrics(), open(f'{folder}/{rank}.json', 'w'))
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    data = problem(5, num_queries=41)
    np.savez(tmp_path / 'data.npz', *data)
    command = [sys.executable, '-c', PROCESS]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    expected = reid_per_query(*data)
    expected.write_csv(tmp_path / 'expected.csv')
    for rank in range(2):
        assert (tmp_path / f'{rank}.csv').read_text() == (tmp_path / 'expected.csv').read_text()
        assert json.loads((tmp_path / f'{rank}.json').read_text()) == expected.metrics()


def test_csv_has_a_line_per_query(tmp_path):
    query, gallery, query_ids, *rest = problem(6, num_queries=5)
    query_ids[2] = 99
    results = reid_per_query(query, gallery, query_ids, *rest)
    results.write_csv(tmp_path / 'queries.csv', image_paths=[f'q,{i}.jpg' for i in range(5)])
    with open(tmp_path / 'queries.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert [row['path'] for row in rows] == [f'q,{i}.jpg' for i in range(5)]
    assert [float(row['ap']) for row in rows if row['ap']] == results.ap[results.is_valid].tolist()
    assert rows[2] == {
        'path': 'q,2.jpg', 'person_id': '99', 'camera_id': str(rest[1][2]), 'num_positives': '0',
        'first_rank': '', 'ap': '', 'ap_market': '', 'inp': '',
    }  # fmt: skip
    with pytest.raises(ValueError, match='1 image paths for 5 queries'):
        results.write_csv(tmp_path / 'queries.csv', image_paths=['one.jpg'])


def test_parquet_holds_the_same_as_the_csv(tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    query, gallery, query_ids, *rest = problem(6, num_queries=5)
    query_ids[2] = 99
    results = reid_per_query(query, gallery, query_ids, *rest)
    for write, name in ((results.write_csv, 'queries.csv'), (results.write_parquet, 'queries.parquet')):
        write(tmp_path / name, image_paths=[f'q,{i}.jpg' for i in range(5)])
    rows = parquet.read_table(tmp_path / 'queries.parquet').to_pylist()
    assert rows[2]['ap'] is None and rows[2]['num_positives'] == 0
    assert all(isinstance(row['first_rank'], int) and isinstance(row['inp'], float) for row in rows[:2] + rows[3:])
    with open(tmp_path / 'queries.csv', newline='', encoding='utf-8') as file:
        lines = list(csv.DictReader(file))
    assert [{key: '' if value is None else str(value) for key, value in row.items()} for row in rows] == lines


def test_camera_pairs_equal_their_subsets():
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams = data = problem(7, cameras=3)
    table = camera_pair_metrics(*data, ranks=(1, 5))
    assert set(table) == {(a, b) for a in (1, 2, 3) for b in (1, 2, 3) if a != b}
    for (a, b), metrics in table.items():
        q, g = query_cams == a, gallery_cams == b
        subset = query[q], gallery[g], query_ids[q], gallery_ids[g], query_cams[q], gallery_cams[g]
        assert metrics == pytest.approx(reid_metrics(*subset, ranks=(1, 5)))


def test_ranked_lists_are_the_nearest():
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams = data = problem(8, num_gallery=25)
    lists = ranked_lists(*data, k=30)
    for i in range(len(query)):
        same = gallery_ids == query_ids[i]
        counts = np.flatnonzero((gallery_ids != -1) & ~(same & (gallery_cams == query_cams[i])))
        distance = np.linalg.norm(gallery[counts] - query[i], axis=1)
        order = distance.argsort()
        np.testing.assert_array_equal(lists.index[i, : len(order)], counts[order])
        np.testing.assert_allclose(lists.distance[i, : len(order)], distance[order], rtol=1e-4)
        np.testing.assert_array_equal(lists.is_match[i, : len(order)], same[counts[order]])
        assert (lists.index[i, len(order) :] == -1).all() and not lists.is_match[i, len(order) :].any()
        assert np.isinf(lists.distance[i, len(order) :]).all()


@pytest.mark.filterwarnings('ignore:all .* embeddings are equal')
@settings(max_examples=75, deadline=None)
@given(small_problems(), st.floats(0, 1))
def test_verification_equals_all_pairs(data, rate):
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams = data
    if (gallery_ids == -1).all():
        return
    distance = ((query[:, None] - gallery[None]) ** 2).sum(2)
    same = query_ids[:, None] == gallery_ids
    matching = distance[same & (query_cams[:, None] != gallery_cams)]
    others = distance[~same & (gallery_ids != -1)]
    if not len(matching) or not len(others):
        with pytest.raises(ValueError, match='at least one of each'):
            reid_roc(*data)
        return
    curve = reid_roc(*data)
    assert (curve.num_positives, curve.num_negatives) == (len(matching), len(others))
    points = [(-1, 0.0, 0.0)] + [(d, (matching <= d).mean(), (others <= d).mean()) for d in np.unique(distance)]
    recall, threshold = curve.at_false_positive_rate(rate)
    assert recall == pytest.approx(max(true for _, true, false in points if false <= rate))
    assert (others <= threshold**2 * (threshold > 0)).mean() <= rate or recall == 0
    metrics = reid_verification(*data, false_positive_rates=(0.25,))
    assert set(metrics) == {'EER', 'EER_threshold', 'TPR@0.25', 'threshold@0.25'}
    assert metrics['EER'] == pytest.approx(min(max(1 - true, false) for _, true, false in points))


def test_verification_thresholds_work_and_constants_fail():
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams = data = problem(9, dim=16)
    metrics = reid_verification(*data, false_positive_rates=(1e-2,))
    distance = np.linalg.norm(query[:, None].astype(np.float64) - gallery, axis=2)
    same = query_ids[:, None] == gallery_ids
    matching = distance[same & (query_cams[:, None] != gallery_cams)]
    others = distance[~same & (gallery_ids != -1)]
    assert (matching <= metrics['threshold@0.01']).mean() == pytest.approx(metrics['TPR@0.01'])
    assert (others <= metrics['threshold@0.01']).mean() == pytest.approx(0.01, abs=5e-4)
    false, miss = (others <= metrics['EER_threshold']).mean(), (matching > metrics['EER_threshold']).mean()
    assert max(false, miss) == pytest.approx(metrics['EER'], abs=1e-9) and abs(false - miss) < 2 / len(matching)
    with pytest.warns(UserWarning, match='collapsed'):
        constant = reid_verification(np.full_like(query, 0.1), np.full_like(gallery, 0.1), *data[2:])
    assert constant['EER'] == 1 and constant['TPR@0.01'] == 0 and constant['threshold@0.01'] == -np.inf


def some_results(ap, persons):
    count = np.ones(len(ap), int)
    return QueryResults(persons, count, count, count, ap, ap, ap)


def test_intervals_are_those_of_independent_persons():
    rng = np.random.default_rng(0)
    ap = rng.uniform(size=400)
    low, high = confidence_intervals(some_results(ap, np.arange(400)), ranks=(1,))['mAP']
    error = ap.std() / 20
    assert low == pytest.approx(ap.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(ap.mean() + 1.96 * error, abs=0.15 * error)
    # The same query five times over is no further evidence.
    repeated = some_results(np.repeat(ap, 5), np.repeat(np.arange(400), 5))
    assert confidence_intervals(repeated, ranks=())['mAP'] == pytest.approx((low, high))
    with pytest.raises(ValueError, match='level'):
        confidence_intervals(repeated, level=95)


def test_comparison_sees_a_small_gain_on_the_same_queries():
    rng = np.random.default_rng(0)
    ap, persons = rng.uniform(size=300), np.arange(300) // 3
    base = some_results(ap, persons)
    gain = compare_runs(base, some_results(ap + 0.01 * rng.uniform(-1, 2, 300), persons))['mAP']
    assert 0 < gain['low'] < gain['difference'] < gain['high'] < 0.01 and gain['p_value'] < 0.01
    nothing = compare_runs(base, base)['mAP']
    assert nothing == {'difference': 0, 'low': 0, 'high': 0, 'p_value': 1}
    with pytest.raises(ValueError, match='differ in person_id'):
        compare_runs(base, some_results(ap, persons[::-1]))
