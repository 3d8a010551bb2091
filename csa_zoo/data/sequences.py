"""Benchmark sequences from any photographs, cut as HPatches cuts them (Balntas et al., CVPR 2017).

Each photograph gives two sequences: `i_NAME`, five times the same view in other light, and `v_NAME`, five simulated
views from elsewhere. Regions are found in the photograph and carried over by the true homography as affine frames,
then disturbed at three levels, easy, hard and tough. The disturbances are not the benchmark's, so that figures compare
descriptors on the same sequences and not with HPatches' own.
"""

import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .hpatches import PATCH_TYPES
from .keypoints import Keypoints, cut_regions, detect_keypoints, inside, opencv
from .patches import cache_entry, file_stamps
from .photographs import FLATTEST, find_photographs, read_grey
from .views import View, ViewChange, draw_homography, jacobian_at, map_points, render_view

VIEWS = 5
VIEWPOINT = ViewChange(tilt=55, scale=(0.6, 1.5), contrast=0.3, brightness=0.1, gamma=0.3)
LIGHT = ViewChange(tilt=0, rotation=0, scale=(1, 1), contrast=1.2, brightness=0.25, gamma=1.0)
NOISE = {'e': 0.5, 'h': 1.0, 't': 2.0}  # of ViewChange's position, scale and angle noise, which is a detector's


def cut_sequences(
    paths: str | Path | Sequence[str | Path],
    *,
    points_per_photo: int = 1000,
    seed: int = 0,
    size: int = 32,
    min_side: float = 16.0,
    max_image_side: int = 1600,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Cut sequences of corresponding patches from photographs.

    A photograph's sequences depend on its own file (content and name), the arguments and the library versions. The
    result is cached; see `csa_zoo.data.patches.cache_folder`.

    Args:
        paths: A folder (searched with its subfolders), a photograph, or several of either; two photographs at least
            are needed for the tasks of `csa_zoo.data.hpatches_tasks.draw_hpatches_tasks`.
        points_per_photo: Most points of a sequence.
        seed: Seed of views and disturbances.
        size: Side of the patches.
        min_side: Smallest square cut, in pixels of the photograph.
        max_image_side: Longer photographs are reduced to it first.
        progress: Show a progress bar, on a terminal.

    Returns:
        (16, N, size, size) uint8 by sequence, in the order of `csa_zoo.data.hpatches.PATCH_TYPES`. A photograph in
        which fewer than two points stay in sight of all views is left out.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        FileNotFoundError: If there is no photograph.
        ValueError: If a photograph cannot be decoded, or none has two such points.
    """
    files = find_photographs(paths)

    def build(entry: Path) -> None:
        stacks = {}
        for path in tqdm(files, 'cutting sequences', unit='photo', disable=None if progress else True):
            image = read_grey(path, max_image_side)
            rng = np.random.default_rng([seed, zlib.crc32(path.name.encode())])
            keypoints = detect_keypoints(image, points_per_photo, min_side)
            for kind, change in (('i', LIGHT), ('v', VIEWPOINT)):
                stack = _cut_sequence(image, keypoints, change, size, rng)
                if stack.shape[1] >= 2:
                    stacks[f'{kind}_{path.stem}'] = stack
        if not stacks:
            raise ValueError(
                f'no sequence from {len(files)} photographs, the first being {files[0]}: they are too flat'
            )
        np.savez(entry / 'sequences.npz', **stacks)

    changes = [asdict(LIGHT), asdict(VIEWPOINT), NOISE]
    settings = [points_per_photo, seed, size, min_side, max_image_side, changes]
    key = ['sequences', 1, opencv().__version__, settings, [str(path) for path in files], file_stamps(files)]
    with np.load(cache_entry('sequences', key, build) / 'sequences.npz', allow_pickle=False) as stacks:
        return {name: torch.from_numpy(stacks[name]) for name in sorted(stacks.files)}


def _cut_sequence(
    image: np.ndarray, keypoints: Keypoints, change: ViewChange, size: int, rng: np.random.Generator
) -> np.ndarray:
    """(16, N, size, size) uint8, of the points that are in sight of all views and not flat."""
    types = {'ref': cut_regions(image, keypoints.xy, keypoints.frames(), size)}
    usable = np.ones(len(keypoints.sigma), bool)
    for view in range(1, VIEWS + 1):
        homography, canvas = draw_homography(image.shape, change, rng)
        seen = render_view(image, View(homography, canvas, keypoints, usable), change, rng)
        for level, factor in NOISE.items():
            noisy = replace(
                change,
                position_noise=factor * change.position_noise,
                scale_noise=factor * change.scale_noise,
                angle_noise=factor * change.angle_noise,
            )
            xy, frames = _carry(keypoints, homography, noisy, rng)
            corners = xy[:, None] + (frames @ np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]).T).swapaxes(1, 2) / 2
            usable &= inside(map_points(np.linalg.inv(homography), corners), image.shape)
            types[f'{level}{view}'] = cut_regions(seen, xy, frames, size)
    stack = np.stack([types[name] for name in PATCH_TYPES])
    usable &= (stack.std((2, 3), dtype=np.float32) >= FLATTEST).all(0)
    return stack[:, usable]


def _carry(
    keypoints: Keypoints, homography: np.ndarray, change: ViewChange, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Centres and frames in a view: the homography's affine approximation, after a disturbance in the photograph."""
    noise = rng.standard_normal((5, len(keypoints.sigma))).clip(-2, 2)
    moved = Keypoints(
        keypoints.xy + change.position_noise * (keypoints.sigma * noise[:2]).T,
        keypoints.sigma * 2 ** (change.scale_noise * noise[2]),
        keypoints.angle + np.radians(change.angle_noise) * noise[3],
    )
    # longer one way, shorter the other, as an affine detector errs
    stretch = 2 ** (change.scale_noise * noise[4])
    frames = moved.frames() * np.stack([stretch, 1 / stretch], -1)[:, None, :]
    return map_points(homography, moved.xy), jacobian_at(homography, moved.xy) @ frames
