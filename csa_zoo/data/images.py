"""Images decoded once: a memory-mapped array of resized images, batches gathered from it, augmentation on the device.

Person images are small and few enough to be kept decoded: all of Market-1501 at 384x128 is 5.3 GB, which the page cache
serves at memory speed, to all processes of a machine at once. What is left for training is one gather per batch on the
CPU, and batched tensor code on the device for flips, crops and normalisation. The resized pixels are those of timm's
and torchvision's transforms, bit for bit.

Source: the augmentation of Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification" (CVPR-W
2019). Random erasing is timm's `RandomErasing`.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import datasets
import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .patches import cache_folder

# To be raised with every change that alters the content of a cached array.
_FORMAT = 1
# Images in flight: enough to keep the threads busy, few enough to weigh nothing.
_IMAGES_PER_ROUND = 512
_BATCHES_AHEAD = 3
_NAMES_IN_MESSAGE = 100


class BrokenImagesError(ValueError):
    """Images that cannot be decoded.

    Attributes:
        broken: The reason for each path.
    """

    def __init__(self, broken: Mapping[str, str], total: int) -> None:
        self.broken = dict(broken)
        lines = [f'{len(broken):,} of {total:,} images cannot be decoded; restore or remove them:']
        lines += [f'  {path}: {reason}' for path, reason in list(broken.items())[:_NAMES_IN_MESSAGE]]
        if len(broken) > _NAMES_IN_MESSAGE:
            lines.append(f'  and {len(broken) - _NAMES_IN_MESSAGE:,} more, all in the attribute `broken` of this error')
        super().__init__('\n'.join(lines))


def cache_images(
    paths: Sequence[str | Path],
    size: tuple[int, int],
    *,
    interpolation: str = 'bilinear',
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> np.memmap:
    """Decode and resize images once, in parallel, into a file that is mapped into memory.

    Each image is converted to RGB and resized to exactly `size`, as timm's evaluation transform does with
    `crop_mode='squash'` and `crop_pct=1`. The file is found again by the images' absolute paths, sizes and modification
    times. Processes that ask for the same array at once wait for the one that makes it; a killed one leaves nothing
    that would be taken for an array.

    Args:
        paths: Image files.
        size: Height and width.
        interpolation: `nearest`, `bilinear`, `bicubic`, `box`, `hamming` or `lanczos`, always with antialiasing.
        cache_dir: Where the arrays are kept; None for `images` in `$CSA_ZOO_CACHE` or `~/.cache/csa_zoo`.
        workers: Decoding threads; None for one per available core.
        progress: Show a progress bar where the standard error is a terminal.

    Returns:
        (N, H, W, 3) uint8, read-only, in the order of `paths`.

    Raises:
        BrokenImagesError: If images are missing, empty, truncated or no images; names all of them.
        ValueError: If there is no path, or size or interpolation is impossible.
        OSError: If the disk has no room.
    """
    height, width = size
    if not len(paths) or min(height, width) < 1:
        raise ValueError(f'{len(paths)} images at {height}x{width} make no array')
    try:
        resampling = Image.Resampling[interpolation.upper()]
    except KeyError:
        known = ', '.join(filter_.name.lower() for filter_ in Image.Resampling)
        raise ValueError(f'interpolation must be one of {known}, not {interpolation!r}') from None
    paths = [os.path.abspath(path) for path in paths[:]]  # a column of a data set is slow one by one
    folder = Path(cache_dir).expanduser() if cache_dir is not None else cache_folder() / 'images'
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f'{len(paths)}x{height}x{width}-{_digest(paths, size, interpolation)}.npy'
    if not target.exists():
        with FileLock(target.with_suffix('.lock')):
            if not target.exists():
                _build(paths, (height, width), resampling, target, workers or num_cores(), progress)
    return np.load(target, mmap_mode='r', allow_pickle=False)


def cache_splits(data: datasets.DatasetDict, size: tuple[int, int], **options: Any) -> dict[str, np.ndarray]:
    """`cache_images` for each split of `load_reid`; broken images of all of them are named at once.

    Args:
        data: Splits with a column path. One may be empty.
        size: Height and width.
        **options: As for `cache_images`.

    Returns:
        (N, H, W, 3) uint8 for each split.
    """
    images, broken = {}, {}
    for split, rows in data.items():
        try:
            images[split] = cache_images(rows['path'][:], size, **options) if len(rows) else _no_images(size)
        except BrokenImagesError as error:
            broken.update(error.broken)
    if broken:
        raise BrokenImagesError(broken, sum(map(len, data.values())))
    return images


def _no_images(size: tuple[int, int]) -> np.ndarray:
    return np.empty((0, *size, 3), np.uint8)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _digest(paths: Sequence[str], size: tuple[int, int], interpolation: str) -> str:
    files = [[path, *_stamp(path)] for path in paths]
    return hashlib.sha256(json.dumps([_FORMAT, list(size), interpolation, files]).encode()).hexdigest()[:24]


def _stamp(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0  # it will be among the broken ones, so no array is ever kept under this digest
    return stat.st_size, stat.st_mtime_ns


def _build(
    paths: Sequence[str],
    size: tuple[int, int],
    resampling: Image.Resampling,
    target: Path,
    workers: int,
    progress: bool,
) -> None:
    """Write the array beside its place and move it there when it is complete. The caller holds the lock."""
    for leftover in target.parent.glob(f'{target.stem}.*.partial'):
        leftover.unlink(missing_ok=True)
    shape = (len(paths), *size, 3)
    needed, free = int(np.prod(shape)), shutil.disk_usage(target.parent).free
    if needed > free:
        raise OSError(
            f'{needed / 1e9:.1f} GB are needed in {target.parent}, where {free / 1e9:.1f} GB are free: make room, or '
            'set CSA_ZOO_CACHE to a folder on another disk'
        )
    broken = {}
    with _replacing(target) as file:
        header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
        np.lib.format.write_array_header_1_0(file, header)
        # Written, not mapped: a full disk is then an error and not a SIGBUS.
        for path, image in _decode_all(paths, size, resampling, workers, progress):
            if isinstance(image, str):
                broken[path] = image
            elif not broken:
                file.write(image.data)
        if broken:
            raise BrokenImagesError(broken, len(paths))


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its place only if nothing goes wrong."""
    partial = target.with_suffix(f'.{secrets.token_hex(4)}.partial')
    try:
        with partial.open('xb') as file:
            yield file
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _decode_all(
    paths: Sequence[str], size: tuple[int, int], resampling: Image.Resampling, workers: int, progress: bool
) -> Iterator[tuple[str, np.ndarray | str]]:
    """(path, pixels or what is wrong), in order."""
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(paths), desc='decoding images', unit='img', disable=None if progress else True) as bar,
    ):
        for start in range(0, len(paths), _IMAGES_PER_ROUND):
            some = paths[start : start + _IMAGES_PER_ROUND]
            for path, image in zip(some, pool.map(lambda path: _decode(path, size, resampling), some), strict=True):
                bar.update()
                yield path, image


def _decode(path: str, size: tuple[int, int], resampling: Image.Resampling) -> np.ndarray | str:
    """(H, W, 3) uint8, or what is wrong with the file."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert('RGB').resize((size[1], size[0]), resampling))
    # Pillow's decoders raise whatever the damaged bytes lead to: OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        return _reason(path, error)


def _reason(path: str, error: Exception) -> str:
    if not os.path.exists(path):
        return 'there is no such file'
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return 'the file is empty (0 bytes)'
    text = str(error).removesuffix(f' {path!r}')  # Pillow repeats the name at the end
    return text or type(error).__name__


def train_labels(dataset: datasets.Dataset) -> np.ndarray:
    """Class indices for training: the place of each person_id among the sorted different ones.

    Args:
        dataset: A training split of `load_reid`.

    Returns:
        (N,) int64 in 0..K-1. Class k is the person `np.unique(dataset['person_id'][:])[k]`.

    Raises:
        ValueError: If there is no image, or one is junk.
    """
    person_ids = np.asarray(dataset['person_id'][:], dtype=np.int64)
    if not len(person_ids):
        raise ValueError('there are no training images')
    if person_ids.min() < 0:
        raise ValueError(f'{(person_ids < 0).sum()} images have the id -1, which is nobody: train on the split train')
    return np.unique(person_ids, return_inverse=True)[1].astype(np.int64)


class PersonBatches:
    """Training batches of images: gathered in one step each, ahead of time, and augmented on the device.

    All that is random is drawn for the whole batch and then cut to this process's rows, so that several processes see
    together exactly what one would, whatever the device.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        *,
        flip: bool = True,
        padding: int = 0,
        images_per_person: int = 0,
        seed: int = 0,
        device: torch.device | str = 'cpu',
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Keep the arrays; nothing is copied.

        Args:
            images: (N, H, W, 3) uint8, as `cache_images` returns.
            labels: (N,) class indices.
            batch_size: Images in a batch, over all processes.
            flip: Mirror half of the images.
            padding: Shift each image by up to so many pixels in each direction; see `pad_crop`.
            images_per_person: Fill batches with so many images each of as many people as fit; 0 for images at random.
            seed: Seed of all epochs.
            device: Where the batches are wanted.
            rank: This process, from 0.
            world: Number of processes.

        Raises:
            ValueError: If shapes do not agree, or the batch is larger than the set or not divisible among processes.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f'images must be uint8 of shape (N, H, W, 3), not {images.dtype} {images.shape}')
        if len(images) != len(labels):
            raise ValueError(f'{len(images)} images, but {len(labels)} labels: one for each')
        if not 0 < batch_size <= len(images):
            raise ValueError(f'batch_size is {batch_size}, but must be 1 to {len(images)}, the number of images')
        if batch_size % world:
            raise ValueError(f'batch_size is {batch_size}, but must be a multiple of {world}, the number of processes')
        if padding < 0:
            raise ValueError(f'padding must not be negative, but is {padding}')
        if images_per_person and batch_size % images_per_person:
            raise ValueError(f'batch_size is {batch_size}, but must be a multiple of {images_per_person} per person')
        self.images, self.labels = images, np.asarray(labels, dtype=np.int64)
        self.batch_size, self.flip, self.padding, self.seed = batch_size, flip, padding, seed
        self.images_per_person = images_per_person
        self.device = torch.device(device)
        share = batch_size // world
        self.rows = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        """Batches in an epoch; the images that are left over wait for the next one."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the images in an order that depends on the seed and the epoch alone.

        Args:
            epoch: Number of the epoch.

        Yields:
            Images, (batch_size / world, 3, H, W) uint8 in the channels_last layout, and labels, (batch_size / world,)
            int64, both on the device.
        """
        rng = np.random.default_rng([self.seed, epoch])
        shape = len(self), self.batch_size
        if self.images_per_person:
            order = person_order(self.labels, self.images_per_person, rng)
        else:
            order = rng.permutation(len(self.images))
        order = order[: len(self) * self.batch_size].reshape(shape)[:, self.rows]
        coins = torch.from_numpy(rng.random(shape)[:, self.rows] < 0.5)
        shifts = torch.from_numpy(rng.integers(-self.padding, self.padding + 1, (*shape, 2))[:, self.rows])
        with ThreadPoolExecutor(1) as thread:
            ahead = deque(thread.submit(self._gather, index) for index in order[:_BATCHES_AHEAD])
            for step in range(len(order)):
                images, labels = (tensor.to(self.device, non_blocking=True) for tensor in ahead.popleft().result())
                if step + _BATCHES_AHEAD < len(order):
                    ahead.append(thread.submit(self._gather, order[step + _BATCHES_AHEAD]))
                if self.flip:
                    images = flip_images(images, coins[step])
                if self.padding:
                    images = pad_crop(images, shifts[step])
                yield images, labels

    def _gather(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        # Copied straight into pinned memory, from which the transfer to a GPU does not wait.
        pin = self.device.type == 'cuda'
        images = torch.empty((len(index), *self.images.shape[1:]), dtype=torch.uint8, pin_memory=pin)
        # The default mode would copy twice, to leave `out` untouched by an index that is out of range.
        np.take(self.images, index, axis=0, out=images.numpy(), mode='clip')
        return images.permute(0, 3, 1, 2), torch.from_numpy(self.labels[index])


def person_order(labels: np.ndarray, images_per_person: int, rng: np.random.Generator) -> np.ndarray:
    """Order of the images in which groups of one person follow each other, the groups in random order.

    Each image is in one group; a person's last group is filled up with images that are in another one.

    Args:
        labels: (N,) class indices, each of 0..K-1 at least once.
        images_per_person: Images in a group.
        rng: Source of the order.

    Returns:
        (M,) indices of images, M >= N.
    """
    shuffled = rng.permutation(len(labels))
    shuffled = shuffled[np.argsort(labels[shuffled], kind='stable')]  # one person after another
    counts = np.bincount(labels)
    rounded = -(-counts // images_per_person) * images_per_person
    person = np.repeat(np.arange(len(counts)), rounded)
    turn = np.arange(len(person)) - np.repeat(np.cumsum(rounded) - rounded, rounded)
    groups = shuffled[(np.cumsum(counts) - counts)[person] + turn % counts[person]].reshape(-1, images_per_person)
    return rng.permutation(groups).reshape(-1)


def flip_images(images: Tensor, coins: Tensor) -> Tensor:
    """Mirror left to right those images whose coin is true.

    Args:
        images: (B, C, H, W), any type.
        coins: (B,) bool, on any device.
    """
    return torch.where(coins.to(images.device, non_blocking=True).view(-1, 1, 1, 1), images.flip(-1), images)


def pad_crop(images: Tensor, shifts: Tensor) -> Tensor:
    """Shift each image; what comes in is black. The same as cutting a window out of an image padded with zeros.

    Args:
        images: (B, 3, H, W) uint8, before normalisation, so that zero is black.
        shifts: (B, 2) int64, pixels down and right, on any device.

    Returns:
        The same shape, in the channels_last layout.

    Raises:
        ValueError: If the images are not uint8.
    """
    _check_uint8(images)
    batch, _, height, width = images.shape
    down, right = shifts.to(images.device, non_blocking=True).T[:, :, None]
    rows = torch.arange(height, device=images.device) - down
    columns = torch.arange(width, device=images.device) - right
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    image = torch.arange(batch, device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[
        image, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    ]
    return (moved * inside[..., None]).permute(0, 3, 1, 2)


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """What `ToTensor` and `Normalize` do, for a batch: ((images / 255) - mean) / std, computed in float32.

    Args:
        images: (B, 3, H, W) uint8.
        mean: Of each channel, in 0..1.
        std: Of each channel.
        dtype: Of the result.

    Returns:
        (B, 3, H, W) in the memory layout of `images`; on a CPU in float32 bit-equal to torchvision.

    Raises:
        ValueError: If the images are not uint8, which may mean that they are normalised already.
    """
    _check_uint8(images)
    constants = torch.tensor([*mean, *std]).to(images.device, non_blocking=True).view(2, 1, -1, 1, 1)
    return images.float().div_(255).sub_(constants[0]).div_(constants[1]).to(dtype)


def _check_uint8(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f'images must be uint8 of shape (B, 3, H, W), not {images.dtype} {tuple(images.shape)}')
