"""Matching whole images whose homography is known, as on HPatches' sequences: accuracy of matches and of homographies.

Keypoints are SIFT's for every descriptor, so that descriptors alone are compared.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .data.hpatches import ImageSequence
from .data.keypoints import create_sift, opencv
from .data.photographs import read_grey
from .evaluation.matching import error_auc, homography_error, match_errors, mean_matching_accuracy

DescribeImage = Callable[[np.ndarray, Sequence[Any]], np.ndarray]
"""Image (H, W) uint8 and its K keypoints to (K, D) float32."""

LONGEST = 10_000  # pixels: images are read at their own size, which the homographies are in
PIXELS = (1, 3, 5)


def image_matching_metrics(
    descriptors: dict[str, DescribeImage], sequences: Sequence[ImageSequence], keypoints: int = 2048
) -> dict[str, dict[str, float]]:
    """Match the reference of every sequence with its five other images, by mutual nearest neighbours.

    Args:
        descriptors: What is compared, by name; see `csa_zoo.features`.
        sequences: From `csa_zoo.data.hpatches.find_hpatches_sequences`.
        keypoints: Most keypoints of an image.

    Returns:
        For each descriptor `matches` (mean number), `MMA@1`, `@3`, `@5` (mean share of matches that are right within
        so many pixels) and `AUC@1`, ... (area under the curve of the share of homographies whose corners are).

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        ValueError: If an image cannot be read, or there is no sequence.
    """
    if not sequences:
        raise ValueError('image matching needs at least one sequence')
    detector, matcher = create_sift(keypoints), opencv().BFMatcher(opencv().NORM_L2, crossCheck=True)
    errors = {name: [] for name in descriptors}
    corners = {name: [] for name in descriptors}
    for sequence in tqdm(sequences, 'matching images', unit='sequence', disable=None):
        images = [read_grey(path, LONGEST) for path in sequence.images]
        found = [detector.detect(image, None) for image in images]
        points = [np.array([keypoint.pt for keypoint in each]).reshape(-1, 2) for each in found]
        described = {
            name: [describe(image, each) for image, each in zip(images, found, strict=True)]
            for name, describe in descriptors.items()
        }
        for name, (number, homography) in product(descriptors, enumerate(sequence.homographies, 1)):
            first, second = described[name][0], described[name][number]
            pairs = matcher.match(first, second) if len(first) and len(second) else []
            matches = np.array([(m.queryIdx, m.trainIdx) for m in pairs], np.int64).reshape(-1, 2)
            errors[name].append(match_errors(points[0], points[number], matches, homography))
            size = images[0].shape[::-1]
            corners[name].append(homography_error(points[0], points[number], matches, homography, size))
    return {
        name: {
            'matches': float(np.mean([len(pair) for pair in errors[name]])),
            **mean_matching_accuracy(errors[name], PIXELS),
            **error_auc(corners[name], PIXELS),
        }
        for name in descriptors
    }
