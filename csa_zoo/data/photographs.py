"""Corresponding patches from any photographs: the correspondence is known because the second view is computed.

A photograph is treated as a plane and looked at again by simulated cameras: tilted, turned, nearer or farther, in
other light, with blur, noise and JPEG. Keypoints are detected once, in the photograph; their position, scale and
orientation follow each view's homography with the errors that a detector would make, and a square of side 12 sigma,
as in PhotoTour, is cut around them.
"""

import os
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from .keypoints import cut_squares, detect_keypoints, opencv
from .patches import PatchSet, file_stamps, load_cached
from .views import View, ViewChange, look_again, render_view

SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp'}
FLATTEST = 3  # standard deviation in grey levels below which a patch shows nothing

# Whole scenes, so that no place is in both. The right view of the motorcycle is left out: it shows the points of the
# left one under other ids, which a loss would take for negatives.
BUNDLED = {
    'train': (
        'astronaut.png',
        'brick.png',
        'camera.png',
        'coins.png',
        'grass.png',
        'hubble_deep_field.jpg',
        'ihc.png',
        'moon.png',
        'motorcycle_left.png',
        'page.png',
        'retina.jpg',
    ),
    'test': ('chelsea.png', 'coffee.png', 'gravel.png', 'rocket.jpg', 'text.png'),
}


def bundled_photographs() -> dict[str, list[Path]]:
    """Real photographs that come with scikit-image's wheel, split by scene.

    Returns:
        Paths under 'train' and 'test'. Nothing is downloaded, and scikit-image is not imported.

    Raises:
        ModuleNotFoundError: If scikit-image is not installed.
        FileNotFoundError: If the installed version lacks one of the files, which would change the split.
    """
    spec = find_spec('skimage')
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError('the bundled photographs are scikit-image\'s: pip install "csa_zoo[photos]"')
    folder = Path(spec.origin).parent / 'data'
    split = {name: [folder / file for file in files] for name, files in BUNDLED.items()}
    missing = [path.name for paths in split.values() for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f'{folder} lacks {missing}: pip install --upgrade "scikit-image>=0.24"')
    return split


def cut_photographs(
    paths: str | Path | Sequence[str | Path],
    *,
    views: int = 6,
    points_per_photo: int = 800,
    seed: int = 0,
    size: int = 32,
    min_side: float = 16.0,
    max_image_side: int = 1600,
    change: ViewChange | None = None,
    progress: bool = True,
) -> PatchSet:
    """Cut corresponding patches from photographs.

    A photograph's patches depend on its own file (content and name), the arguments and the library versions, not on
    the other photographs. The result is cached; see `csa_zoo.data.patches.cache_folder`.

    Args:
        paths: A folder (searched with its subfolders), a photograph, or several of either.
        views: Patches of a point: one from the photograph itself, the others from simulated views.
        points_per_photo: Most points of a photograph; they are spread over it, strong ones first.
        seed: Seed of the views.
        size: Side of the patches, 32 or 64.
        min_side: Smallest square cut, in pixels of the photograph; smaller ones would only be enlarged.
        max_image_side: Longer photographs are reduced to it first.
        change: Limits of the simulated views.
        progress: Show a progress bar, on a terminal.

    Returns:
        The patches, a point's together, points in order of the photographs; no pairs (see `verification_pairs`).

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        FileNotFoundError: If there is no photograph.
        ValueError: If a photograph cannot be decoded, an argument is out of range, or nothing could be cut.
    """
    if size not in (32, 64):
        raise ValueError(f'size must be 32 or 64, not {size!r}')
    if views < 2 or points_per_photo < 1:
        raise ValueError(f'views is {views} and points_per_photo {points_per_photo}, but the least are 2 and 1')
    change = change or ViewChange()
    files = find_photographs(paths)
    opencv()

    def cut(path: Path) -> tuple[np.ndarray, np.ndarray]:
        image = read_grey(path, max_image_side)
        rng = np.random.default_rng([seed, zlib.crc32(path.name.encode())])
        return _cut_photograph(image, views, points_per_photo, min_side, size, change, rng)

    def build(entry: Path) -> None:
        patches, ids, points = [], [], 0
        # OpenCV lets go of the interpreter while it works, so threads are enough.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            done = tqdm(
                zip(files, pool.map(cut, files), strict=True),
                total=len(files),
                desc='cutting patches',
                unit='photo',
                disable=None if progress else True,
            )
            for path, (new_patches, new_ids) in done:
                if not len(new_ids):
                    warnings.warn(f'{path}: no keypoint with two usable views, so no patch comes from it', stacklevel=4)
                    continue
                patches.append(new_patches)
                ids.append(new_ids + points)
                points += int(new_ids[-1]) + 1
        if not patches:
            raise ValueError(
                f'no patch in {len(files)} photographs, the first being {files[0]}: they are too flat, or smaller '
                f'than a few squares of min_side={min_side}'
            )
        np.save(entry / 'patches.npy', np.concatenate(patches))
        np.save(entry / 'point_ids.npy', np.concatenate(ids))

    settings = [views, points_per_photo, seed, size, min_side, max_image_side, asdict(change)]
    key = ['photographs', 1, opencv().__version__, settings, [str(path) for path in files], file_stamps(files)]
    return PatchSet(*load_cached('photographs', key, build))


def find_photographs(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The photographs among and below `paths`, in order, a folder's sorted by name.

    Raises:
        FileNotFoundError: If a path does not exist or there is no photograph.
    """
    files = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path).expanduser().resolve()
        if path.is_dir():
            files += sorted(file for file in path.rglob('*') if file.suffix.lower() in SUFFIXES and file.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f'no photograph or folder {path}')
    if not files:
        raise FileNotFoundError(f'no photograph in {paths!s}: it needs files ending in {", ".join(sorted(SUFFIXES))}')
    return list(dict.fromkeys(files))


def read_grey(path: Path, max_side: int) -> np.ndarray:
    """A photograph as (H, W) uint8, turned as its EXIF says, its longer side at most `max_side` pixels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no complete image, or holds numbers that are not grey levels.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I;16'):
                grey = (np.asarray(image) >> 8).astype(np.uint8)
            elif image.mode in ('I', 'F'):
                raise ValueError(f'{path} holds {image.mode}-type numbers without a range: save it with 8 or 16 bits')
            else:
                grey = np.asarray(image.convert('L'))
    except FileNotFoundError as error:
        raise FileNotFoundError(f'no photograph {path}') from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f'{path} cannot be decoded ({error}): repair it or leave it out') from error
    scale = max_side / max(grey.shape)
    if scale >= 1:
        return grey
    cv2 = opencv()
    width, height = (max(1, round(side * scale)) for side in grey.shape[::-1])
    return cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA)


def _cut_photograph(
    image: np.ndarray,
    views: int,
    most: int,
    min_side: float,
    size: int,
    change: ViewChange,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Patches (N, size, size) and ids (N,) from 0 of one photograph, a point's patches together."""
    keypoints = detect_keypoints(image, most, min_side)
    if not len(keypoints.sigma):
        return np.empty((0, size, size), np.uint8), np.empty(0, np.int64)
    # Twice as many views as a point uses, so that points of one photograph differ in what they are seen in.
    looks = [look_again(image.shape, keypoints, change, rng) for _ in range(2 * (views - 1))]
    looks.insert(0, View(None, image.shape, keypoints, np.ones(len(keypoints.sigma), bool)))
    chosen = _choose_views(np.stack([look.usable for look in looks]), views, rng)

    patches, points = [], []
    for look, used in zip(looks, chosen, strict=True):
        seen = image if look.homography is None else render_view(image, look, change, rng)
        patches.append(cut_squares(seen, look.keypoints.chosen(used), size))
        points.append(np.flatnonzero(used))
    patches, points = np.concatenate(patches), np.concatenate(points)

    kept = patches.std((1, 2), dtype=np.float32) >= FLATTEST
    kept &= np.bincount(points[kept], minlength=points.max() + 1)[points] >= 2
    order = np.flatnonzero(kept)
    order = order[np.argsort(points[order], kind='stable')]
    return patches[order], np.unique(points[order], return_inverse=True)[1].astype(np.int64)


def _choose_views(usable: np.ndarray, views: int, rng: np.random.Generator) -> np.ndarray:
    """(V, K) choice of at most `views` usable ones per point at random, always the first, which is the photograph."""
    key = np.where(usable, rng.random(usable.shape), 2.0)
    key[0] = -1
    rank = key.argsort(0).argsort(0)
    return usable & (rank < views)
