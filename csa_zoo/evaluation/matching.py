"""Image matching where the homography is known: accuracy of matches, and of the homography estimated from them.

Mean matching accuracy as in Dusmanu et al., "D2-Net" (CVPR 2019); corner error and its area under the curve as in
DeTone et al., "SuperPoint" (CVPRW 2018), and Sarlin et al., "SuperGlue" (CVPR 2020). Points are (x, y) in pixels.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..data.keypoints import opencv

Points = np.ndarray | Tensor


def match_errors(keypoints0: Points, keypoints1: Points, matches: Points, homography: np.ndarray) -> np.ndarray:
    """Distance in pixels of the second image between each match and where it should be.

    Args:
        keypoints0: (K, 2) of the first image.
        keypoints1: (L, 2) of the second.
        matches: (M, 2) integer, index of a keypoint in each.
        homography: (3, 3), from the first image to the second.

    Returns:
        (M,) float64; infinite where the homography puts a point at infinity or behind the camera.

    Raises:
        ValueError: If shapes are not these, a match names no keypoint, or a number is NaN or infinite.
    """
    points0, points1 = _matched(keypoints0, keypoints1, matches)
    return np.linalg.norm(_warp(points0, _as_homography(homography)) - points1, axis=1)


def mean_matching_accuracy(
    errors: Sequence[np.ndarray], thresholds: Sequence[float] = range(1, 11)
) -> dict[str, float]:
    """Share of a pair's matches that are right within a threshold, mean over pairs; a pair without a match has 0.

    Args:
        errors: (M,) pixels for each pair, from `match_errors`.
        thresholds: Pixels; an error of just this size is right.

    Returns:
        'MMA@1' and so on, in [0, 1].

    Raises:
        ValueError: If there is no pair, or an error is NaN.
    """
    if not len(errors):
        raise ValueError('mean matching accuracy needs the errors of at least one pair of images')
    errors = [np.asarray(pair, np.float64) for pair in errors]
    _refuse_nan(np.concatenate(errors))
    return {
        f'MMA@{t:g}': float(np.mean([(pair <= t).mean() if pair.size else 0.0 for pair in errors])) for t in thresholds
    }


def homography_error(
    keypoints0: Points,
    keypoints1: Points,
    matches: Points,
    homography: np.ndarray,
    image_size: tuple[int, int],
    threshold: float = 3.0,
) -> float:
    """Mean distance between the corners of the first image under the true and under an estimated homography.

    The estimate is OpenCV's MAGSAC++, which begins from the same random numbers each time.

    Args:
        keypoints0: As in `match_errors`, as are the next three.
        image_size: Width and height of the first image.
        threshold: Inlier threshold of the estimate, in pixels.

    Returns:
        Pixels of the second image; infinite where no homography can be estimated.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        ValueError: As `match_errors`.
    """
    cv2 = opencv()
    points0, points1 = _matched(keypoints0, keypoints1, matches)
    true = _as_homography(homography)
    if len(points0) < 4:
        return np.inf
    estimate, _ = cv2.findHomography(points0, points1, cv2.USAC_MAGSAC, threshold, maxIters=10_000, confidence=0.9999)
    if estimate is None or not np.isfinite(estimate).all():
        return np.inf
    right, bottom = image_size[0] - 1, image_size[1] - 1
    corners = np.array([[0, 0], [right, 0], [right, bottom], [0, bottom]], np.float64)
    estimated = _warp(corners, estimate)
    return (
        float(np.linalg.norm(_warp(corners, true) - estimated, axis=1).mean())
        if np.isfinite(estimated).all()
        else np.inf
    )


def error_auc(errors: Sequence[float], thresholds: Sequence[float] = (1, 3, 5, 10)) -> dict[str, float]:
    """Area under the curve of the share of pairs over the error allowed, up to each threshold, divided by it.

    The curve is linear between pairs, as SuperGlue's evaluation draws it, and flat after the last that counts.

    Args:
        errors: Of each pair, such as `homography_error`; infinite for a failure.
        thresholds: In the unit of the errors.

    Returns:
        'AUC@1' and so on, in [0, 1].

    Raises:
        ValueError: If there is no error, or one is NaN or negative.
    """
    ascending = np.sort(np.asarray(errors, np.float64).ravel())
    _refuse_nan(ascending)
    if not len(ascending) or ascending[0] < 0:
        raise ValueError(f'the area needs errors of 0 or more, not {ascending[:5].tolist()}')
    x = np.concatenate([[0.0], ascending])
    share = np.arange(len(x)) / len(ascending)
    areas = {}
    for limit in thresholds:
        last = np.searchsorted(x, limit)
        height = np.append(share[:last], share[last - 1])
        area = (height[1:] + height[:-1]) @ np.diff(np.append(x[:last], limit)) / 2
        areas[f'AUC@{limit:g}'] = float(area / limit)
    return areas


def _matched(keypoints0: Points, keypoints1: Points, matches: Points) -> tuple[np.ndarray, np.ndarray]:
    """(M, 2) points of both images."""
    points = [_as_numpy(keypoints).astype(np.float64) for keypoints in (keypoints0, keypoints1)]
    matches = _as_numpy(matches)
    for name, array in zip(('keypoints0', 'keypoints1', 'matches'), (*points, matches), strict=True):
        if array.ndim != 2 or array.shape[1] != 2:
            raise ValueError(f'{name} must be of shape (number, 2), not {array.shape}')
        _refuse_nan(array, infinite=True)
    if matches.size and not np.issubdtype(matches.dtype, np.integer):
        raise ValueError(f'matches must be indices, not {matches.dtype}')
    matches = matches.astype(np.int64)
    counts = [len(array) for array in points]
    if matches.size and (matches.min() < 0 or (matches.max(0) >= counts).any()):
        raise ValueError(f'matches go from {matches.min(0)} to {matches.max(0)}, but there are {counts} keypoints')
    return points[0][matches[:, 0]], points[1][matches[:, 1]]


def _as_numpy(values: Points) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _as_homography(matrix: np.ndarray) -> np.ndarray:
    matrix = _as_numpy(matrix).astype(np.float64)
    if matrix.shape != (3, 3):
        raise ValueError(f'a homography must be of shape (3, 3), not {matrix.shape}')
    _refuse_nan(matrix, infinite=True)
    return matrix


def _warp(points: np.ndarray, homography: np.ndarray) -> np.ndarray:
    x = np.concatenate([points, np.ones((len(points), 1))], 1) @ homography.T
    # A homography is known up to a factor; its sign is that which shows the first image from the front at its origin.
    depth = x[:, 2:] * (np.sign(homography[2, 2]) or 1.0)
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.where(depth > 0, x[:, :2] / x[:, 2:], np.inf)


def _refuse_nan(values: np.ndarray, infinite: bool = False) -> None:
    bad = ~np.isfinite(values) if infinite else np.isnan(values)
    if bad.any():
        raise ValueError(f'{bad.sum()} of {values.size} numbers are NaN' + (' or infinite' if infinite else ''))
