"""Corresponding patches from a COLMAP reconstruction, as PhotoTour's were (Winder, Hua & Brown, CVPR 2009).

A point is looked at first in its reference photograph, the one that sees it most centrally: the scale where the
Laplacian is extreme there (Lindeberg, "Feature detection with automatic scale selection", IJCV 1998) and the dominant
gradient (Lowe, IJCV 2004) give the square of side 12 sigma. A COLMAP model has neither scales nor orientations of its
keypoints, and those that a detector finds in each photograph would differ by its errors, so the square is carried over
to the other photographs by the geometry: the surface is taken for a plane that faces the mean viewing direction, and
of the map between two photographs that this plane and the cameras give, the similarity is kept. The centre is always
the keypoint itself.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .colmap import PosedImage, Reconstruction, is_reconstruction, read_reconstruction, reconstruct
from .images import num_cores
from .keypoints import MAGNIFICATION, Keypoints, cut_squares, distinct, inside, opencv, square_corners
from .patches import PatchPairs, PatchSet, verification_pairs
from .photographs import FLATTEST
from .phototour import PATCH_SIDE, check_free, save_phototour

TRACK_LENGTH = 3  # photographs that must show a point
GRAZING = 60  # degrees from the mean viewing direction, beyond which a plane tells little of the surface
OFF_CENTRE = 5 / 64  # of the square's side: how far PhotoTour lets a keypoint be from the point's projection
LEVELS_PER_OCTAVE = 3  # of the scales that are tried
MEASURING_SIDE = 32  # pixels of the squares in which scale and orientation are measured
SQUARES_AT_ONCE = 1024

_OBSERVATION = np.dtype(
    [
        ('point', int),  # row of the reconstruction's points
        ('image', int),  # number of the photograph
        ('xy', float, 2),  # the keypoint, a pixel's centre being an integer
        ('offset', float),  # pixels from there to the point's projection
        ('facing', float),  # cosine of the angle between the viewing direction and the point's mean one
        ('jacobian', float, (2, 2)),  # of the projection, over the plane that faces the mean direction
        ('reference', int),  # number of the point's reference photograph
        ('sigma', float),  # of the square to cut, and its
        ('angle', float),
    ]
)


class ReconstructionPatches(NamedTuple):
    """What was cut.

    Attributes:
        patches: Patches of 64x64, a point's together.
        reference_images: (N,) int64 number of each patch's reference photograph, in the order of names.
        rejected: How many points were left out, for each reason.
    """

    patches: PatchSet
    reference_images: Tensor
    rejected: dict[str, int]


def make_patches(
    source: str | Path,
    output: str | Path,
    images: str | Path | None = None,
    *,
    pairs: int = 100_000,
    max_points: int = 100_000,
    seed: int = 0,
    progress: bool = True,
) -> ReconstructionPatches:
    """Write a PhotoTour folder from a COLMAP model, or from overlapping photographs.

    Args:
        source: Folder of a sparse model, or of photographs of one scene. These are reconstructed first (see
            `csa_zoo.data.colmap.reconstruct`) in `reconstruction`, a folder in `output`, which is used again.
        output: Folder to write.
        images: Folder of the photographs of a model.
        pairs: Verification pairs, half of them matching; fewer where the set has less than twice as many.
        max_points: Most points, drawn at random from more.
        seed: Seed of the reconstruction, of the points and of the pairs.
        progress: Show progress bars, on a terminal.

    Returns:
        The set that was written, with its pairs.

    Raises:
        ModuleNotFoundError: If OpenCV is missing, or pycolmap where it is needed.
        FileExistsError: If the folder holds a patch set.
        FileNotFoundError: If the model or a photograph is missing.
        ValueError: If a file's content is not what it should be, or nothing can be cut.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    check_free(output)
    opencv()
    if is_reconstruction(source):
        if images is None:
            raise ValueError(f'{source} is a COLMAP model: name the folder of its photographs too (--images DIR)')
    elif images is not None:
        raise FileNotFoundError(f'no COLMAP model (cameras, images and points3D, .bin or .txt) in {source}')
    else:
        images, source = source, reconstruct(source, output / 'reconstruction', seed=seed, progress=progress)
    cut = cut_reconstruction(read_reconstruction(source), images, max_points=max_points, seed=seed, progress=progress)
    patch_set = PatchSet(cut.patches.patches, cut.patches.point_ids, _draw_pairs(cut.patches, pairs, seed))
    save_phototour(output, patch_set, cut.reference_images, progress)
    return cut._replace(patches=patch_set)


def _draw_pairs(patch_set: PatchSet, most: int, seed: int) -> PatchPairs:
    counts = torch.bincount(patch_set.point_ids)
    matching = int((counts * (counts - 1) // 2).sum())
    others = len(patch_set) * (len(patch_set) - 1) // 2 - matching
    # At most half of a kind: pairs are drawn at random until there are enough, and the last ones are rarely drawn.
    return verification_pairs(patch_set, 2 * max(1, min(most // 2, matching // 2, others // 2)), seed)


def cut_reconstruction(
    reconstruction: Reconstruction,
    images: str | Path,
    *,
    min_side: float = 16.0,
    max_side: float = 256.0,
    max_points: int = 100_000,
    seed: int = 0,
    progress: bool = True,
) -> ReconstructionPatches:
    """Cut 64x64 patches around the points of a reconstruction, in all photographs that show them.

    Left out are points that fewer than three photographs show, that have no scale of their own, or that show what one
    with a longer track shows (as in `csa_zoo.data.keypoints.detect_keypoints`), and patches that leave the photograph,
    are flat, or off the point's projection. A point with fewer than two patches goes with them. Photographs are taken
    as they are stored, not turned as their EXIF says: so does COLMAP.

    Args:
        reconstruction: The model.
        images: Folder of its photographs.
        min_side: Smallest square cut, in pixels of the photograph; smaller ones would only be enlarged.
        max_side: Largest.
        max_points: Most points, drawn at random from more.
        seed: Seed of this draw.
        progress: Show progress bars, on a terminal.

    Returns:
        The patches, without pairs. They depend on the model, the photographs, the arguments and the version of OpenCV.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        FileNotFoundError: If a photograph is missing.
        ValueError: If a photograph cannot be decoded or is not of its camera's size, a camera model is not supported,
            an argument is out of range, or fewer than two points are left.
    """
    if not 0 < 2 * min_side <= max_side < math.inf or max_points < 2:
        raise ValueError(
            f'min_side={min_side}, max_side={max_side}, max_points={max_points}: min_side must be '
            'above 0, max_side at least twice that, and max_points 2'
        )
    opencv()
    photographs = _Photographs(reconstruction.images, Path(images).expanduser(), progress)
    rejected: dict[str, int] = {}

    def left(rows: np.ndarray, at_least: int, reason: str) -> np.ndarray:
        """Those of the rows whose point has so many of them."""
        points, counts = np.unique(seen['point'][rows], return_counts=True)
        points = points[counts >= at_least]
        rejected[reason] = len(np.unique(seen['point'])) - len(points)
        return rows & np.isin(seen['point'], points)

    seen = _observe(reconstruction)
    facing = seen['facing'] > math.cos(math.radians(GRAZING))
    seen = seen[left(facing, TRACK_LENGTH, f'in fewer than {TRACK_LENGTH} photographs')]
    photographs.check(seen['image'])
    _lay_squares(seen, photographs, min_side, max_side)
    seen = seen[left(np.isfinite(seen['sigma']), TRACK_LENGTH, 'without a scale of their own')]
    usable = _usable(seen, reconstruction.images, min_side, max_side)
    seen = seen[left(usable, 2, 'too small, too large, across the border or off the projection')]
    seen = seen[left(_distinct_points(seen), 2, 'near-duplicates')]
    points = np.unique(seen['point'])
    if len(points) > max_points:
        points = np.random.default_rng(seed).choice(points, max_points, replace=False)
    seen = seen[left(np.isin(seen['point'], points), 2, 'beyond max_points')]

    patches = np.empty((len(seen), PATCH_SIDE, PATCH_SIDE), np.uint8)
    textured = np.empty(len(seen), bool)

    def cut(grey: np.ndarray, rows: np.ndarray) -> None:
        for some in np.array_split(rows, math.ceil(len(rows) / SQUARES_AT_ONCE)):
            patches[some] = cut_squares(grey, _keypoints(seen[some]), PATCH_SIDE)
            textured[some] = patches[some].std((1, 2), dtype=np.float32) >= FLATTEST

    photographs.each(seen['image'], cut, 'cutting patches')
    kept = left(textured, 2, 'flat')
    points, ids = np.unique(seen['point'][kept], return_inverse=True)
    if len(points) < 2:
        raise ValueError(
            f'{len(points)} of {len(reconstruction.point_ids)} points are left, but 2 are the least; left out were '
            + ', '.join(f'{count} {reason}' for reason, count in rejected.items())
        )
    patch_set = PatchSet(torch.from_numpy(patches[kept]), torch.from_numpy(ids.astype(np.int64)))
    return ReconstructionPatches(patch_set, torch.from_numpy(seen['reference'][kept].astype(np.int64)), rejected)


def _observe(reconstruction: Reconstruction) -> np.ndarray:
    """All observations in front of their cameras, a point's together, without squares as yet."""
    tables, directions = [np.zeros(0, _OBSERVATION)], [np.zeros((0, 3))]
    for number, image in enumerate(reconstruction.images):
        # Of two keypoints on one point in a photograph one is a mistake; the first is taken.
        ids, first = np.unique(image.point_ids, return_index=True)
        first = first[ids >= 0]
        points = np.searchsorted(reconstruction.point_ids, image.point_ids[first])
        xyz = reconstruction.xyz[points]
        in_front = xyz @ image.rotation[2] + image.translation[2] > 0
        table = np.zeros(int(in_front.sum()), _OBSERVATION)
        table['point'], table['image'] = points[in_front], number
        table['xy'] = image.keypoints[first[in_front]] - 0.5
        tables.append(table)
        directions.append(_unit(-image.rotation.T @ image.translation - xyz[in_front]))
    seen, directions = np.concatenate(tables), np.concatenate(directions)
    order = np.lexsort((seen['image'], seen['point']))
    seen, directions = seen[order], directions[order]

    normals = np.zeros_like(reconstruction.xyz)
    np.add.at(normals, seen['point'], directions)
    normals = _unit(normals)
    seen['facing'] = (directions * normals[seen['point']]).sum(1)
    for number, rows in _by_image(seen['image']).items():
        image, points = reconstruction.images[number], seen['point'][rows]
        projection, seen['jacobian'][rows] = _project_plane(image, reconstruction.xyz[points], normals[points])
        seen['offset'][rows] = np.linalg.norm(projection - 0.5 - seen['xy'][rows], axis=1)
    return seen


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(float).tiny)


def _project_plane(image: PosedImage, xyz: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Projections (N, 2), and their derivatives (N, 2, 2) by two directions in the plane of each point's normal."""
    axis = np.eye(3)[np.abs(normals).argmin(1)]
    first = _unit(np.cross(normals, axis))
    seen = xyz @ image.rotation.T + image.translation
    step = 1e-4 * seen[:, 2:]
    derivatives = []
    for tangent in (first, np.cross(normals, first)):
        moved = step * (tangent @ image.rotation.T)
        derivatives.append((image.camera.project(seen + moved) - image.camera.project(seen - moved)) / (2 * step))
    return image.camera.project(seen), np.stack(derivatives, -1)


def _lay_squares(seen: np.ndarray, photographs: '_Photographs', min_side: float, max_side: float) -> None:
    """Measure each point's square in its reference photograph, and carry it over to the others; NaN where it has none.

    Fills the columns reference, sigma and angle.
    """
    points, group = np.unique(seen['point'], return_inverse=True)
    central = np.lexsort((-seen['facing'], seen['point']))
    heads = seen[central[np.searchsorted(seen['point'][central], points)]]

    def measure(grey: np.ndarray, rows: np.ndarray) -> None:
        sigma = _characteristic_scales(grey, heads['xy'][rows], min_side, max_side)
        heads['sigma'][rows] = sigma
        found = rows[np.isfinite(sigma)]
        upright = Keypoints(heads['xy'][found], heads['sigma'][found], np.zeros(len(found)))
        heads['angle'][found] = _dominant_orientations(cut_squares(grey, upright, MEASURING_SIDE))

    photographs.each(heads['image'], measure, 'measuring scales')
    maps = seen['jacobian'] @ np.linalg.inv(heads['jacobian'])[group]
    seen['reference'] = heads['image'][group]
    seen['sigma'] = heads['sigma'][group] * np.sqrt(np.linalg.det(maps))
    # The rotation nearest to the map; nothing seen from the front is mirrored.
    turn = np.arctan2(maps[:, 1, 0] - maps[:, 0, 1], maps[:, 0, 0] + maps[:, 1, 1])
    seen['angle'] = heads['angle'][group] + turn


def _characteristic_scales(grey: np.ndarray, xy: np.ndarray, min_side: float, max_side: float) -> np.ndarray:
    """(K,) sigmas where the normalised Laplacian is locally extreme over scale, the strongest; NaN where none is."""
    levels = math.floor(LEVELS_PER_OCTAVE * math.log2(max_side / min_side))
    # Half a step off the limits, where rounding would decide; one more at either end, so that the ends can be extreme.
    sigmas = min_side / MAGNIFICATION * 2 ** ((np.arange(-1, levels + 1) + 0.5) / LEVELS_PER_OCTAVE)
    offset = np.arange(MEASURING_SIDE) - (MEASURING_SIDE - 1) / 2
    r2 = (offset[:, None] ** 2 + offset**2) / (MEASURING_SIDE / MAGNIFICATION) ** 2
    # A square is 12 sigma whatever sigma, so that one kernel does for all scales and is normalised for them.
    laplacian = (2 - r2) * np.exp(-r2 / 2)
    laplacian = (laplacian - laplacian.mean()).ravel().astype(np.float32)
    strength = np.full((len(sigmas), len(xy)), np.nan)
    for level, sigma in enumerate(sigmas):
        squares = Keypoints(xy, np.full(len(xy), sigma), np.zeros(len(xy)))
        within = np.flatnonzero(inside(square_corners(squares), grey.shape))
        patches = cut_squares(grey, squares.chosen(within), MEASURING_SIDE)
        strength[level, within] = np.abs(patches.reshape(-1, laplacian.size).astype(np.float32) @ laplacian)
    inner = strength[1:-1]
    peak = np.where((inner > strength[:-2]) & (inner > strength[2:]), inner, -1.0)
    return np.where(peak.max(0) > 0, sigmas[1:-1][peak.argmax(0)], np.nan)


def _dominant_orientations(patches: np.ndarray) -> np.ndarray:
    """The direction in which most of a patch grows brighter, as SIFT finds it (Lowe, IJCV 2004, section 5).

    Args:
        patches: (N, S, S), squares of side 12 sigma.

    Returns:
        (N,) radians, from x towards y.
    """
    size, bins = patches.shape[-1], 36
    dy, dx = np.gradient(patches.astype(np.float32), axis=(1, 2))
    offset = np.arange(size) - (size - 1) / 2
    window = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * (1.5 * size / MAGNIFICATION) ** 2))
    bin_of = np.rint(np.arctan2(dy, dx) * bins / (2 * np.pi)).astype(int) % bins
    bin_of += bins * np.arange(len(patches))[:, None, None]
    weights = np.hypot(dx, dy) * window
    histogram = np.bincount(bin_of.ravel(), weights.ravel(), bins * len(patches)).reshape(-1, bins)
    for _ in range(2):
        histogram = (np.roll(histogram, 1, 1) + histogram + np.roll(histogram, -1, 1)) / 3
    rows, top = np.arange(len(patches)), histogram.argmax(1)
    before, at, after = (histogram[rows, (top + shift) % bins] for shift in (-1, 0, 1))
    curvature = before - 2 * at + after
    vertex = np.divide(before - after, 2 * curvature, out=np.zeros(len(rows)), where=curvature < 0)
    return (top + vertex) * 2 * np.pi / bins


def _keypoints(seen: np.ndarray) -> Keypoints:
    return Keypoints(seen['xy'], seen['sigma'], seen['angle'])


def _usable(seen: np.ndarray, images: Sequence[PosedImage], min_side: float, max_side: float) -> np.ndarray:
    """Which squares are of a useful size, within the photograph, and where the point is."""
    side = MAGNIFICATION * seen['sigma']
    usable = (side >= min_side) & (side <= max_side) & (seen['offset'] <= OFF_CENTRE * side)
    corners = square_corners(_keypoints(seen))
    for number, rows in _by_image(seen['image']).items():
        usable[rows] &= inside(corners[rows], (images[number].camera.height, images[number].camera.width))
    return usable


def _distinct_points(seen: np.ndarray) -> np.ndarray:
    """Observations of points that show nowhere what a point with more observations shows."""
    counts = np.bincount(seen['point'])
    alive = np.ones(len(counts), bool)
    for rows in _by_image(seen['image']).values():
        rows = rows[alive[seen['point'][rows]]]
        rows = rows[np.lexsort((seen['point'][rows], -counts[seen['point'][rows]]))]
        kept = distinct(seen['xy'][rows], seen['sigma'][rows])
        alive[seen['point'][rows[~kept]]] = False
    return alive[seen['point']]


def _by_image(numbers: np.ndarray) -> dict[int, np.ndarray]:
    """The rows of each photograph."""
    order = np.argsort(numbers, kind='stable')
    used, starts = np.unique(numbers[order], return_index=True)
    return dict(zip(used.tolist(), np.split(order, starts[1:]), strict=False))


class _Photographs:
    """A reconstruction's photographs, read when needed, several at a time."""

    def __init__(self, images: Sequence[PosedImage], folder: Path, progress: bool) -> None:
        self.images, self.folder, self.progress = images, folder, progress

    def check(self, numbers: np.ndarray) -> None:
        """Refuse to begin where one is missing."""
        names = [self.images[number].name for number in _by_image(numbers)]
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f'{self.folder} lacks {len(missing)} of the {len(names)} photographs that the model names, the first '
                f'being {missing[0]}: name the folder that the model was made from'
            )

    def each(self, numbers: np.ndarray, work: Callable[[np.ndarray, np.ndarray], None], title: str) -> None:
        """Call `work` with each photograph that is among `numbers` and its rows in them."""

        def read_and_work(item: tuple[int, np.ndarray]) -> None:
            work(self._read(self.images[item[0]]), item[1])

        rows = _by_image(numbers)
        # OpenCV lets go of the interpreter while it works, so threads are enough.
        with ThreadPoolExecutor(min(8, num_cores())) as pool:
            done = pool.map(read_and_work, rows.items())
            for _ in tqdm(done, title, len(rows), unit='photo', disable=None if self.progress else True):
                pass

    def _read(self, image: PosedImage) -> np.ndarray:
        """(H, W) uint8, as stored: COLMAP does not turn a photograph as its EXIF says."""
        path, size = self.folder / image.name, (image.camera.width, image.camera.height)
        try:
            with Image.open(path) as photograph:
                if photograph.size != size:
                    raise ValueError(
                        f'{path} is {photograph.width}x{photograph.height}, but its camera {image.camera.camera_id} '
                        f'{size[0]}x{size[1]}: take the photographs that the model was made from, neither resized nor '
                        'turned'
                    )
                if photograph.mode.startswith('I;16'):
                    return (np.asarray(photograph) >> 8).astype(np.uint8)
                if photograph.mode in ('I', 'F'):
                    raise ValueError(f'{path} holds {photograph.mode}-type numbers without a range: save 8 bits')
                return np.asarray(photograph.convert('L'))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f'{path} cannot be decoded ({error}): repair it or leave it out') from error
