"""Metrics of person re-identification: CMC, mAP in both definitions and mINP, by the single-query protocol.

The protocol and `mAP_market` are Market-1501's (Zheng et al., ICCV 2015), mINP is AGW's (Ye et al., TPAMI 2021).
Nothing is sorted: a positive's rank is one plus the number of rows that score at least as high, which is counted chunk
by chunk of queries.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from csa_zoo.evaluation.distances import CHUNK_BYTES, Proximity, as_matrix

# Detections that show nobody. They are in Market-1501's gallery and must not count, neither as right nor as wrong.
JUNK = -1

Labels = Sequence[int] | np.ndarray | Tensor


def reid_metrics(
    query: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels,
    gallery_cams: Labels,
    ranks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Retrieval quality of embeddings by Euclidean distance, which for unit vectors is the order of cosine similarity.

    For a query of person p and camera c, gallery images of p from other cameras are positives; those of p from c, and
    those with id −1, are left out; all others are negatives, also those from c. Queries without a positive are skipped
    and counted. **Ties count against the model**: a negative at a positive's distance ranks before it, so that constant
    embeddings score worse than chance (and cause a warning).

    Args:
        query: (Q, D) embeddings on CPU or GPU, in half precision, float32 or float64. Float64 is compared in float64,
            everything else in float32 proper (no TF32). Equal gallery rows tie exactly.
        gallery: (G, D) embeddings; may be a memory map.
        query_ids: (Q,) person ids.
        gallery_ids: (G,) person ids; −1 is junk.
        query_cams: (Q,) camera ids.
        gallery_cams: (G,) camera ids, counted as those of the queries are.
        ranks: The k of the CMC values `rank<k>`.

    Returns:
        `mAP` (step definition: mean precision at the positives), `mAP_market` (trapezoids, as Market-1501's MATLAB
        code; never above `mAP`), `mINP`, and `rank<k>` for each k, all in [0, 1]; `num_queries` that count and
        `num_skipped` that have no positive.

    Raises:
        ValueError: If shapes or lengths do not fit, a set is empty, an embedding holds NaN or Inf, labels are not
            integers, a query's id is −1, a rank is below 1, or no query has a positive.
    """
    results = reid_per_query(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams)
    return results.metrics(ranks)


def reid_per_query(
    query: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels,
    gallery_cams: Labels,
) -> 'QueryResults':
    """The results behind `reid_metrics`, query by query.

    Queries do not depend on each other: processes can take a slice of them each, against the whole gallery, and
    `QueryResults.gather` the whole.

    Args:
        query: As in `reid_metrics`, as are the others.

    Raises:
        ValueError: As `reid_metrics`, except that a shard of queries may be without any positive.
    """
    protocol, proximity = prepare(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams)
    return _evaluate(proximity.chunks('ranking'), protocol)


def reid_per_query_from_distances(
    distances: Tensor | np.ndarray,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels,
    gallery_cams: Labels,
) -> 'QueryResults':
    """As `reid_per_query`, from any distances, small for alike: for instance re-ranked ones.

    Args:
        distances: (Q, G) floating-point distances.
        query_ids: As in `reid_metrics`, as are the others.

    Raises:
        ValueError: If `distances` is not such a matrix, or as `reid_per_query`.
    """
    distances = as_matrix(distances, 'distances')
    protocol = SingleQuery(query_ids, gallery_ids, query_cams, gallery_cams, *distances.shape)
    kept = torch.from_numpy(protocol.kept).to(distances.device)
    size = max(1, CHUNK_BYTES // (distances.shape[1] * distances.dtype.itemsize))

    def chunks() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(distances), size):
            queries = slice(start, min(start + size, len(distances)))
            scores = -distances[queries].to(torch.promote_types(distances.dtype, torch.float32))
            if not scores.isfinite().all():
                bad = (~scores.isfinite()).any(1).nonzero().flatten() + start
                raise ValueError(f'distances of {len(bad)} queries hold NaN or Inf, first of query {int(bad[0])}')
            yield queries, scores[:, kept]

    return _evaluate(chunks(), protocol)


def camera_pair_metrics(
    query: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels,
    gallery_cams: Labels,
    ranks: Sequence[int] = (1,),
) -> dict[tuple[int, int], dict[str, float]]:
    """Metrics of every pair of cameras: queries of the first in a gallery of the second's images alone.

    Args:
        query: As in `reid_metrics`, as are the others.

    Returns:
        By (query camera, gallery camera), what `reid_metrics` returns. Pairs without any positive, such as a camera
        with itself, are absent.

    Raises:
        ValueError: As `reid_metrics`.
    """
    labels = SingleQuery(query_ids, gallery_ids, query_cams, gallery_cams, len(query), len(gallery))
    table = {}
    for gallery_cam in np.unique(labels.gallery_cams[labels.kept]).tolist():
        ids = np.where(labels.gallery_cams == gallery_cam, labels.gallery_ids, JUNK)
        results = reid_per_query(query, gallery, labels.query_ids, ids, labels.query_cams, labels.gallery_cams)
        for query_cam in np.unique(labels.query_cams[results.is_valid]).tolist():
            table[query_cam, gallery_cam] = results.select(labels.query_cams == query_cam).metrics(ranks)
    if not table:
        raise ValueError('no query has an image of its person from another camera in the gallery')
    return dict(sorted(table.items()))


@dataclass(frozen=True)
class RankedLists:
    """The gallery images nearest to each query, nearest first; where the gallery ends before k, index is −1."""

    index: np.ndarray  # (Q, k) rows of the gallery
    distance: np.ndarray  # (Q, k) Euclidean
    is_match: np.ndarray  # (Q, k) whether it shows the query's person


def ranked_lists(
    query: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels,
    gallery_cams: Labels,
    k: int = 10,
) -> RankedLists:
    """The k gallery images nearest to each query, without those that the protocol leaves out. Ties in any order.

    Args:
        query: As in `reid_metrics`, as are the others.
        k: Length of the lists.

    Raises:
        ValueError: As `reid_per_query`, or if k is below 1.
    """
    if k < 1:
        raise ValueError(f'k must be at least 1, not {k}')
    protocol, proximity = prepare(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams)
    index = np.full((len(query), k), -1)
    distance = np.full((len(query), k), np.inf, np.float64 if proximity.dtype == torch.float64 else np.float32)
    for queries, scores in proximity.chunks('listing'):
        row, column, is_positive = protocol.same_person(queries)
        junk = torch.from_numpy(np.stack([row, column])[:, ~is_positive]).to(scores.device)
        scores[junk[0], junk[1]] = -torch.inf
        best, place = scores.topk(min(k, scores.shape[1]), dim=1)
        is_junk = best.isneginf().cpu().numpy()
        found = slice(0, best.shape[1])
        index[queries, found] = np.where(is_junk, -1, protocol.kept[place.cpu().numpy()])
        distance[queries, found] = proximity.squared_distances(queries, best).sqrt_().cpu().numpy()
    is_match = (index >= 0) & (protocol.gallery_ids[index] == protocol.query_ids[:, None])
    return RankedLists(index, distance, is_match)


@dataclass(frozen=True)
class QueryResults:
    """What each query found: arrays of length Q; where a query has no positive, measures are NaN and its rank is 0."""

    person_id: np.ndarray
    camera_id: np.ndarray
    num_positives: np.ndarray
    first_rank: np.ndarray  # of the best positive, from 1
    ap: np.ndarray
    ap_market: np.ndarray
    inp: np.ndarray

    def __len__(self) -> int:
        return len(self.person_id)

    @property
    def is_valid(self) -> np.ndarray:
        """(Q,) whether the query has a positive, and counts."""
        return self.num_positives > 0

    def select(self, queries: np.ndarray) -> 'QueryResults':
        """Those of some queries: a mask or indices."""
        return QueryResults(**{name: values[queries] for name, values in asdict(self).items()})

    def measures(self, ranks: Sequence[int] = (1, 5, 10)) -> dict[str, np.ndarray]:
        """The (valid queries,) values whose means are the metrics.

        Raises:
            ValueError: If no query has a positive or a rank is below 1.
        """
        valid = self.is_valid
        if not valid.any():
            raise _nothing_to_find(len(self))
        if any(k < 1 for k in ranks):
            raise ValueError(f'ranks must be at least 1, not {tuple(ranks)}')
        measures = {'mAP': self.ap[valid], 'mAP_market': self.ap_market[valid], 'mINP': self.inp[valid]}
        return measures | {f'rank{k}': (self.first_rank[valid] <= k).astype(np.float64) for k in ranks}

    def metrics(self, ranks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
        """The dictionary that `reid_metrics` returns."""
        means: dict[str, float] = {name: float(values.mean()) for name, values in self.measures(ranks).items()}
        num_valid = int(self.is_valid.sum())
        return means | {'num_queries': num_valid, 'num_skipped': len(self) - num_valid}

    def write_csv(self, path: str | Path, image_paths: Sequence[str] | None = None) -> None:
        """Writes a line per query, in order; measures of queries without a positive are left empty.

        Args:
            path: The file to write.
            image_paths: (Q,) names for a first column `path`.

        Raises:
            ValueError: If there are not as many names as queries.
        """
        columns = self._columns(image_paths)
        with open(path, 'w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))

    def write_parquet(self, path: str | Path, image_paths: Sequence[str] | None = None) -> None:
        """The same as a Parquet file, with null for empty.

        Args:
            path: As for `write_csv`.
            image_paths: As for `write_csv`.

        Raises:
            ValueError: As `write_csv`.
        """
        import pyarrow.parquet  # comes with datasets; metrics alone do not need it

        pyarrow.parquet.write_table(pyarrow.table(self._columns(image_paths)), path)

    def _columns(self, image_paths: Sequence[str] | None) -> dict[str, list]:
        columns = {name: values.tolist() for name, values in asdict(self).items()}
        for name in ('first_rank', 'ap', 'ap_market', 'inp'):
            columns[name] = [x if n else None for x, n in zip(columns[name], columns['num_positives'], strict=True)]
        if image_paths is None:
            return columns
        if len(image_paths) != len(self):
            raise ValueError(f'{len(image_paths)} image paths for {len(self)} queries')
        return {'path': list(image_paths)} | columns

    @staticmethod
    def concatenate(parts: Sequence['QueryResults']) -> 'QueryResults':
        """Joins the results of successive slices of the queries."""
        names = [field.name for field in fields(QueryResults)]
        return QueryResults(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def gather(self) -> 'QueryResults':
        """Joins the results of all processes of torch.distributed, in the order of their ranks, in each of them."""
        parts: list[QueryResults] = [self] * dist.get_world_size()
        dist.all_gather_object(parts, self)
        return QueryResults.concatenate(parts)


def check_labels(query_ids: Labels, gallery_ids: Labels, query_cams: Labels, gallery_cams: Labels) -> None:
    """Make sure, before there are embeddings, that the metrics of these labels exist.

    Args:
        query_ids: As in `reid_metrics`, as are the others.

    Raises:
        ValueError: As `reid_metrics` for its labels.
    """
    if not len(query_ids):
        raise ValueError('there are no query images')
    labels = SingleQuery(query_ids, gallery_ids, query_cams, gallery_cams, len(query_ids), len(gallery_ids))
    cameras: dict[int, set[int]] = {}  # that the gallery shows a person from
    for index in labels.kept:
        cameras.setdefault(int(labels.gallery_ids[index]), set()).add(int(labels.gallery_cams[index]))
    queries = zip(labels.query_ids.tolist(), labels.query_cams.tolist(), strict=True)
    if not any(cameras.get(person, set()) - {camera} for person, camera in queries):
        raise _nothing_to_find(len(labels.query_ids))


def _nothing_to_find(num_queries: int) -> ValueError:
    return ValueError(
        f'none of {num_queries} queries has an image of its person from another camera in the gallery: '
        'check the ids, and that both sets number cameras alike'
    )


class SingleQuery:
    """Which gallery images are positives, negatives and junk for a query (the rule is in `reid_metrics`).

    Attributes:
        kept: Ascending indices of the gallery images that are not junk (id −1). Columns, here and in the scores, count
            these only.
    """

    def __init__(
        self,
        query_ids: Labels,
        gallery_ids: Labels,
        query_cams: Labels,
        gallery_cams: Labels,
        num_queries: int,
        num_gallery: int,
    ):
        self.query_ids = _labels(query_ids, 'query_ids', num_queries)
        self.query_cams = _labels(query_cams, 'query_cams', num_queries)
        self.gallery_ids = _labels(gallery_ids, 'gallery_ids', num_gallery)
        self.gallery_cams = _labels(gallery_cams, 'gallery_cams', num_gallery)
        if (num_junk := int((self.query_ids == JUNK).sum())) > 0:
            raise ValueError(f'{num_junk} of {num_queries} query ids are −1, which is junk: drop these queries')
        self.kept = np.flatnonzero(self.gallery_ids != JUNK)
        if not len(self.kept):
            raise ValueError(f'all {num_gallery} gallery images are junk (id −1)')
        ids = self.gallery_ids[self.kept]
        self._order = np.argsort(ids, kind='stable')
        self._sorted_ids, self._cams = ids[self._order], self.gallery_cams[self.kept]

    def same_person(self, queries: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All pairs of one person between a chunk of queries and the gallery, by ascending query.

        Returns:
            Three arrays of one length: row in the chunk, column, and whether it is a positive (else it is junk).
        """
        ids, cams = self.query_ids[queries], self.query_cams[queries]
        start = np.searchsorted(self._sorted_ids, ids, 'left')
        count = np.searchsorted(self._sorted_ids, ids, 'right') - start
        row = np.repeat(np.arange(len(ids)), count)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        column = self._order[start[row] + within]
        return row, column, self._cams[column] != cams[row]


def prepare(
    query: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels,
    gallery_cams: Labels,
) -> tuple[SingleQuery, Proximity]:
    """Checks what `reid_metrics` takes, and pairs the protocol with the scores of the gallery images it keeps."""
    query, gallery = as_matrix(query, 'query'), as_matrix(gallery, 'gallery')
    protocol = SingleQuery(query_ids, gallery_ids, query_cams, gallery_cams, len(query), len(gallery))
    proximity = Proximity(query, gallery, protocol.kept)
    proximity.warn_if_collapsed()
    return protocol, proximity


def _evaluate(chunks: Iterable[tuple[slice, Tensor]], protocol: SingleQuery) -> QueryResults:
    """Ranks the positives of each chunk of scores. The scores are written to."""
    parts = []
    for queries, scores in chunks:
        row, column, is_positive = protocol.same_person(queries)
        row_on_device = torch.from_numpy(row).to(scores.device)
        column_on_device = torch.from_numpy(column).to(scores.device)
        own = scores[row_on_device, column_on_device].cpu().numpy()[is_positive]
        scores[row_on_device, column_on_device] = -torch.inf
        row = row[is_positive]
        order = np.lexsort((-own, row))
        row, own = row[order], own[order]
        first = np.searchsorted(row, row)
        nth = np.arange(1, len(row) + 1) - first
        rank = nth + num_at_least(scores, row, own)
        parts.append(_summarize(rank, nth, row, protocol, queries))
    return QueryResults.concatenate(parts)


def num_at_least(scores: Tensor, row: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """For each of the thresholds, grouped by row and descending in it: how many of its row's scores reach it."""
    if scores.device.type == 'cpu':
        # The row stays in the cache, so that a comparison per threshold is 20 times faster here than what follows.
        rows = scores.numpy()
        pairs = zip(row.tolist(), threshold, strict=True)
        return np.fromiter((np.count_nonzero(rows[i] >= t) for i, t in pairs), np.int64, len(row))
    return num_at_least_by_search(scores, row, threshold)


def num_at_least_by_search(scores: Tensor, row: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """The same in three launches: finds each score's place among its row's thresholds, and counts the places."""
    count = np.bincount(row, minlength=len(scores))
    places = int(count.max()) + 1
    ascending = np.searchsorted(row, row, 'right') - 1 - np.arange(len(row))
    table = np.full((len(scores), places - 1), np.inf, threshold.dtype)
    table[row, ascending] = threshold
    place = torch.searchsorted(torch.from_numpy(table).to(scores.device), scores, right=True, out_int32=True)
    place += torch.arange(len(scores), dtype=torch.int32, device=scores.device)[:, None] * places
    histogram = torch.bincount(place.flatten(), minlength=len(scores) * places).view(len(scores), places)
    at_least = histogram.flip(1).cumsum(1).flip(1).cpu().numpy()
    return at_least[row, ascending + 1]


def _summarize(
    rank: np.ndarray, nth: np.ndarray, row: np.ndarray, protocol: SingleQuery, queries: slice
) -> QueryResults:
    """Measures from the rank of each query's nth positive, as in the definitions' closed forms."""
    ids = protocol.query_ids[queries]
    count = np.bincount(row, minlength=len(ids))
    precision = nth / rank
    # The precision just before the positive; Market's code starts at 1.
    before = np.divide(nth - 1, rank - 1, out=np.ones(len(rank)), where=rank > 1)
    best, worst = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    best[row[nth == 1]] = rank[nth == 1]
    worst[row] = rank  # of a row's assignments, ascending, the last one stays
    with np.errstate(invalid='ignore'):
        return QueryResults(
            person_id=ids,
            camera_id=protocol.query_cams[queries],
            num_positives=count,
            first_rank=best,
            ap=np.bincount(row, precision, len(ids)) / count,
            ap_market=np.bincount(row, (precision + before) / 2, len(ids)) / count,
            inp=count / worst,
        )


def _labels(labels: Labels, name: str, count: int) -> np.ndarray:
    labels = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if labels.shape != (count,):
        raise ValueError(f'{name} must be of shape ({count},), one for each image, not {labels.shape}')
    if labels.dtype.kind not in 'iu':
        raise ValueError(f'{name} must be integers, not {labels.dtype}')
    return labels.astype(np.int64)
