"""Colour histograms of people, the baseline that belongs beside every re-identification model.

What clothes' colours alone tell, without anything learnt, is what a network has to beat. Source: the weighted
histograms of body parts in Farenzena et al., "Person re-identification by symmetry-driven accumulation of local
features" (CVPR 2010), here of PCB's six equal stripes, without weights.
"""

import numpy as np
from PIL import Image

STRIPES = 6
BINS = 8, 4, 4  # of hue, saturation and value


def colour_histograms(images: np.ndarray) -> np.ndarray:
    """Square roots of the shares of colours in six horizontal stripes; Euclidean distances of these are Hellinger's.

    Args:
        images: (N, H, W, 3) uint8 in RGB, H at least 6; may be a memory map.

    Returns:
        (N, 768) float32 of unit length.

    Raises:
        ValueError: If the images have another shape or type.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or images.shape[1] < STRIPES:
        raise ValueError(
            f'images must be uint8 of shape (N, H, W, 3), H >= {STRIPES}, not {images.dtype} {images.shape}'
        )
    result = np.empty((len(images), STRIPES, np.prod(BINS)), np.float32)
    for row, image in zip(result, images, strict=True):
        hsv = np.asarray(Image.fromarray(image).convert('HSV'), np.int64)
        codes = (hsv * BINS // 256) @ (BINS[1] * BINS[2], BINS[2], 1)
        for stripe, part in zip(row, np.array_split(codes, STRIPES), strict=True):
            stripe[:] = np.bincount(part.ravel(), minlength=len(stripe)) / part.size
    return np.sqrt(result.reshape(len(images), -1) / STRIPES)
