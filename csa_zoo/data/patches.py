"""Local patches for descriptor learning: the set in memory, its verification pairs, and the cache of decoded patches.

A patch set is a uint8 tensor plus the id of the 3-D point that each patch shows; it fits in memory (PhotoTour's
Liberty at 32 pixels is 440 MiB) and may live on the training device, so that a batch is drawn, gathered and augmented
there by batched tensor code.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class PatchPairs(NamedTuple):
    """Pairs of patches that a verification test compares, each field of shape (P,).

    Attributes:
        index1: int64 index of the first patch.
        index2: int64 index of the second patch.
        is_match: bool, whether both show the same 3-D point.
    """

    index1: Tensor
    index2: Tensor
    is_match: Tensor


@dataclass(frozen=True)
class PatchSet:
    """Grey patches with the 3-D point that each one shows.

    Attributes:
        patches: (N, S, S) uint8.
        point_ids: (N,) int64, from 0; equal ids are corresponding patches.
        pairs: The set's verification pairs, if it has any.

    Raises:
        ValueError: If shapes, types or ranges are not these.
    """

    patches: Tensor
    point_ids: Tensor
    pairs: PatchPairs | None = None

    def __post_init__(self) -> None:
        patches, ids = self.patches, self.point_ids
        if patches.dtype != torch.uint8 or patches.ndim != 3 or patches.shape[1] != patches.shape[2]:
            raise ValueError(f'patches must be uint8 of shape (N, S, S), not {patches.dtype} {tuple(patches.shape)}')
        if ids.dtype != torch.int64 or ids.shape != patches.shape[:1]:
            raise ValueError(
                f'point_ids must be int64 of shape ({len(patches)},), one per patch, not {ids.dtype} {tuple(ids.shape)}'
            )
        if len(ids) and ids.min() < 0:
            raise ValueError(f'point_ids must not be negative, but one is {int(ids.min())}')
        if self.pairs is not None:
            _check_pairs(self.pairs, len(patches))

    def __len__(self) -> int:
        return len(self.patches)

    @property
    def num_points(self) -> int:
        """One more than the largest point id."""
        return int(self.point_ids.max()) + 1 if len(self) else 0

    def to(self, device: torch.device | str) -> 'PatchSet':
        """The same set with all its tensors on `device`."""
        pairs = self.pairs and PatchPairs(*(field.to(device) for field in self.pairs))
        return PatchSet(self.patches.to(device), self.point_ids.to(device), pairs)


def _check_pairs(pairs: PatchPairs, num_patches: int) -> None:
    if len({tuple(field.shape) for field in pairs}) != 1 or pairs.is_match.ndim != 1:
        raise ValueError(f'the fields of pairs must have one shape (P,), not {[tuple(f.shape) for f in pairs]}')
    if [field.dtype for field in pairs] != [torch.int64, torch.int64, torch.bool]:
        raise ValueError(f'pairs must be int64, int64, bool, not {[field.dtype for field in pairs]}')
    for index in pairs[:2]:
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < num_patches:
            raise ValueError(
                f'pairs name patches {int(index.min())} to {int(index.max())}, but the set has 0 to {num_patches - 1}'
            )


def concatenate(sets: Sequence[PatchSet]) -> PatchSet:
    """Several sets as one; points of different sets stay different points.

    Args:
        sets: Sets of one patch size on one device.

    Returns:
        All patches in order, with the verification pairs of those sets that have any.

    Raises:
        ValueError: If there is no set or the patch sizes differ.
    """
    if not sets:
        raise ValueError('concatenate needs at least one patch set')
    sizes = {patch_set.patches.shape[-1] for patch_set in sets}
    if len(sizes) > 1:
        raise ValueError(f'patch sets of different sizes {sorted(sizes)}: load them with the same size=')
    first_point = np.cumsum([0] + [patch_set.num_points for patch_set in sets])
    first_patch = np.cumsum([0] + [len(patch_set) for patch_set in sets])
    pairs = [
        PatchPairs(p.pairs.index1 + int(offset), p.pairs.index2 + int(offset), p.pairs.is_match)
        for p, offset in zip(sets, first_patch, strict=False)
        if p.pairs is not None
    ]
    return PatchSet(
        torch.cat([p.patches for p in sets]),
        torch.cat([p.point_ids + int(offset) for p, offset in zip(sets, first_point, strict=False)]),
        PatchPairs(*(torch.cat(field) for field in zip(*pairs, strict=True))) if pairs else None,
    )


def verification_pairs(patch_set: PatchSet, count: int, seed: int = 0) -> PatchPairs:
    """Equally many matching and non-matching pairs, shuffled, no pair twice.

    A matching pair is a point drawn uniformly, then two of its patches; a non-matching pair is two patches drawn
    uniformly among those of different points.

    Args:
        patch_set: The set to draw from.
        count: Number of pairs, even.
        seed: Seed of the draw.

    Returns:
        The pairs, on the set's device.

    Raises:
        ValueError: If `count` is not positive and even, or the set has too few pairs of a kind.
    """
    ids = patch_set.point_ids.cpu()
    members, size, half = PointMembers(ids), len(ids), count // 2
    matching = int((members.counts * (members.counts - 1) // 2).sum())
    available = min(matching, size * (size - 1) // 2 - matching)
    if count < 2 or count % 2 or half > available:
        raise ValueError(f'{count} pairs of this set: their number must be even, from 2 to {2 * available}')
    generator = seeded_generator('cpu', seed)

    def draw_matching(number: int) -> Tensor:
        points = torch.randint(len(members.usable), (number,), generator=generator)
        return torch.stack(members.draw(members.usable[points], generator), 1)

    def draw_non_matching(number: int) -> Tensor:
        pairs = torch.randint(size, (number, 2), generator=generator)
        return pairs[ids[pairs[:, 0]] != ids[pairs[:, 1]]]

    pairs = torch.cat([_draw_distinct(half, draw_matching), _draw_distinct(half, draw_non_matching)])
    order = torch.randperm(count, generator=generator)
    pairs = PatchPairs(*pairs[order].T.contiguous(), order < half)
    return PatchPairs(*(field.to(patch_set.point_ids.device) for field in pairs))


def _draw_distinct(count: int, draw: Callable[[int], Tensor]) -> Tensor:
    """(count, 2) different unordered pairs in the order drawn, the smaller index first."""
    pairs = np.empty((0, 2), np.int64)
    while len(pairs) < count:
        drawn = np.sort(draw(2 * count).numpy(), axis=1)
        pairs = np.concatenate([pairs, drawn])
        _, first = np.unique(pairs, axis=0, return_index=True)
        pairs = pairs[np.sort(first)]
    return torch.from_numpy(pairs[:count])


class PointMembers:
    """The patches of each point, as one sorted index with offsets."""

    def __init__(self, point_ids: Tensor) -> None:
        ids = point_ids.cpu()
        counts = torch.bincount(ids)
        self.device = point_ids.device
        self.order = torch.argsort(ids, stable=True).to(self.device)
        self.first = (counts.cumsum(0) - counts).to(self.device)
        self.counts = counts.to(self.device)
        self.usable = torch.nonzero(self.counts >= 2).flatten()

    def draw(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two distinct patches of each point, all ordered choices alike."""
        count = self.counts[points]
        u, v = torch.rand(2, len(points), generator=generator, device=self.device)
        first = (u * count).long()
        second = (first + 1 + (v * (count - 1)).long()) % count
        start = self.first[points]
        return self.order[start + first], self.order[start + second]


def seeded_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator of its own for each key; SeedSequence keeps the streams of neighbouring keys apart."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)


def cache_folder() -> Path:
    """Where decoded patches are kept: `$CSA_ZOO_CACHE`, else `~/.cache/csa_zoo`. It may be deleted at any time."""
    return Path(os.environ.get('CSA_ZOO_CACHE') or Path.home() / '.cache' / 'csa_zoo').expanduser()


def file_stamps(paths: Sequence[Path]) -> list[list]:
    """Name, size and modification time of each file: what a cache entry made of them depends on."""
    return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths]


def cache_entry(name: str, key: list, build: Callable[[Path], None]) -> Path:
    """The folder of a cache entry, made first where there is none for `key`.

    Args:
        name: Readable start of the entry's name.
        key: All that the content depends on, as JSON values.
        build: Writes the content into the folder it is given. The folder takes its place in the cache only when
            complete, so that a killed or a concurrent run leaves no half entry.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    entry = cache_folder() / f'{name}-{digest}'
    if not entry.is_dir():
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix='.building-') as work:
            new = Path(work) / 'entry'
            new.mkdir()
            build(new)
            try:
                new.rename(entry)
            except OSError:
                if not entry.is_dir():  # otherwise another process was first, with the same content
                    raise
    return entry


def load_cached(name: str, key: list, build: Callable[[Path], None]) -> tuple[Tensor, Tensor]:
    """The arrays of a patch set in the cache; `build`, as in `cache_entry`, writes `patches.npy` and `point_ids.npy`.

    Returns:
        Tensors over privately mapped files: opened at once, read when used, written to in memory only.
    """
    entry = cache_entry(name, key, build)
    patches = np.load(entry / 'patches.npy', mmap_mode='c', allow_pickle=False)
    point_ids = np.load(entry / 'point_ids.npy', allow_pickle=False)
    return torch.from_numpy(patches), torch.from_numpy(point_ids)
