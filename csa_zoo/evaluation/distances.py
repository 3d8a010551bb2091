"""Euclidean distances between two sets of embeddings, in chunks of queries, from one matrix product.

Retrieval, verification and re-ranking all read the same distances here, so that they agree on precision and on ties.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# Scores of one chunk of queries against the gallery. Larger chunks do not make the product faster.
CHUNK_BYTES = 128 << 20
# Rows of a gallery that has to be copied to be multiplied: junk dropped, half precision, on another device, centred.
BLOCK_BYTES = 64 << 20
# Rows, at least, that show where a gallery lies.
SAMPLED_ROWS = 64
# Squared length over squared spread beyond which embeddings are centred. Each doubling costs a binary digit of d².
FAR_FROM_ZERO = 16


class Proximity:
    """Closeness of every query to every gallery row: minus half the squared Euclidean distance, plus a constant.

    A chunk of scores is Q Gᵀ + (c − |g|²) / 2, with c about the least |g|²: d² = |q|² + c − 2 · score. For unit vectors
    this is the cosine. The least, because a larger constant would take float32's digits from the rows that are short.
    Where embeddings lie far from zero, compared with their spread, a point amid the gallery is subtracted from both
    sets, which changes no distance. Constant and point are the gallery's alone: scores depend on no other query.

    Products run in float32 proper (no TF32, no bfloat16, no autocast), or in float64 if either input is float64; half
    precision is converted. Matrix products may round equal columns differently, hence scores of equal gallery rows are
    copied from the first of them: they tie exactly.

    Args:
        query: (Q, D) floating-point embeddings.
        gallery: (G, D) embeddings; may be memory-mapped or on another device than `query`, then it is read block by
            block. The work is done on the device of whichever is not on the CPU.
        rows: The gallery rows that count; all if None. They are the columns of the scores, in this order.

    Raises:
        ValueError: If shapes do not fit, a set is empty, not floating point, holds NaN or Inf, or overflows float32.
    """

    def __init__(self, query: Tensor | np.ndarray, gallery: Tensor | np.ndarray, rows: np.ndarray | None = None):
        self.query, self.gallery = as_matrix(query, 'query'), as_matrix(gallery, 'gallery')
        if self.query.shape[1] != self.gallery.shape[1]:
            raise ValueError(
                f'query embeddings have {self.query.shape[1]} dimensions and gallery embeddings {self.gallery.shape[1]}'
            )
        self.device = self.query.device if self.gallery.device.type == 'cpu' else self.gallery.device
        self.dtype = torch.promote_types(torch.promote_types(self.query.dtype, self.gallery.dtype), torch.float32)
        keeps_all = rows is None or len(rows) == len(self.gallery)
        self.rows = None if keeps_all else torch.from_numpy(rows).to(self.gallery.device)
        self.center = self._center()
        self.query_norms = self._squared_norms(self.query, 'query')
        gallery_norms = self._squared_norms(self.gallery, 'gallery')
        if self.rows is not None:
            gallery_norms = gallery_norms[self.rows.to(self.device)]
        self.offset = _rounded(gallery_norms.min().item())
        self.gallery_bias = (self.offset - gallery_norms) / 2
        self.gallery_norms = gallery_norms
        self.repeats, self.originals = self._equal_rows()

    def chunks(self, description: str) -> Iterator[tuple[slice, Tensor]]:
        """Yields (queries, scores), scores of shape (chunk, rows): a buffer that the next chunk overwrites."""
        width, total = len(self.gallery_bias), len(self.query)
        size = min(total, max(1, CHUNK_BYTES // (width * self.dtype.itemsize)))
        buffer = torch.empty(size, width, dtype=self.dtype, device=self.device)
        # A delay, because a bar for the usual two seconds is noise.
        for start in tqdm(range(0, total, size), desc=description, disable=None, leave=False, delay=3):
            queries = slice(start, min(start + size, total))
            yield queries, self._scores(queries, buffer[: queries.stop - start])

    def squared_distances(self, queries: slice, scores: Tensor) -> Tensor:
        """Turns a chunk of scores, or a selection of its columns, into squared distances, in place."""
        return scores.mul_(-2).add_((self.query_norms[queries] + self.offset)[:, None]).clamp_(min=0)

    def warn_if_collapsed(self) -> None:
        """Warns if all embeddings of a set are equal to within a network's rounding: distances then mean nothing."""
        for name, embeddings in (('query', self.query), ('gallery', self.gallery)):
            if len(embeddings) > 1 and is_constant(embeddings):
                count = len(embeddings)
                warnings.warn(f'all {count} {name} embeddings are equal: the model has collapsed', stacklevel=4)

    @torch.no_grad()
    def _scores(self, queries: slice, out: Tensor) -> Tensor:
        query = self._centered(self.query[queries])
        with full_precision(self.device):
            for columns, block in self._gallery_blocks():
                torch.addmm(self.gallery_bias[columns], query, block.T, out=out[:, columns])
        if len(self.repeats):
            out[:, self.repeats] = out[:, self.originals]
        return out

    def _gallery_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        fits = self.gallery.dtype == self.dtype and self.gallery.device == self.device
        if self.rows is None and fits and self.center is None:
            yield slice(None), self.gallery
            return
        width = len(self.gallery_bias)
        size = max(1, BLOCK_BYTES // (self.gallery.shape[1] * self.dtype.itemsize))
        for start in range(0, width, size):
            columns = slice(start, min(start + size, width))
            block = self.gallery[columns if self.rows is None else self.rows[columns]]
            yield columns, self._centered(block)

    def _center(self) -> Tensor | None:
        """(D,) point amid the gallery, or None where embeddings do not lie far from zero for their spread."""
        width = len(self.gallery) if self.rows is None else len(self.rows)
        picked = slice(None, None, max(1, width // SAMPLED_ROWS))
        sample = self.gallery[picked if self.rows is None else self.rows[picked]].to(self.device, self.dtype)
        # Medians, which a few long rows do not move; each is a row's own value, so that integers stay integers.
        center = sample.sort(0).values[len(sample) // 2]
        length, spread = (rows.square().sum(1).median() for rows in (sample, sample - center))
        return center if FAR_FROM_ZERO * spread < length else None

    def _centered(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.device, self.dtype)
        return rows if self.center is None else rows - self.center

    def _squared_norms(self, embeddings: Tensor, name: str) -> Tensor:
        size = max(1, BLOCK_BYTES // (embeddings.shape[1] * self.dtype.itemsize))
        # Not a norm squared: its root would round the squares of integers.
        blocks = embeddings.split(size)
        squares = torch.cat([self._centered(rows).square().sum(1) for rows in blocks])
        if not squares.isfinite().all():
            raise ValueError(_describe_not_finite(embeddings, squares, name))
        return squares

    def _equal_rows(self) -> tuple[Tensor, Tensor]:
        """Columns that repeat an earlier one, and the first column each of them repeats."""
        # Rows that agree in a few columns are rare, so only those are compared in full.
        step = max(1, self.gallery.shape[1] // 16)
        sample = self.gallery[:, ::step]
        columns = _with_company(sample if self.rows is None else sample[self.rows])
        rows = columns if self.rows is None else self.rows[columns]
        _, group = torch.unique(self.gallery[rows], dim=0, return_inverse=True)
        first = torch.full_like(columns, len(self.gallery)).scatter_reduce(0, group, columns, 'amin')[group]
        repeated = first != columns
        return columns[repeated].to(self.device), first[repeated].to(self.device)


def as_matrix(values: Tensor | np.ndarray, name: str) -> Tensor:
    """Views embeddings or distances as a tensor, without a copy.

    Raises:
        ValueError: If it has not two axes, is empty or is not floating point.
    """
    with warnings.catch_warnings():
        # A read-only memory map is as good as another array, because nothing here writes to it.
        warnings.filterwarnings('ignore', message='The given NumPy array is not writable')
        values = torch.as_tensor(values).detach()
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f'{name} must be a matrix, a row for each image, and not empty, not {tuple(values.shape)}')
    if not values.is_floating_point():
        raise ValueError(f'{name} must be floating point, not {values.dtype}')
    return values


def is_constant(embeddings: Tensor) -> bool:
    """Whether all rows are equal to within the rounding of a network's arithmetic (1e-5 of the largest value)."""
    tolerance = max(1e-5, torch.finfo(embeddings.dtype).eps)
    step = max(1, embeddings.shape[1] // 16)
    # Nearly always the first columns settle it.
    for columns in (slice(0, None, step), slice(None)):
        low, high = embeddings[:, columns].amin(0).double(), embeddings[:, columns].amax(0).double()
        if (high - low).max() > tolerance * torch.maximum(-low, high).max():
            return False
    return True


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32, whatever the surrounding program allows: no TF32, no bfloat16, no autocast."""
    if not hasattr(torch.backends.cuda.matmul, 'fp32_precision'):  # torch 2.8
        before = torch.get_float32_matmul_precision()
        restore = [lambda: torch.set_float32_matmul_precision(before)]
        torch.set_float32_matmul_precision('highest')
    else:
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        # Not the older switch, which refuses to be read once a program has used the newer ones.
        restore = [partial(setattr, backend, 'fp32_precision', backend.fp32_precision) for backend in backends]
        for backend in backends:
            backend.fp32_precision = 'ieee'
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for undo in restore:
            undo()


def _rounded(value: float) -> float:
    """To eight binary digits, so that integer embeddings, whose products are exact, keep their ties."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def _with_company(rows: Tensor) -> Tensor:
    """Ascending indices of the rows that occur more than once."""
    _, group, size = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    return (size[group] > 1).nonzero().flatten()


def _describe_not_finite(embeddings: Tensor, squares: Tensor, name: str) -> str:
    suspects = (~squares.isfinite()).nonzero().flatten().to(embeddings.device)
    bad = suspects[~embeddings[suspects].isfinite().all(1)]
    if len(bad):
        return f'{len(bad)} of {len(embeddings)} {name} embeddings hold NaN or Inf: rows {_first(bad)}'
    return (
        f'{len(suspects)} of {len(embeddings)} {name} embeddings are too long for {squares.dtype} '
        f'(rows {_first(suspects)}): normalise them'
    )


def _first(indices: Tensor, count: int = 5) -> str:
    return ', '.join(str(i) for i in indices[:count].tolist()) + (', …' if len(indices) > count else '')
