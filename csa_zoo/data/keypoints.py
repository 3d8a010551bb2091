"""Keypoints of a photograph, and the patches that are cut around them.

A keypoint's patch is the square of side 12 sigma in its direction, as in PhotoTour (Winder & Brown, CVPR 2007).
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

MAGNIFICATION = 12  # side of the cut square in sigmas


class Keypoints(NamedTuple):
    """Where to cut, and how large and which way up."""

    xy: np.ndarray  # (K, 2) pixels, a pixel's centre being an integer
    sigma: np.ndarray  # (K,) pixels
    angle: np.ndarray  # (K,) radians, from x towards y

    def chosen(self, which: np.ndarray) -> 'Keypoints':
        """Those that an index or a mask names."""
        return Keypoints(*(field[which] for field in self))

    def frames(self) -> np.ndarray:
        """(K, 2, 2) sides of the squares as columns: left to right, top to bottom, in pixels."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
        return MAGNIFICATION * self.sigma[:, None, None] * rotation


def opencv() -> ModuleType:
    """OpenCV, which is optional.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ModuleNotFoundError('this needs OpenCV: pip install "csa_zoo[photos]"') from error
    return cv2


def create_sift(keypoints: int = 0, contrast: float = 0.04) -> Any:
    """OpenCV's SIFT without its shift: that many keypoints, the strongest, or all if 0, with at least that contrast.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
    """
    # Without the precise upscale all positions are a quarter of a pixel too far right and down.
    return opencv().SIFT_create(keypoints, contrastThreshold=contrast, enable_precise_upscale=True)


def detect_keypoints(image: np.ndarray, most: int, min_side: float) -> Keypoints:
    """SIFT keypoints whose square lies inside the image, spread over it, no two alike."""
    found = create_sift(contrast=0.02).detect(image, None)
    table = np.array([(*k.pt, k.size / 2, math.radians(k.angle), k.response) for k in found]).reshape(-1, 5)
    table = table[np.lexsort(table.T)[::-1]]  # strongest first, and the same order whatever the detector's threads did
    keypoints = Keypoints(table[:, :2], table[:, 2], table[:, 3])
    usable = inside(square_corners(keypoints), image.shape) & (MAGNIFICATION * keypoints.sigma >= min_side)
    keypoints = keypoints.chosen(usable)
    order = _spread(keypoints.xy, image.shape, most)
    order = order[distinct(keypoints.xy[order], keypoints.sigma[order])][:most]
    return keypoints.chosen(order)


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


def distinct(xy: np.ndarray, sigma: np.ndarray) -> np.ndarray:
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


def square_corners(keypoints: Keypoints) -> np.ndarray:
    """(K, 4, 2) corners of the squares."""
    half = MAGNIFICATION / 2 * keypoints.sigma
    u = np.stack([np.cos(keypoints.angle), np.sin(keypoints.angle)], -1) * half[:, None]
    v = np.stack([-u[:, 1], u[:, 0]], -1)
    signs = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    return keypoints.xy[:, None] + signs[:, :1] * u[:, None] + signs[:, 1:] * v[:, None]


def inside(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Whether all of (K, 4, 2) points are inside an image."""
    return ((points >= 0) & (points <= (shape[1] - 1, shape[0] - 1))).all((1, 2))


def cut_squares(image: np.ndarray, keypoints: Keypoints, size: int) -> np.ndarray:
    """(K, size, size) uint8 upright patches of the keypoints' squares in an (H, W) uint8 image."""
    return cut_regions(image, keypoints.xy, keypoints.frames(), size)


def cut_regions(image: np.ndarray, xy: np.ndarray, linear: np.ndarray, size: int) -> np.ndarray:
    """Patches of parallelograms.

    Each pixel is the mean of 2x2 samples, taken from the pyramid level where they are at most a pixel apart. What lies
    outside the image repeats its border.

    Args:
        image: (H, W) uint8.
        xy: (K, 2) centres, a pixel's centre being an integer.
        linear: (K, 2, 2); the columns are the sides, left to right and top to bottom in the patch, in pixels.
        size: Side of the patches.

    Returns:
        (K, size, size) uint8.
    """
    cv2 = opencv()
    samples = 2 * size
    steps = linear / samples
    longest = np.linalg.norm(steps, axis=1).max(1)
    level = np.maximum(0, np.ceil(np.log2(longest))).astype(int)
    pyramid = [image]
    while len(pyramid) <= level.max(initial=0):
        pyramid.append(cv2.pyrDown(pyramid[-1]))

    steps = steps / 2.0 ** level[:, None, None]
    corner = xy / 2.0 ** level[:, None] - steps.sum(-1) * (samples - 1) / 2
    affine = np.concatenate([steps, corner[..., None]], -1)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    fine = np.empty((len(xy), samples, samples), np.uint8)
    for k in range(len(xy)):
        cv2.warpAffine(
            pyramid[level[k]], affine[k], (samples, samples), fine[k], flags, borderMode=cv2.BORDER_REPLICATE
        )
    sums = fine.reshape(-1, size, 2, size, 2).sum((2, 4), dtype=np.uint16)
    return ((sums + 2) >> 2).astype(np.uint8)
