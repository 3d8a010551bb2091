"""HPatches' three tasks (Balntas et al., CVPR 2017), as its Python code and as its MATLAB code score them.

The two differ in average precision: the area under the curve by trapezoids, or the mean precision at the positives
(the "step", never smaller). Both follow from the number of negatives that precede each positive, which is all that is
counted here; nothing of the size of queries times distractors is sorted or stored.
"""

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from csa_zoo.data.hpatches_tasks import HPatchesTasks
from csa_zoo.evaluation.distances import Proximity
from csa_zoo.evaluation.patches import average_precision

NOISE = ('easy', 'hard', 'tough')
POOLS = (100, 500, 1000, 5000, 10000, 15000, 20000)
PAIRS_AT_ONCE = 1 << 16


def hpatches_metrics(
    descriptors: Mapping[str, Tensor | np.ndarray], tasks: HPatchesTasks, official_ties: bool = False
) -> dict[str, float]:
    """Patch verification, image matching and patch retrieval on HPatches, with Euclidean distances.

    Papers report `verification`, `matching` and `retrieval`, in %. Each is the mean over the noise levels easy, hard
    and tough, given as `verification_easy` and so on; `..._step` has the other average precision.

    * `verification`: average precision of telling a fifth of the positive pairs from all the negative ones, mean over
      negatives from other sequences (`verification_easy_inter`, ...) and from the same (`..._intra`).
      `verification_auc`: area under the ROC curve with all positive pairs. MATLAB's number is `verification_step`.
    * `matching`: average precision of the nearest neighbours in each other image, by distance, where a patch whose
      neighbour is wrong costs recall; mean over images and sequences. `matching_success`: share of right neighbours.
      `matching_figure` and, with steps, `matching_matlab`: mean of the means of sequences with changes of light
      (`i_*`) and of viewpoint (all others).
    * `retrieval`: mean over pools of 100 to 20000 patches, as in the benchmark's figure, and `retrieval@20000` and so
      on each by itself: average precision of finding five patches of a query's point among them and the first
      distractors of other sequences. `retrieval_matlab`: with steps, among all distractors.

    Args:
        descriptors: (16, N, D) floating point or integer by sequence, on one device, types in the order of
            `csa_zoo.data.hpatches.PATCH_TYPES`. Further sequences are left out.
        tasks: What is compared; see `csa_zoo.data.hpatches_tasks`.
        official_ties: Of equal distances the official code takes the positive first in retrieval, the first index in
            matching and the negative in verification, so that constant descriptors retrieve perfectly. The default
            decides all ties against the descriptor. Distances count as equal within the rounding of their type.

    Returns:
        All in [0, 1].

    Raises:
        ValueError: If a sequence is missing or too small, shapes differ, or a descriptor is NaN or infinite.
    """
    tasks.check(descriptors)
    stacks = _Stacks(descriptors, tasks.sequences)
    return {
        **_verification(stacks, tasks),
        **_matching(stacks, official_ties),
        **_retrieval(stacks, tasks, official_ties),
    }


class _Stacks:
    """The descriptors, checked, sequence by sequence, where they are and as they are."""

    def __init__(self, descriptors: Mapping[str, Tensor | np.ndarray], names: tuple[str, ...]) -> None:
        self.names = names
        self.stacks = [_as_stack(descriptors[name], name) for name in names]
        first = self.stacks[0]
        for name, stack in zip(names, self.stacks, strict=True):
            if stack.shape[2] != first.shape[2] or stack.device != first.device:
                raise ValueError(
                    f'descriptors of {name} have {stack.shape[2]} dimensions on {stack.device}, '
                    f'but those of {names[0]} {first.shape[2]} on {first.device}'
                )
        self.device, self.dim = first.device, first.shape[2]
        double = any(stack.dtype == torch.float64 for stack in self.stacks)
        self.dtype = torch.float64 if double else torch.float32

    def image(self, sequence: int, row: int) -> Tensor:
        """(N, D) descriptors of one patch type."""
        return self.stacks[sequence][row].to(self.dtype)

    def gather(self, sequences: np.ndarray, rows: np.ndarray, indices: np.ndarray) -> Tensor:
        """(M, D) descriptors of any patches, given each by its sequence, its type and its index."""
        result = torch.empty(len(sequences), self.dim, dtype=self.dtype, device=self.device)
        order = np.argsort(sequences, kind='stable')
        present, starts = np.unique(sequences[order], return_index=True)
        for sequence, where in zip(present, np.split(order, starts[1:]), strict=True):
            row, index, where = (
                torch.from_numpy(x.astype(np.int64)).to(self.device) for x in (rows[where], indices[where], where)
            )
            result[where] = self.stacks[sequence][row, index].to(self.dtype)
        return result

    def squared_distances(self, pairs: np.ndarray, noise: int) -> Tensor:
        """(P,) squared distances of pairs (P, 6) whose images other than the reference have this noise."""
        distances = []
        for rows in np.array_split(pairs, -(-len(pairs) // PAIRS_AT_ONCE)):
            first = self.gather(rows[:, 0], _patch_type(rows[:, 1], noise), rows[:, 2])
            second = self.gather(rows[:, 3], _patch_type(rows[:, 4], noise), rows[:, 5])
            distances.append(first.sub_(second).square_().sum(1))
        return torch.cat(distances)


def _as_stack(values: Tensor | np.ndarray, name: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='The given NumPy array is not writable')
        stack = torch.as_tensor(values).detach()
    if stack.ndim != 3 or stack.shape[0] != 16 or 0 in stack.shape:
        raise ValueError(f'descriptors of {name} must be of shape (16, N, D), not {tuple(stack.shape)}')
    broken = ~stack.isfinite().all(2)
    if broken.any():
        row, index = broken.nonzero()[0].tolist()
        raise ValueError(
            f'{int(broken.sum())} of {broken.numel()} descriptors of {name} are NaN or infinite, '
            f'the first of them [{row}, {index}]'
        )
    return stack


def _patch_type(images: np.ndarray, noise: int) -> np.ndarray:
    """Rows of the sixteen types for images 0 (the reference) to 5."""
    return np.where(images > 0, 5 * noise + images, 0)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _verification(stacks: _Stacks, tasks: HPatchesTasks) -> dict[str, float]:
    fifth = int(0.2 * len(tasks.positives))
    if not fifth:
        raise ValueError(f'{len(tasks.positives)} positive pairs, but verification needs five at least')
    metrics, steps, areas = {}, [], []
    for noise, level in enumerate(tqdm(NOISE, 'verification', disable=None, leave=False)):
        positives = stacks.squared_distances(tasks.positives, noise)
        for kind in ('inter', 'intra'):
            negatives = stacks.squared_distances(getattr(tasks, kind), noise).sort().values
            # Negatives at a positive's own distance precede it.
            before = torch.searchsorted(negatives, positives, right=True)
            trapezoid, step = average_precision(before[:fifth].sort().values, fifth)
            metrics[f'verification_{level}_{kind}'] = trapezoid.item()
            steps.append(step.item())
            areas.append(1 - before.double().mean().item() / len(negatives))
    by_level = {
        f'verification_{n}': _mean([metrics[f'verification_{n}_{k}'] for k in ('inter', 'intra')]) for n in NOISE
    }
    headline = {
        'verification': _mean(list(metrics.values())),
        'verification_step': _mean(steps),
        'verification_auc': _mean(areas),
    }
    return {**headline, **by_level, **metrics}


def _matching(stacks: _Stacks, official_ties: bool) -> dict[str, float]:
    results = torch.empty(len(stacks.names), len(NOISE), 5, 3, dtype=torch.float64, device=stacks.device)
    for sequence in tqdm(range(len(stacks.names)), 'matching', disable=None, leave=False):
        reference = stacks.image(sequence, 0)
        for noise in range(len(NOISE)):
            for image in range(5):
                other = stacks.image(sequence, 5 * noise + image + 1)
                results[sequence, noise, image] = torch.stack(_match(reference, other, official_ties))
    by_sequence = results.mean(2).cpu().numpy()
    trapezoid, step, success = np.moveaxis(by_sequence, 2, 0)
    light = np.array([name.startswith('i_') for name in stacks.names])
    groups = [group for group in (light, ~light) if group.any()]
    return {
        'matching': trapezoid.mean().item(),
        'matching_step': step.mean().item(),
        'matching_figure': _mean([trapezoid[group].mean().item() for group in groups]),
        'matching_matlab': _mean([step[group].mean().item() for group in groups]),
        'matching_success': success.mean().item(),
        **{f'matching_{level}': trapezoid[:, noise].mean().item() for noise, level in enumerate(NOISE)},
    }


def _match(reference: Tensor, other: Tensor, official_ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Average precision by trapezoids and by steps, and success rate, of matching row i to row i."""
    proximity = Proximity(reference, other)
    own = torch.arange(len(reference), device=reference.device)
    nearest = torch.empty_like(own)
    for rows, scores in proximity.chunks('matching'):
        if official_ties:
            best = scores.amax(1, keepdim=True)
            nearest[rows] = (scores >= best - _rounding(proximity, rows, best)).byte().argmax(1)  # the first of them
        else:
            here = own[rows, None]
            right = scores.gather(1, here)
            right -= _rounding(proximity, rows, right)
            rival, index = scores.scatter_(1, here, -torch.inf).max(1)
            nearest[rows] = torch.where(right.squeeze(1) > rival, own[rows], index)
    correct = nearest == own
    distance = (reference - other[nearest]).square_().sum(1)
    order = own if official_ties else correct.byte().argsort(stable=True)
    order = order[distance[order].argsort(stable=True)]
    correct = correct[order]
    before = (~correct).cumsum(0)[correct]
    return *average_precision(before, len(own)), correct.double().mean()


def _rounding(proximity: Proximity, queries: slice, scores: Tensor) -> Tensor:
    """(chunk, k) least differences from scores (chunk, k) that are no accident of a matrix product's rounding."""
    # They are in proportion to the squared length of the longer vector, which is at most twice as long as the query or
    # as the distance that the score stands for. Longer rows are farther away: they must not widen the tolerance.
    squares = proximity.squared_distances(queries, scores.clone())
    largest = torch.maximum(squares, proximity.query_norms[queries, None])
    limits = torch.finfo(proximity.dtype)
    return largest.mul_(limits.eps * (4 + proximity.query.shape[1] ** 0.5 / 2)).clamp_(min=limits.tiny)


def _retrieval(stacks: _Stacks, tasks: HPatchesTasks, official_ties: bool) -> dict[str, float]:
    queries = tasks.queries[tasks.queries[:, 0].argsort(kind='stable')]
    before = _distractors_before(stacks, queries, tasks.distractors, official_ties)
    trapezoid, step = (values.mean(0).cpu().numpy() for values in average_precision(before, 5))
    pools = trapezoid[:, :-1]
    return {
        'retrieval': pools.mean().item(),
        'retrieval_step': step[:, :-1].mean().item(),
        'retrieval_matlab': step[:, -1].mean().item(),
        **{f'retrieval@{size}': pools[:, pool].mean().item() for pool, size in enumerate(POOLS)},
        **{f'retrieval_{level}': pools[noise].mean().item() for noise, level in enumerate(NOISE)},
    }


def _distractors_before(stacks: _Stacks, queries: np.ndarray, distractors: np.ndarray, official_ties: bool) -> Tensor:
    """Distractors of other sequences than the query's that precede each of its positives.

    Args:
        stacks: The descriptors.
        queries: (Q, 2), a sequence's together.
        distractors: (R, 2).
        official_ties: Let the positive precede its equals.

    Returns:
        (Q, 3, 8, 5) by noise, pool (the last of all distractors) and positive, nearest first.
    """
    sequence, index = queries.T
    query = stacks.gather(sequence, np.zeros_like(sequence), index)
    positives = [
        (query - stacks.gather(sequence, np.full_like(sequence, row), index)).square_().sum(1) for row in range(1, 16)
    ]
    squares = torch.stack(positives, 1).view(-1, 3, 5).sort(2).values.flatten(1)

    source, index = distractors.T
    proximity = Proximity(query, stacks.gather(source, np.zeros_like(source), index))
    needed = (proximity.query_norms[:, None] + proximity.offset - squares) / 2
    rounding = _rounding(proximity, slice(None), needed)
    needed += rounding if official_ties else -rounding
    counts = torch.empty(len(query), 15, len(POOLS) + 1, dtype=proximity.dtype, device=proximity.device)
    for rows, scores in proximity.chunks('retrieval'):
        present, starts = np.unique(sequence[rows], return_index=True)
        for number, start, end in zip(present, starts, [*starts[1:], len(scores)], strict=True):
            pools = _pools(source != number, stacks.names[number]).to(scores)
            block = slice(rows.start + start, rows.start + end)
            nearer = torch.empty_like(scores[start:end])
            for positive in range(15):
                torch.ge(scores[start:end], needed[block, positive, None], out=nearer)
                torch.mm(nearer, pools, out=counts[block, positive])  # with `out` autocast cannot round the counts
    return counts.view(-1, 3, 5, len(POOLS) + 1).transpose(2, 3)


def _pools(foreign: np.ndarray, name: str) -> Tensor:
    """Membership of the distractors (R,) in the pools, (R, 8), given which of them are of another sequence."""
    if not foreign.any():
        raise ValueError(f'all distractors are of {name}, the sequence of a query: retrieval needs others')
    # A pool has the five positives and, in the order of the list, as many distractors as fill it.
    limits = np.array([*(size - 5 for size in POOLS), len(foreign)])
    return torch.from_numpy(foreign[:, None] & (foreign.cumsum()[:, None] <= limits))
