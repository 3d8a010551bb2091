"""SIFT and RootSIFT of patches, the baselines that belong beside every descriptor (Lowe, 2004; Arandjelović, 2012)."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from ..data.keypoints import opencv


def sift_descriptors(patches: Tensor | np.ndarray, root: bool = False) -> np.ndarray:
    """OpenCV's SIFT of one upright keypoint in the middle of each patch, whose sixteen cells cover the patch.

    Args:
        patches: (N, S, S) uint8, as they are.
        root: Give RootSIFT: the square root of each share of the sum.

    Returns:
        (N, 128) float32: from 0 to 255 for SIFT, of length 1 for RootSIFT; all zero for a flat patch.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        ValueError: If the patches have another shape or type.
    """
    cv2 = opencv()
    patches = patches.cpu().numpy() if isinstance(patches, Tensor) else np.asarray(patches)
    if patches.ndim != 3 or patches.shape[1] != patches.shape[2] or patches.dtype != np.uint8:
        raise ValueError(f'patches must be uint8 of shape (N, S, S), not {patches.dtype} {patches.shape}')
    side = patches.shape[-1]
    # A cell is 3 sigma wide and OpenCV's size is 2 sigma, so that four cells span six times the size.
    keypoint = cv2.KeyPoint((side - 1) / 2, (side - 1) / 2, side / 6, 0)
    result = np.zeros((len(patches), 128), np.float32)
    chunks = np.array_split(np.arange(len(patches)), -(-len(patches) // 256) or 1)

    def describe(rows: np.ndarray) -> None:
        sift = cv2.SIFT_create()
        for row in rows:
            result[row] = sift.compute(patches[row], [keypoint])[1][0]

    # OpenCV lets go of the interpreter while it works, so threads are enough.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for _ in tqdm(
            pool.map(describe, chunks), 'RootSIFT' if root else 'SIFT', len(chunks), disable=None, leave=False
        ):
            pass
    return hellinger(result) if root else result


def hellinger(descriptors: np.ndarray) -> np.ndarray:
    """RootSIFT of SIFT, (N, 128): the square root of each share of the sum (Arandjelović & Zisserman, CVPR 2012)."""
    return np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1))
