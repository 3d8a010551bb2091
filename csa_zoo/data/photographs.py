"""Corresponding patches from any photographs: the correspondence is known because the second view is computed.

A photograph is treated as a plane and looked at again by simulated cameras: tilted, turned, nearer or farther, in
other light, with blur, noise and JPEG. Keypoints are detected once, in the photograph; their position, scale and
orientation follow each view's homography with the errors that a detector would make, and a square of side 12 sigma,
as in PhotoTour, is cut around them. The construction follows the simulated views of Lepetit & Fua, "Keypoint
recognition using randomized trees" (TPAMI 2006), and HPatches' detection noise (Balntas et al., CVPR 2017).
"""

import math
import os
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from scipy.spatial import cKDTree
from tqdm.auto import tqdm

from .patches import PatchSet, file_stamps, load_cached

SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp'}
MAGNIFICATION = 12  # side of the cut square in sigmas
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


@dataclass(frozen=True)
class ViewChange:
    """How far a simulated view may be from the photograph: limits of what is drawn uniformly, and detector noise.

    Attributes:
        tilt: Degrees between the camera's axis and the photograph's normal.
        rotation: Degrees about the camera's axis, either way.
        scale: Smallest and largest magnification.
        position_noise: Standard deviation of the keypoint's position, in sigmas of the keypoint.
        scale_noise: ... of its scale, in octaves.
        angle_noise: ... of its orientation, in degrees. All three are cut at two standard deviations, which for
            these values is about what PhotoTour accepts as one point: 5 of 64 pixels, 1/4 octave, 22.5 degrees.
        contrast: Octaves of gain about mid-grey, either way.
        brightness: Grey level added, of 1, either way.
        gamma: Octaves of exponent, either way.
        blur: Standard deviation in pixels of the view.
        noise: Standard deviation of Gaussian noise in grey levels of 1.
        jpeg_quality: Lowest quality; the highest is 95.

    Raises:
        ValueError: If a value is out of its range.
    """

    tilt: float = 50.0
    rotation: float = 30.0
    scale: tuple[float, float] = (0.7, 1.4)
    position_noise: float = 0.4
    scale_noise: float = 0.125
    angle_noise: float = 11.0
    contrast: float = 0.5
    brightness: float = 0.15
    gamma: float = 0.5
    blur: float = 1.0
    noise: float = 0.025
    jpeg_quality: int = 40

    def __post_init__(self) -> None:
        low, high = self.scale
        allowed = {'tilt': (self.tilt <= 70, '0 to 70'), 'jpeg_quality': (1 <= self.jpeg_quality <= 95, '1 to 95')}
        allowed['scale'] = (0 < low <= high < math.inf, 'two numbers above 0, the smaller first')
        for name, value in vars(self).items():
            right, text = allowed.get(name, (True, 'a finite number from 0'))
            if not right or (name != 'scale' and not 0 <= value < math.inf):
                raise ValueError(f'ViewChange {name} is {value}, but it must be {text}')


class _Keypoints(NamedTuple):
    xy: np.ndarray  # (K, 2) pixels, a pixel's centre being an integer
    sigma: np.ndarray  # (K,) pixels
    angle: np.ndarray  # (K,) radians, from x towards y


class _View(NamedTuple):
    """One look at a photograph: its homography (None for the photograph itself) and the keypoints in it."""

    homography: np.ndarray | None
    shape: tuple[int, int]
    keypoints: _Keypoints
    usable: np.ndarray  # (K,) bool


def _cv2() -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        message = 'cutting patches from photographs needs OpenCV: pip install "csa_zoo[photos]"'
        raise ModuleNotFoundError(message) from error
    return cv2


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
    _cv2()

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
    key = ['photographs', 1, _cv2().__version__, settings, [str(path) for path in files], file_stamps(files)]
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
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f'{path} cannot be decoded ({error}): repair it or leave it out') from error
    scale = max_side / max(grey.shape)
    if scale >= 1:
        return grey
    cv2 = _cv2()
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
    keypoints = _detect(image, most, min_side)
    if not len(keypoints.sigma):
        return np.empty((0, size, size), np.uint8), np.empty(0, np.int64)
    # Twice as many views as a point uses, so that points of one photograph differ in what they are seen in.
    looks = [_look_again(image.shape, keypoints, change, rng) for _ in range(2 * (views - 1))]
    looks.insert(0, _View(None, image.shape, keypoints, np.ones(len(keypoints.sigma), bool)))
    chosen = _choose_views(np.stack([look.usable for look in looks]), views, rng)

    patches, points = [], []
    for look, used in zip(looks, chosen, strict=True):
        seen = image if look.homography is None else _render(image, look, change, rng)
        patches.append(_cut_squares(seen, look.keypoints, np.flatnonzero(used), size))
        points.append(np.flatnonzero(used))
    patches, points = np.concatenate(patches), np.concatenate(points)

    kept = patches.std((1, 2), dtype=np.float32) >= FLATTEST
    kept &= np.bincount(points[kept], minlength=points.max() + 1)[points] >= 2
    order = np.flatnonzero(kept)
    order = order[np.argsort(points[order], kind='stable')]
    return patches[order], np.unique(points[order], return_inverse=True)[1].astype(np.int64)


def _detect(image: np.ndarray, most: int, min_side: float) -> _Keypoints:
    """SIFT keypoints whose square lies inside the image, spread over it, no two alike."""
    # Without the precise upscale all positions are a quarter of a pixel too far right and down.
    found = _cv2().SIFT_create(contrastThreshold=0.02, enable_precise_upscale=True).detect(image, None)
    table = np.array([(*k.pt, k.size / 2, math.radians(k.angle), k.response) for k in found]).reshape(-1, 5)
    table = table[np.lexsort(table.T)[::-1]]  # strongest first, and the same order whatever the detector's threads did
    keypoints = _Keypoints(table[:, :2], table[:, 2], table[:, 3])
    inside = _inside(_corners(keypoints), image.shape) & (MAGNIFICATION * keypoints.sigma >= min_side)
    keypoints = _Keypoints(*(field[inside] for field in keypoints))
    order = _spread(keypoints.xy, image.shape, most)
    order = order[_distinct(keypoints.xy[order], keypoints.sigma[order])][:most]
    return _Keypoints(*(field[order] for field in keypoints))


def _spread(xy: np.ndarray, shape: tuple[int, int], most: int) -> np.ndarray:
    """Order that takes the strongest point of every cell, then the second ones, and so on; `xy` is strongest first."""
    cell = math.sqrt(shape[0] * shape[1] / most) * 2
    column, row = (xy // cell).astype(int).T
    cells = row * (int(shape[1] // cell) + 1) + column
    by_cell = np.argsort(cells, kind='stable')
    _, start, counts = np.unique(cells[by_cell], return_index=True, return_counts=True)
    rank = np.empty(len(xy), int)
    rank[by_cell] = np.arange(len(xy)) - np.repeat(start, counts)
    return np.argsort(rank, kind='stable')


def _distinct(xy: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Whether each point is kept when, in order, those that show what a kept one shows are dropped.

    Alike are two points within 4 pixels, or twice the larger sigma, whose scales differ by less than a factor of 1.6.
    """
    kept = np.ones(len(xy), bool)
    if len(xy) < 2:
        return kept
    # Distances and scales are compared in groups of like scale, so that a coarse point does not search all fine ones.
    octave = np.log(sigma) / np.log(1.6)
    near = [set() for _ in xy]
    for low in range(math.floor(octave.min()), math.floor(octave.max()) + 1):
        group = np.flatnonzero((octave >= low) & (octave < low + 2))
        if len(group) < 2:
            continue
        pairs = group[cKDTree(xy[group]).query_pairs(max(4.0, 2 * sigma[group].max()), output_type='ndarray')]
        a, b = pairs.T
        radius = np.maximum(4.0, 2 * np.maximum(sigma[a], sigma[b]))
        alike = (np.abs(octave[a] - octave[b]) < 1) & (np.linalg.norm(xy[a] - xy[b], axis=1) < radius)
        for first, second in np.sort(pairs[alike], axis=1).tolist():
            near[first].add(second)
    for first, others in enumerate(near):
        if kept[first] and others:
            kept[list(others)] = False
    return kept


def _corners(keypoints: _Keypoints) -> np.ndarray:
    """(K, 4, 2) corners of the squares."""
    half = MAGNIFICATION / 2 * keypoints.sigma
    u = np.stack([np.cos(keypoints.angle), np.sin(keypoints.angle)], -1) * half[:, None]
    v = np.stack([-u[:, 1], u[:, 0]], -1)
    signs = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    return keypoints.xy[:, None] + signs[:, :1] * u[:, None] + signs[:, 1:] * v[:, None]


def _inside(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Whether all of (K, 4, 2) points are inside an image."""
    return ((points >= 0) & (points <= (shape[1] - 1, shape[0] - 1))).all((1, 2))


def _look_again(shape: tuple[int, int], keypoints: _Keypoints, change: ViewChange, rng: np.random.Generator) -> _View:
    """A simulated view and where a detector would report the keypoints in it."""
    homography, canvas = _draw_homography(shape, change, rng)
    jacobian = _jacobian(homography, keypoints.xy)
    determinant = np.linalg.det(jacobian)
    # SIFT's orientation is that of a gradient, which transforms as a normal does: by the inverse transpose.
    gradient = np.stack([np.cos(keypoints.angle), np.sin(keypoints.angle)], -1)[..., None]
    gradient = (np.linalg.inv(jacobian).swapaxes(-1, -2) @ gradient)[..., 0]

    noise = rng.standard_normal((4, len(keypoints.sigma))).clip(-2, 2)
    sigma = keypoints.sigma * np.sqrt(determinant)
    seen = _Keypoints(
        _map(homography, keypoints.xy) + change.position_noise * (sigma * noise[:2]).T,
        sigma * 2 ** (change.scale_noise * noise[2]),
        np.arctan2(gradient[:, 1], gradient[:, 0]) + np.radians(change.angle_noise) * noise[3],
    )
    # Where the square's corners come from inside the photograph, all of it does.
    usable = _inside(_map(np.linalg.inv(homography), _corners(seen)), shape)
    return _View(homography, canvas, seen, usable)


def _draw_homography(
    shape: tuple[int, int], change: ViewChange, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int]]:
    """A camera's view of the photograph as a plane, and the (height, width) that just holds it."""
    height, width = shape
    # Cameras are spread evenly over the cap of the sphere that the tilt allows.
    tilt = math.acos(rng.uniform(math.cos(math.radians(change.tilt)), 1))
    turn = math.radians(rng.uniform(-change.rotation, change.rotation))
    axis = rng.uniform(0, 2 * np.pi)
    scale = math.exp(rng.uniform(*np.log(change.scale)))
    distance = max(shape) * rng.uniform(1.5, 3)  # of the camera, in pixels; a near one gives strong perspective
    rotation = _about_z(turn + axis) @ _about_x(tilt) @ _about_z(-axis)
    camera = np.diag([scale * distance, scale * distance, 1.0])
    plane = np.column_stack([rotation[:, :2], [0, 0, distance]])
    homography = camera @ plane @ _translation(-(width - 1) / 2, -(height - 1) / 2)
    border = np.array([(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)], float)
    seen = _map(homography, border)
    low, high = np.floor(seen.min(0)), np.ceil(seen.max(0))
    canvas = (high - low + 1).astype(int)
    return _translation(*-low) @ homography, (int(canvas[1]), int(canvas[0]))


def _about_z(angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([(cos, -sin, 0), (sin, cos, 0), (0, 0, 1)])


def _about_x(angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([(1, 0, 0), (0, cos, -sin), (0, sin, cos)])


def _translation(x: float, y: float) -> np.ndarray:
    return np.array([(1, 0, x), (0, 1, y), (0, 0, 1)], float)


def _map(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    mapped = points @ homography[:, :2].T + homography[:, 2]
    return mapped[..., :2] / mapped[..., 2:]


def _jacobian(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(K, 2, 2) derivative of the homography at (K, 2) points."""
    depth = points @ homography[2, :2] + homography[2, 2]
    mapped = _map(homography, points)
    return (homography[:2, :2] - mapped[..., None] * homography[2, :2]) / depth[:, None, None]


def _choose_views(usable: np.ndarray, views: int, rng: np.random.Generator) -> np.ndarray:
    """(V, K) choice of at most `views` usable ones per point at random, always the first, which is the photograph."""
    key = np.where(usable, rng.random(usable.shape), 2.0)
    key[0] = -1
    rank = key.argsort(0).argsort(0)
    return usable & (rank < views)


def _render(image: np.ndarray, view: _View, change: ViewChange, rng: np.random.Generator) -> np.ndarray:
    """What a camera would deliver of a view: geometry, light, blur, noise and JPEG, (H, W) uint8."""
    cv2 = _cv2()
    light = _light_curve(change, rng)
    blur, noise = rng.uniform(0, [change.blur, 255 * change.noise])
    seen = light[_warp(image, view)]
    if blur > 0.2:
        seen = cv2.GaussianBlur(seen, (0, 0), blur)
    seen += np.float32(noise) * rng.standard_normal(seen.shape, dtype=np.float32)
    seen = seen.round().clip(0, 255).astype(np.uint8)
    quality = int(rng.integers(change.jpeg_quality, 96))
    _, stream = cv2.imencode('.jpg', seen, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(stream, cv2.IMREAD_GRAYSCALE)


def _light_curve(change: ViewChange, rng: np.random.Generator) -> np.ndarray:
    """(256,) float32 grey level that each grey level becomes."""
    limits = np.array([change.contrast, change.gamma, change.brightness])
    contrast, gamma, brightness = rng.uniform(-limits, limits)
    level = np.linspace(0, 1, 256) ** (2**gamma)
    return (255 * ((level - 0.5) * 2**contrast + 0.5 + brightness).clip(0, 1)).astype(np.float32)


def _warp(image: np.ndarray, view: _View) -> np.ndarray:
    """The view, sampled finely enough that no pixel of the photograph is skipped, then averaged down."""
    cv2 = _cv2()
    height, width = image.shape
    border = np.array([(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)], float)
    shrink = np.linalg.svd(_jacobian(view.homography, border), compute_uv=False).min()
    fine = math.ceil(1 / shrink)
    centre = (fine - 1) / 2  # a pixel's centre among the fine samples that are averaged into it
    homography = np.array([(fine, 0, centre), (0, fine, centre), (0, 0, 1)]) @ view.homography
    rows, columns = view.shape
    seen = cv2.warpPerspective(
        image, homography, (fine * columns, fine * rows), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return seen if fine == 1 else cv2.resize(seen, (columns, rows), interpolation=cv2.INTER_AREA)


def _cut_squares(image: np.ndarray, keypoints: _Keypoints, chosen: np.ndarray, size: int) -> np.ndarray:
    """(len(chosen), size, size) upright patches of the chosen keypoints' squares.

    Each pixel is the mean of 2x2 samples, taken from the pyramid level where they are at most a pixel apart.
    """
    cv2 = _cv2()
    samples = 2 * size
    step = MAGNIFICATION * keypoints.sigma / samples
    level = np.maximum(0, np.ceil(np.log2(step))).astype(int)
    pyramid = [image]
    while len(pyramid) <= level[chosen].max(initial=0):
        pyramid.append(cv2.pyrDown(pyramid[-1]))

    step = step / 2.0**level
    cos, sin = step * np.cos(keypoints.angle), step * np.sin(keypoints.angle)
    linear = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    centre = keypoints.xy / 2.0 ** level[:, None] - linear.sum(-1) * (samples - 1) / 2
    affine = np.concatenate([linear, centre[..., None]], -1)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    fine = np.empty((len(chosen), samples, samples), np.uint8)
    for number, k in enumerate(chosen.tolist()):
        cv2.warpAffine(
            pyramid[level[k]], affine[k], (samples, samples), fine[number], flags, borderMode=cv2.BORDER_REPLICATE
        )
    sums = fine.reshape(-1, size, 2, size, 2).sum((2, 4), dtype=np.uint16)
    return ((sums + 2) >> 2).astype(np.uint8)
