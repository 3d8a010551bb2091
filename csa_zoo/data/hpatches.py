"""HPatches (Balntas et al., CVPR 2017): patch strips, descriptors as CSV files, and full images with homographies.

A sequence shows N points of a scene in a reference image and in five others. Each of the five is cut at three levels of
noise in position, size and shape (easy, hard, tough), which makes sixteen patches of a point, in the order of
`PATCH_TYPES`. Whatever is given "by sequence" is a mapping from its name to an array of shape (16, N, ...).
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .patches import PatchSet, file_stamps, load_cached

PATCH_TYPES = ('ref', *(f'{noise}{image}' for noise in 'eht' for image in range(1, 6)))
STRIP_WIDTH = 65


def load_hpatches(root: str | Path, size: int = 32, progress: bool = True) -> dict[str, Tensor]:
    """Read the patches of all sequences in a folder such as `hpatches-release`.

    The folder holds `<sequence>/<type>.png`: strips of grey 65x65 patches one below the other, equally many in all
    sixteen. Names of sequences begin with `i_` (the light changes) or `v_` (the viewpoint does). The decoded patches
    are cached as a memory-mapped array; see `csa_zoo.data.patches.cache_folder`.

    Args:
        root: The folder.
        size: 65 as stored, or 64 or 32 by the bilinear resize without antialiasing that OpenCV does, to the bit.
        progress: Show a progress bar while decoding, on a terminal.

    Returns:
        (16, N, size, size) uint8 by sequence, names ascending; views of one memory map.

    Raises:
        FileNotFoundError: If there is no sequence, or one of its strips is missing.
        ValueError: If a strip is not as above, or a folder of strips is not named so.
    """
    root = Path(root).expanduser().resolve()
    if size not in (32, 64, STRIP_WIDTH):
        raise ValueError(f'size must be 32, 64 or {STRIP_WIDTH}, not {size!r}')
    strips = {folder.name: _find_strips(folder) for folder in _sequence_folders(root, 'ref.png')}
    counts = {name: _count_patches(paths) for name, paths in strips.items()}
    paths = [path for paths in strips.values() for path in paths]
    number = np.repeat(list(counts.values()), len(PATCH_TYPES))
    start = np.concatenate([[0], np.cumsum(number)])

    def build(entry: Path) -> None:
        shape = (int(start[-1]), size, size)
        patches = np.lib.format.open_memmap(entry / 'patches.npy', mode='w+', dtype=np.uint8, shape=shape)

        def decode(index: int) -> None:
            patches[start[index] : start[index + 1]] = _resize(_read_strip(paths[index]), size)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            jobs = pool.map(decode, range(len(paths)))
            for _ in tqdm(jobs, f'decoding {root.name}', len(paths), disable=None if progress else True):
                pass
        patches.flush()
        np.save(entry / 'point_ids.npy', _point_ids(counts.values()))

    stamps = [[name, *file_stamps(paths)] for name, paths in strips.items()]
    patches, _ = load_cached(f'hpatches-{root.name}', ['hpatches', 1, str(root), size, stamps], build)
    views = patches.split([len(PATCH_TYPES) * count for count in counts.values()])
    return {name: view.view(len(PATCH_TYPES), -1, size, size) for name, view in zip(counts, views, strict=True)}


def as_patch_set(patches: Mapping[str, Tensor]) -> PatchSet:
    """Patches by sequence as one set to train on or to draw verification pairs from: a point has its sixteen patches.

    Args:
        patches: (16, N, S, S) uint8 by sequence, for instance of a split's training sequences.

    Raises:
        ValueError: If there is no sequence.
    """
    if not patches:
        raise ValueError('as_patch_set needs the patches of at least one sequence')
    ids = _point_ids([stack.shape[1] for stack in patches.values()])
    return PatchSet(torch.cat([stack.flatten(0, 1) for stack in patches.values()]), torch.from_numpy(ids))


def _point_ids(counts: Iterable[int]) -> np.ndarray:
    bounds = np.cumsum([0, *counts])
    ids = [np.tile(np.arange(first, last), len(PATCH_TYPES)) for first, last in pairwise(bounds)]
    return np.concatenate(ids).astype(np.int64)


def _sequence_folders(root: Path, marker: str) -> list[Path]:
    folders = sorted(path.parent for path in root.glob(f'*/{marker}'))
    if not folders:
        raise FileNotFoundError(f'no */{marker} in {root}: name the folder that holds the sequences i_* and v_*')
    for folder in folders:
        if not folder.name.startswith(('i_', 'v_')):
            raise ValueError(
                f'{folder}: the name of a sequence must begin with i_ (changes of light) or v_ (of viewpoint): '
                'rename the folder'
            )
    return folders


def _find_strips(folder: Path) -> list[Path]:
    paths = [folder / f'{patch_type}.png' for patch_type in PATCH_TYPES]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f'{folder} lacks {", ".join(missing)}: unpack the archive again')
    return paths


def _count_patches(paths: Sequence[Path]) -> int:
    """Patches in each of a sequence's strips, by their headers alone."""
    counts = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                width, height = image.size
        except OSError as error:
            raise ValueError(f'{path} is no image ({error}): unpack the archive again') from error
        if width != STRIP_WIDTH or height % STRIP_WIDTH:
            raise ValueError(
                f'{path} is {width}x{height} pixels, but a strip is {STRIP_WIDTH} wide and a multiple of {STRIP_WIDTH} '
                'high: use the original files, not resized ones'
            )
        counts[path.name] = height // STRIP_WIDTH
    if len(set(counts.values())) > 1:
        raise ValueError(
            f'the strips of {paths[0].parent} hold different numbers of patches, {counts}: unpack the archive again'
        )
    return next(iter(counts.values()))


def _read_strip(path: Path) -> np.ndarray:
    """(N, 65, 65) uint8."""
    try:
        with Image.open(path) as image:
            strip = np.asarray(image if image.mode == 'L' else image.convert('L'))
    except (OSError, SyntaxError) as error:  # Pillow's name for a damaged PNG chunk
        raise ValueError(f'{path} cannot be decoded ({error}): unpack the archive again') from error
    return strip.reshape(-1, STRIP_WIDTH, STRIP_WIDTH)


def _resize(patches: np.ndarray, size: int) -> np.ndarray:
    """(N, S, S) to (N, size, size) uint8, in the fixed-point arithmetic of OpenCV's bilinear resize."""
    side = patches.shape[-1]
    if size == side:
        return patches
    position = ((np.arange(size) + 0.5) * (side / size) - 0.5).astype(np.float32)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, side - 1)
    fraction = position - low.astype(np.float32)
    right, left = (np.rint(2048 * f).astype(np.int32) for f in (fraction, 1 - fraction))
    x = patches.astype(np.int32)
    x = (x[:, :, low] * left + x[:, :, high] * right) >> 4
    above, below = (x[:, low] * left[:, None]) >> 16, (x[:, high] * right[:, None]) >> 16
    return ((above + below + 2) >> 2).astype(np.uint8)


def save_hpatches_csv(descriptors: Mapping[str, Tensor | np.ndarray], folder: str | Path) -> None:
    """Write descriptors as the benchmark reads them: `<folder>/<sequence>/<type>.csv`, a row for each patch.

    Args:
        descriptors: (16, N, D) by sequence.
        folder: Named like the descriptor; made if need be. Digits suffice to get the same float32 numbers back.

    Raises:
        ValueError: If an array has not this shape.
    """
    for name, stack in tqdm(descriptors.items(), 'writing CSV', disable=None):
        stack = stack.detach().float().cpu().numpy() if isinstance(stack, Tensor) else np.asarray(stack)
        if stack.ndim != 3 or len(stack) != len(PATCH_TYPES):
            raise ValueError(f'descriptors of {name} must be of shape (16, N, D), not {stack.shape}')
        target = Path(folder).expanduser() / name
        target.mkdir(parents=True, exist_ok=True)
        for patch_type, rows in zip(PATCH_TYPES, stack, strict=True):
            np.savetxt(target / f'{patch_type}.csv', rows, '%.9g', ',')


def load_hpatches_csv(folder: str | Path, packed_bits: bool = False) -> dict[str, np.ndarray]:
    """Read descriptors in the benchmark's layout, `<folder>/<sequence>/<type>.csv`; delimited by `,` or by `;`.

    Args:
        folder: Of one descriptor.
        packed_bits: Numbers are bytes of a binary descriptor: unpack each to eight zeros and ones.

    Returns:
        (16, N, D) float32 by sequence, names ascending.

    Raises:
        FileNotFoundError: If there is no sequence, or one of its files is missing.
        ValueError: If a file is no table of numbers, or tables differ in shape.
    """
    descriptors = {}
    folders = _sequence_folders(Path(folder).expanduser(), 'ref.csv')
    for sequence in tqdm(folders, 'reading CSV', disable=None):
        paths = [sequence / f'{patch_type}.csv' for patch_type in PATCH_TYPES]
        tables = [_read_table(path) for path in paths]
        for path, table in zip(paths, tables, strict=True):
            if table.shape != tables[0].shape:
                raise ValueError(
                    f'{path} has {table.shape[0]} rows of {table.shape[1]} numbers, but {paths[0].name} beside it '
                    f'{tables[0].shape[0]} of {tables[0].shape[1]}: describe all patches of the sequence again'
                )
        stack = np.stack(tables)
        if packed_bits:
            if not ((stack >= 0) & (stack < 256) & (stack == np.floor(stack))).all():
                raise ValueError(f'{sequence} holds numbers that are no bytes: read it with packed_bits=False')
            stack = np.unpackbits(stack.astype(np.uint8), axis=-1).astype(np.float32)
        descriptors[sequence.name] = stack
    return descriptors


def _read_table(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f'{path.parent} lacks {path.name}: a sequence has one file for each of its 16 types')
    with path.open() as lines:
        first = lines.readline()
    try:
        table = np.loadtxt(path, np.float32, delimiter=';' if ';' in first else ',', ndmin=2)
    except ValueError as error:
        raise ValueError(f'{path} is no table of numbers ({error})') from error
    if not table.size:
        raise ValueError(f'{path} is empty: describe all patches of the sequence again')
    if table.shape[1] < 2:
        raise ValueError(f'{path} has {table.shape[1]} numbers in a row: delimit them by "," or by ";"')
    return table


@dataclass(frozen=True)
class ImageSequence:
    """Photographs of a plane, with the homographies between them.

    Attributes:
        name: Begins with `i_` if the light changes, with `v_` if the viewpoint does.
        images: The reference, then the five others.
        homographies: (5, 3, 3) float64, from pixels of the reference to pixels of each of the others.
    """

    name: str
    images: tuple[Path, ...]
    homographies: np.ndarray


def find_hpatches_sequences(root: str | Path) -> list[ImageSequence]:
    """The sequences of a folder such as `hpatches-sequences-release`: `<sequence>/1.ppm ... 6.ppm, H_1_2 ... H_1_6`.

    Returns:
        All sequences, names ascending. The images are not read.

    Raises:
        FileNotFoundError: If there is no sequence, or one of its files is missing.
        ValueError: If a homography is not nine numbers, or is singular, or a folder is not named `i_*` or `v_*`.
    """
    sequences = []
    for folder in _sequence_folders(Path(root).expanduser(), '1.ppm'):
        images = tuple(folder / f'{number}.ppm' for number in range(1, 7))
        matrices = [folder / f'H_1_{number}' for number in range(2, 7)]
        missing = [path.name for path in (*images, *matrices) if not path.is_file()]
        if missing:
            raise FileNotFoundError(f'{folder} lacks {", ".join(missing)}: unpack the archive again')
        homographies = np.stack([_read_homography(path) for path in matrices])
        sequences.append(ImageSequence(folder.name, images, homographies))
    return sequences


def _read_homography(path: Path) -> np.ndarray:
    try:
        matrix = np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise ValueError(f'{path} is no table of numbers ({error})') from error
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or np.linalg.matrix_rank(matrix) < 3:
        raise ValueError(f'{path} is no homography, but {matrix.tolist()}: unpack the archive again')
    return matrix
