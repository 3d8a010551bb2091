"""Patch sets in the PhotoTour layout (Winder, Hua & Brown, "Picking the best DAISY", CVPR 2009), read and written."""

import math
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .patches import PatchPairs, PatchSet, file_stamps, load_cached

PATCH_SIDE = 64
PATCHES_PER_ROW = 16
PATCHES_PER_FILE = PATCHES_PER_ROW**2
STANDARD_MATCHES = 'm50_100000_100000_0.txt'


def load_phototour(
    root: str | Path, size: int = 32, matches: str | Path | None = None, progress: bool = True
) -> PatchSet:
    """Read a folder in the PhotoTour (Brown, UBC) layout.

    The folder holds `patches*.bmp` (1024x1024 grey, 16x16 patches of 64x64, left to right, then top to bottom; the
    last one padded), `info.txt` (a row per patch, the 3-D point's id first) and match files. The decoded patches are
    cached as a memory-mapped array; see `csa_zoo.data.patches.cache_folder`.

    Args:
        root: The folder.
        size: 64, or 32 for the rounded mean of each 2x2 pixels, which is OpenCV's bilinear resize of uint8.
        matches: A match file (a path, or a name inside `root`) to take the pairs from; None takes
            `m50_100000_100000_0.txt`, or the only `m50_*.txt` there is, or no pairs where there is none.
        progress: Show a progress bar while decoding, on a terminal.

    Returns:
        The patches with ids renumbered to 0..K-1 in the order of the original ids.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file's content is not of this layout.
    """
    root = Path(root).expanduser().resolve()
    if size not in (32, PATCH_SIDE):
        raise ValueError(f'size must be 32 or {PATCH_SIDE}, not {size!r}')
    info, files = root / 'info.txt', sorted(root.glob('patches*.bmp'))
    if not info.is_file() or not files:
        missing = 'info.txt' if files else 'patches*.bmp'
        raise FileNotFoundError(f'no {missing} in {root}: name the folder that holds a PhotoTour set')

    def build(entry: Path) -> None:
        _, ids = np.unique(_read_point_ids(info), return_inverse=True)
        np.save(entry / 'point_ids.npy', ids.astype(np.int64))
        _decode_files(files, len(ids), size, entry / 'patches.npy', progress)

    key = ['phototour', 1, str(root), size, file_stamps([info, *files])]
    patches, ids = load_cached(f'phototour-{root.name}', key, build)
    matches = _find_matches(root, matches)
    return PatchSet(patches, ids, matches and _read_matches(matches, ids.numpy(), info))


def load_reference_images(root: str | Path) -> Tensor:
    """The reference image of each patch, from the first column of a PhotoTour folder's `interest.txt`.

    Points of one reference image are different points; those of two reference images may be the same place seen from
    both, so that only negatives of the same reference image are sure to be negatives.

    Returns:
        (N,) int64, in the order of `load_phototour`'s patches.

    Raises:
        FileNotFoundError: If there is no `interest.txt`.
        ValueError: If it is no table, or has not a line for each line of `info.txt`.
    """
    root = Path(root).expanduser()
    interest, info = root / 'interest.txt', root / 'info.txt'
    for path in (interest, info):
        if not path.is_file():
            raise FileNotFoundError(f'no {path.name} in {root}: reference images are only known where a set has it')
    images = _read_columns(interest, [0], 'it needs a line per patch, the id of its reference image first')[:, 0]
    patches = len(_read_point_ids(info))
    if len(images) != patches:
        raise ValueError(f'{interest} has {len(images)} lines and {info} {patches}: take both from one archive')
    return torch.from_numpy(images)


def check_free(root: str | Path) -> None:
    """Refuse a folder that holds a patch set, before work is done for it.

    Raises:
        FileExistsError: If there is one.
    """
    root = Path(root).expanduser()
    if (root / 'info.txt').exists() or any(root.glob('patches*.bmp')):
        raise FileExistsError(f'{root} holds a PhotoTour set: remove its files, or name another folder')


def save_phototour(
    root: str | Path, patch_set: PatchSet, reference_images: Tensor | None = None, progress: bool = True
) -> None:
    """Write a folder in the PhotoTour layout, as `load_phototour` and `load_reference_images` read it.

    Args:
        root: The folder, made where there is none.
        patch_set: Patches of 64x64; its P pairs go to `m50_<P>_<P>_0.txt`, in seven columns.
        reference_images: (N,) integer, from 0, for `interest.txt`; None writes none.
        progress: Show a progress bar, on a terminal.

    Raises:
        FileExistsError: If the folder holds a patch set.
        ValueError: If there is no patch, or its side is not 64, or the reference images are not one per patch.
    """
    root, patches, ids = Path(root).expanduser(), patch_set.patches.numpy(), patch_set.point_ids
    if patches.shape[1:] != (PATCH_SIDE, PATCH_SIDE) or not len(patches):
        raise ValueError(f'a PhotoTour set needs patches (N, {PATCH_SIDE}, {PATCH_SIDE}), not {patches.shape}')
    if reference_images is not None and reference_images.shape != ids.shape:
        raise ValueError(f'{len(ids)} patches, but reference_images has the shape {tuple(reference_images.shape)}')
    root.mkdir(parents=True, exist_ok=True)
    check_free(root)
    with tempfile.TemporaryDirectory(dir=root, prefix='.writing-') as work:
        work = Path(work)
        starts = range(0, len(patches), PATCHES_PER_FILE)
        digits = max(4, len(str(len(starts) - 1)))  # names are sorted when read
        bar = tqdm(starts, desc=f'writing {root.name}', unit='file', disable=None if progress else True)
        for number, start in enumerate(bar):
            mosaic = _lay_mosaic(patches[start : start + PATCHES_PER_FILE])
            Image.fromarray(mosaic).save(work / f'patches{number:0{digits}d}.bmp')
        if patch_set.pairs is not None:
            first, second, _ = patch_set.pairs
            table = torch.stack([first, ids[first], second, ids[second]], 1).tolist()
            lines = ''.join(f'{a} {p} 0 {b} {q} 0 0\n' for a, p, b, q in table)
            (work / f'm50_{len(table)}_{len(table)}_0.txt').write_text(lines)
        if reference_images is not None:
            (work / 'interest.txt').write_text(''.join(f'{image}\n' for image in reference_images.tolist()))
        # In this order a set that is not complete has no info.txt.
        for path in sorted(work.iterdir()):
            path.rename(root / path.name)
        (work / 'info.txt').write_text(''.join(f'{point} 0\n' for point in ids.tolist()))
        (work / 'info.txt').rename(root / 'info.txt')


def _read_columns(path: Path, columns: Sequence[int], kind: str) -> np.ndarray:
    """Integer columns of a text table, whatever the number of columns of each of its lines."""
    if path.stat().st_size == 0:
        raise ValueError(f'{path} is empty: {kind}')
    try:
        return np.loadtxt(path, dtype=np.int64, usecols=columns, ndmin=2)
    except (ValueError, IndexError) as error:
        raise ValueError(f'{path} is not a table of integers ({error}): {kind}') from error


def _read_point_ids(info: Path) -> np.ndarray:
    ids = _read_columns(info, [0], 'it needs a line "<3-D point id> 0" per patch')[:, 0]
    if ids.min() < 0:
        line = int(ids.argmin()) + 1
        raise ValueError(f'{info}, line {line}: the 3-D point id is {ids.min()}, but ids must not be negative')
    return ids


def _decode_files(files: Sequence[Path], count: int, size: int, target: Path, progress: bool) -> None:
    needed = math.ceil(count / PATCHES_PER_FILE)
    if len(files) != needed:
        raise ValueError(
            f'{files[0].parent} has {len(files)} patches*.bmp, but the {count} lines of info.txt need {needed}: '
            'files are missing or info.txt is cut short; unpack the archive again'
        )
    patches = np.lib.format.open_memmap(target, mode='w+', dtype=np.uint8, shape=(count, size, size))

    def decode(number: int) -> None:
        rows = patches[number * PATCHES_PER_FILE : (number + 1) * PATCHES_PER_FILE]
        rows[:] = _cut_mosaic(_read_mosaic(files[number]), size)[: len(rows)]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        bar = tqdm(
            total=needed, desc=f'decoding {files[0].parent.name}', unit='file', disable=None if progress else True
        )
        for _ in pool.map(decode, range(needed)):
            bar.update()
        bar.close()
    patches.flush()


def _read_mosaic(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            mosaic = np.asarray(image if image.mode == 'L' else image.convert('L'))
    except OSError as error:
        raise ValueError(f'{path} cannot be decoded ({error}): unpack the archive again') from error
    side = PATCH_SIDE * PATCHES_PER_ROW
    if mosaic.shape != (side, side):
        raise ValueError(
            f'{path} is {mosaic.shape[1]}x{mosaic.shape[0]} pixels, but a PhotoTour mosaic is {side}x{side}: '
            'use the original files, not resized ones'
        )
    return mosaic


def _cut_mosaic(mosaic: np.ndarray, size: int) -> np.ndarray:
    """(1024, 1024) to (256, size, size)."""
    if size < PATCH_SIDE:
        rows = mosaic[0::2].astype(np.uint16) + mosaic[1::2]
        mosaic = ((rows[:, 0::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)
    grid = mosaic.reshape(PATCHES_PER_ROW, size, PATCHES_PER_ROW, size)
    return grid.swapaxes(1, 2).reshape(PATCHES_PER_FILE, size, size)


def _lay_mosaic(patches: np.ndarray) -> np.ndarray:
    """At most 256 patches (N, 64, 64) to (1024, 1024), the rest black."""
    cells = np.zeros((PATCHES_PER_FILE, PATCH_SIDE, PATCH_SIDE), np.uint8)
    cells[: len(patches)] = patches
    rows = cells.reshape(PATCHES_PER_ROW, PATCHES_PER_ROW, PATCH_SIDE, PATCH_SIDE).swapaxes(1, 2)
    return rows.reshape(PATCHES_PER_ROW * PATCH_SIDE, PATCHES_PER_ROW * PATCH_SIDE)


def _find_matches(root: Path, matches: str | Path | None) -> Path | None:
    if matches is not None:
        for path in (root / matches, Path(matches).expanduser()):
            if path.is_file():
                return path
        raise FileNotFoundError(f'no match file {matches!s}; {root} has {sorted(p.name for p in root.glob("m*.txt"))}')
    if (root / STANDARD_MATCHES).is_file():
        return root / STANDARD_MATCHES
    found = sorted(root.glob('m50_*.txt'))
    if len(found) > 1:
        raise ValueError(f'{root} has several match files, {[p.name for p in found]}: choose one with matches=')
    return found[0] if found else None


def _read_matches(path: Path, ids: np.ndarray, info: Path) -> PatchPairs:
    # Lines of six and of seven columns are both in use, so columns are picked, never unpacked.
    table = _read_columns(path, [0, 1, 3, 4], 'its lines must be "patch1 point1 0 patch2 point2 0"')
    patch, point = table[:, [0, 2]], table[:, [1, 3]]
    outside = ((patch < 0) | (patch >= len(ids))).any(1)
    if outside.any():
        line = int(outside.argmax())
        raise ValueError(
            f'{path}, pair {line + 1}: patches {patch[line].tolist()}, but {info} has patches 0 to {len(ids) - 1}: '
            'take the match file of this very set'
        )
    original = _read_point_ids(info)[patch]
    wrong = (original != point).any(1)
    if wrong.any():
        line = int(wrong.argmax())
        raise ValueError(
            f'{path}, pair {line + 1}: points {point[line].tolist()}, but {info} gives {original[line].tolist()} for '
            f'patches {patch[line].tolist()}: take the match file of this very set'
        )
    index = torch.from_numpy(np.ascontiguousarray(patch.T))
    return PatchPairs(index[0], index[1], torch.from_numpy(point[:, 0] == point[:, 1]))
