"""k-reciprocal re-ranking (Zhong et al., CVPR 2017), sparse: memory grows with the number of images, not its square.

Where the paper and its authors' code differ, the code decides, because the published numbers are its: the share of
common neighbours that extends a set is *more than* 2/3 there, not at least, and distances are squared and divided by
each image's largest.
"""

import warnings

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from csa_zoo.evaluation.distances import Proximity, as_matrix, full_precision


def rerank(
    query: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    k1: int = 20,
    k2: int = 6,
    original_weight: float = 0.3,
) -> Tensor:
    """Distances that are small between images with the same neighbours, for `reid_per_query_from_distances`.

    Re-ranking looks at the queries, too, as neighbours: its results for one query depend on the other queries. Junk
    should be left out of the gallery before. Equal distances are put in any order.

    Args:
        query: (Q, D) embeddings, as in `csa_zoo.evaluation.reid_metrics`.
        gallery: (G, D) embeddings.
        k1: Neighbours (besides itself) of an image that may be reciprocal.
        k2: Neighbours (with itself) over which an image's set is averaged; 1 for no averaging.
        original_weight: λ, in [0, 1]: the weight of the original distance beside Jaccard's.

    Returns:
        (Q, G) distances on the CPU, in [0, 1]; float32, or float64 if an input is.

    Raises:
        ValueError: If embeddings are not as `reid_metrics` wants them, there are not more than k1 of them, or a
            parameter is out of range.
    """
    query, gallery = as_matrix(query, 'query'), as_matrix(gallery, 'gallery')
    if not 1 <= k2 <= k1 + 1 or not 0 <= original_weight <= 1:
        raise ValueError(
            f'k2 must be in [1, k1 + 1] and original_weight in [0, 1], not {k2} (k1 = {k1}) and {original_weight}'
        )
    if len(query) + len(gallery) <= k1:
        raise ValueError(f'{len(query)} + {len(gallery)} embeddings are too few for k1 = {k1} neighbours')
    Proximity(query, gallery).warn_if_collapsed()  # and checks each set under its name
    device = query.device if gallery.device.type == 'cpu' else gallery.device
    dtype = torch.promote_types(torch.promote_types(query.dtype, gallery.dtype), torch.float32)
    images = torch.cat([query.to(device, dtype), gallery.to(device, dtype)])
    neighbours, largest, distances = _nearest(images, k1 + 1, num_queries=len(query))
    sets = _expanded_sets(neighbours, k1)
    memberships = _memberships(images, sets, largest)
    if k2 > 1:
        memberships = _selection(neighbours[:, :k2]) @ memberships / k2
    return _blend(memberships.astype(distances.numpy().dtype), distances, original_weight)


def _nearest(images: Tensor, count: int, num_queries: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Each image's neighbours, itself first; its largest squared distance; and queries' distances as a share of it."""
    proximity = Proximity(images, images)
    neighbours = np.empty((len(images), count), np.int64)
    largest = torch.empty(len(images), dtype=proximity.dtype)
    distances = torch.empty(num_queries, len(images) - num_queries, dtype=proximity.dtype)
    for rows, scores in proximity.chunks('finding neighbours'):
        farthest = proximity.squared_distances(rows, scores.amin(1, keepdim=True))
        farthest.clamp_(min=torch.finfo(proximity.dtype).tiny)
        largest[rows] = farthest[:, 0].cpu()
        # Rounding, or an equal image, must not put another one before the image itself.
        scores[:, rows].fill_diagonal_(torch.inf)
        neighbours[rows] = scores.topk(count, dim=1).indices.cpu().numpy()
        here = slice(rows.start, min(rows.stop, num_queries))
        if here.start < here.stop:
            squares = proximity.squared_distances(here, scores[: here.stop - here.start, num_queries:])
            distances[here] = squares.div_(farthest[: len(squares)]).cpu()
    return neighbours, largest, distances


def _expanded_sets(neighbours: np.ndarray, k1: int) -> sparse.csr_array:
    """R*: each image's k1-reciprocal neighbours, with the (k1 / 2)-reciprocal sets of those that mostly share them."""
    own = _reciprocal(neighbours[:, : k1 + 1])
    near = _reciprocal(neighbours[:, : round(k1 / 2) + 1])
    # Entry (i, c) counts what c's small set has in common with i's set, for the members c of i's set.
    common = (own @ near.T).multiply(own).tocsr()
    size = np.diff(near.indptr)
    common.data = (3 * common.data > 2 * size[common.indices]).astype(np.int32)
    common.eliminate_zeros()
    sets = (own + common @ near).tocsr()
    sets.sort_indices()
    return sets


def _reciprocal(neighbours: np.ndarray) -> sparse.csr_array:
    """Pairs that are in each other's list, as a 0/1 matrix."""
    listed = _selection(neighbours)
    return listed.multiply(listed.T).tocsr()


def _selection(neighbours: np.ndarray) -> sparse.csr_array:
    """(N, N) 0/1 matrix of the (N, k) lists."""
    rows, count = neighbours.shape
    indptr = np.arange(0, rows * count + 1, count)
    return sparse.csr_array((np.ones(rows * count, np.int32), neighbours.ravel(), indptr), shape=(rows, rows))


def _memberships(images: Tensor, sets: sparse.csr_array, largest: Tensor) -> sparse.csr_array:
    """V: how strongly each image of a set belongs to it, exp(−distance) normalised to a sum of one."""
    row = np.repeat(np.arange(len(images)), np.diff(sets.indptr))
    norms = torch.linalg.vector_norm(images, dim=1).square_().cpu().numpy()
    squares = norms[row] + norms[sets.indices] - 2 * _products(images, sets)
    weight = np.exp(-squares.clip(min=0) / largest.numpy()[row])
    weight /= np.bincount(row, weight)[row]
    return sparse.csr_array((weight, sets.indices, sets.indptr), shape=sets.shape)


def _products(images: Tensor, pairs: sparse.csr_array) -> np.ndarray:
    """Inner products of the pairs that the sparse matrix holds."""
    with warnings.catch_warnings(), full_precision(images.device):
        warnings.filterwarnings('ignore', message='Sparse CSR tensor support is in beta')
        indptr, indices = (torch.from_numpy(index.astype(np.int64)) for index in (pairs.indptr, pairs.indices))
        zeros = torch.zeros(pairs.nnz, dtype=images.dtype)
        pattern = torch.sparse_csr_tensor(indptr, indices, zeros, pairs.shape, check_invariants=True)
        return torch.sparse.sampled_addmm(pattern.to(images.device), images, images.T).values().cpu().numpy()


def _blend(memberships: sparse.csr_array, distances: Tensor, original_weight: float) -> Tensor:
    """Jaccard distances of the queries' and the gallery's fuzzy sets, mixed into the original ones, in place."""
    num_queries, num_gallery = distances.shape
    of_queries = memberships[:num_queries].tocsr()
    by_member = memberships[num_queries:].tocsc()
    for query in range(num_queries):
        entries = slice(of_queries.indptr[query], of_queries.indptr[query + 1])
        shared = by_member[:, of_queries.indices[entries]]
        least = np.minimum(shared.data, np.repeat(of_queries.data[entries], np.diff(shared.indptr)))
        # Sets sum to one, so that the sum of maxima is two less the sum of minima.
        minima = np.bincount(shared.indices, least, num_gallery)
        jaccard = torch.from_numpy(1 - minima / (2 - minima))
        distances[query].mul_(original_weight).add_(jaccard, alpha=1 - original_weight)
    return distances
