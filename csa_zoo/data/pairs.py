"""Training batches of corresponding patches, drawn where the patches are, without a worker or a loop over patches.

Sampling follows Mishchuk et al., "Working hard to know your neighbor's margins" (HardNet, NeurIPS 2017).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .jitter import Augmentation, Jitter, JitterDraw, draw_jitter, flip_coins, flip_patches, jitter_patches
from .patches import PatchSet, PointMembers, seeded_generator


class PairSampler:
    """Batches of (anchor, positive) patch indices in which no 3-D point comes twice.

    A hardest-in-batch loss takes every other pair for a negative, so a point that came twice would be pushed away
    from itself. Points are therefore permuted and the permutation is cut into batches; a further permutation starts
    at a batch boundary, and what is left of the last one is dropped (other points each time). All batches are full.

    An epoch depends on (seed, epoch) alone: it can be repeated, and training resumed at its start goes on bit for bit.
    Each process draws the whole batch and keeps its block of rows, so that the blocks joined by rank are the batch of
    a single process.

    Args:
        point_ids: (N,) int64; indices are drawn and given on its device. Points with one patch are left out.
        batch_size: Pairs in a batch, over all processes.
        pairs_per_epoch: Pairs in an epoch, over all processes, rounded down to whole batches; by default the number
            of points with two patches or more.
        seed: Seed of all epochs.
        rank: This process, from 0.
        world: Number of processes; it must divide `batch_size`.

    Raises:
        ValueError: If a batch or an epoch cannot be filled, or the processes cannot share a batch evenly.
    """

    def __init__(
        self,
        point_ids: Tensor,
        batch_size: int,
        *,
        pairs_per_epoch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._members = PointMembers(point_ids)
        points = len(self._members.usable)
        pairs = points if pairs_per_epoch is None else pairs_per_epoch
        if not 1 <= batch_size <= points:
            raise ValueError(
                f'batch_size is {batch_size}, but a batch holds a point at most once and {points} points have two '
                f'patches or more: choose 1 to {points}, or use more data'
            )
        if pairs < batch_size:
            raise ValueError(f'pairs_per_epoch is {pairs}, less than one batch of {batch_size}')
        if not 0 <= rank < world or batch_size % world:
            raise ValueError(
                f'rank {rank} of {world} cannot take its share of batch_size {batch_size}: rank must be below world, '
                'and world must divide batch_size'
            )
        self.batch_size, self.seed = batch_size, seed
        share = batch_size // world
        self.rows = slice(rank * share, (rank + 1) * share)
        self._batches = pairs // batch_size

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._batches

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's anchor and positive indices, (batch_size / world,) int64 each, batch by batch."""
        members = self._members
        generator = seeded_generator(members.device, self.seed, epoch)
        per_permutation = len(members.usable) // self.batch_size
        for start in range(0, len(self), per_permutation):
            used = min(per_permutation, len(self) - start) * self.batch_size
            order = torch.randperm(len(members.usable), generator=generator, device=members.device)[:used]
            anchors, positives = members.draw(members.usable[order], generator)
            for anchor, positive in zip(anchors.split(self.batch_size), positives.split(self.batch_size), strict=True):
                yield anchor[self.rows], positive[self.rows]


class PairBatches:
    """Training batches of corresponding patches: drawn, gathered and augmented where the patches are.

    All that is random is drawn for the whole batch and then cut to this process's rows, so that several processes
    see together exactly what one would.

    Args:
        patch_set: The patches; move it to the training device first where it fits.
        batch_size: Pairs in a batch, over all processes.
        pairs_per_epoch: As in `PairSampler`.
        aug: Flips, the same for both patches of a pair; see `flip_coins`.
        jitter: Further changes, drawn for each patch on its own.
        seed: Seed of all epochs.
        rank: This process, from 0.
        world: Number of processes.

    Raises:
        ValueError: As `PairSampler` and `flip_coins`.
    """

    def __init__(
        self,
        patch_set: PatchSet,
        batch_size: int,
        *,
        pairs_per_epoch: int | None = None,
        aug: Augmentation | None = None,
        jitter: Jitter | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sampler = PairSampler(
            patch_set.point_ids, batch_size, pairs_per_epoch=pairs_per_epoch, seed=seed, rank=rank, world=world
        )
        self.patches, self.aug, self.jitter = patch_set.patches, aug, jitter
        if aug is not None:
            flip_coins(0, aug, seeded_generator('cpu', 0))  # a wrong name fails here, not in the first batch

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.sampler)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Anchors and positives, each (batch_size / world, 1, S, S) float32 in [0, 1], batch by batch."""
        sampler = self.sampler
        generator = seeded_generator(self.patches.device, sampler.seed, epoch, 1)
        for indices in sampler.epoch(epoch):
            pairs = self.patches[torch.stack(indices, 1)]
            if self.aug is not None:
                # Flips come before the conversion: a byte moves faster than a float.
                pairs = flip_patches(pairs, flip_coins(sampler.batch_size, self.aug, generator)[sampler.rows])
            pairs = pairs.float().div_(255)
            if self.jitter is not None:
                draw = draw_jitter(self.jitter, (sampler.batch_size, 2, pairs.shape[-1]), generator)
                pairs = jitter_patches(pairs, JitterDraw(*(field[sampler.rows] for field in draw)))
            anchors, positives = pairs.unbind(1)
            yield anchors.unsqueeze(1), positives.unsqueeze(1)


class MixedBatches:
    """Batches that are filled from several sources, each with its share, so that no batch lacks a kind of data.

    Args:
        sources: Batches of each source, of as many pairs as its share. An epoch ends with the shortest.
    """

    def __init__(self, sources: Sequence[PairBatches]) -> None:
        self.sources = sources

    def __len__(self) -> int:
        """Batches in an epoch."""
        return min(map(len, self.sources))

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Anchors and positives of all sources, one source after another, as `PairBatches.epoch` gives them."""
        for parts in zip(*(source.epoch(epoch) for source in self.sources), strict=False):
            anchors, positives = zip(*parts, strict=True)
            yield torch.cat(anchors), torch.cat(positives)
