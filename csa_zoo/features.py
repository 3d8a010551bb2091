"""Local features of whole images with a patch descriptor: in OpenCV's manner, in kornia's, and matched with geometry.

A keypoint's patch is the one that the models are trained on: the same code cuts both. kornia cuts its own patches and
takes the models of the zoo as they are: `kornia.feature.LAFDescriptor(model)`.
"""

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .data.keypoints import MAGNIFICATION, Keypoints, create_sift, cut_squares, opencv
from .evaluation.sift import hellinger

Geometry = Literal['homography', 'fundamental']
PATCH_SIZE = 32


class InChunks(nn.Module):
    """A descriptor that is given any number of patches and sees a fixed number at a time.

    Without gradient, memory beyond input and output does not grow with the number of patches. It stands wherever the
    descriptor itself does, in `kornia.feature.LAFDescriptor` for one, which describes all keypoints of all images in
    one pass.

    Shape:
        - input: (N, 1, 32, 32), N may be 0
        - output: (N, D), as of the model
    """

    def __init__(self, model: nn.Module, chunk_size: int = 256):
        """Wrap a model.

        Args:
            model: From (N, 1, 32, 32) to (N, D).
            chunk_size: Most patches in one forward pass.

        Raises:
            ValueError: If `chunk_size` is not positive.
        """
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f'chunk_size is {chunk_size}, but it must be at least 1')
        self.model = model
        self.chunk_size = chunk_size

    def forward(self, patches: Tensor) -> Tensor:
        """Descriptors of all patches, in their order."""
        return torch.cat([self.model(chunk) for chunk in patches.split(self.chunk_size)])


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy for inference whose convolutions do the work of the batch norms that follow them, to the same output.

    Args:
        model: Each of its batch norms comes right after its convolution in a `nn.Sequential`, as in L2-Net.

    Returns:
        The copy, in evaluation mode; there is an `nn.Identity` where a batch norm was.

    Raises:
        ValueError: If a batch norm cannot be folded because it is elsewhere.
    """
    model = copy.deepcopy(model).eval()
    for layers in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for index in range(len(layers) - 1):
            if isinstance(layers[index], nn.Conv2d) and isinstance(layers[index + 1], nn.BatchNorm2d):
                layers[index] = fuse_conv_bn_eval(layers[index], layers[index + 1])
                layers[index + 1] = nn.Identity()
    left = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if left:
        raise ValueError(f'{left[0]} of {type(model).__name__} does not follow a convolution in a Sequential')
    return model


class PatchDescriptor:
    """What OpenCV's `cv2.SIFT` and its like can do, with a model that describes the patches.

    A keypoint's patch is a square about `pt`, with an integer the centre of a pixel, whose side is `magnification`
    times `size`, turned by `angle` degrees clockwise as one sees the image, upright if there is no angle (-1). It is
    sampled from a pyramid finely enough not to alias; beyond the border, the border's pixels go on. These are the
    conventions of OpenCV's own keypoints and of `csa_zoo.data.keypoints`, from which the models learn.

    `size` is a diameter. SIFT's is two sigmas, so that 6 sizes are the 12 sigmas that the models see in training. A
    detector with another notion of size wants another magnification; for ORB's, which is the patch that its own
    descriptor looks at, a value about 1.

    Example:
        >>> features = PatchDescriptor(timm.create_model('l2net_hardnet_csa', pretrained=True))
        >>> keypoints, descriptors = features.detectAndCompute(image, None)
        >>> matches = cv2.BFMatcher(features.defaultNorm(), crossCheck=True).match(descriptors, others)
    """

    def __init__(self, model: nn.Module, detector: Any = None, magnification: float = MAGNIFICATION / 2):
        """Join a descriptor and a detector.

        Args:
            model: From patches (N, 1, 32, 32) in [0, 1] to (N, D). It stays on its device, in its precision, and is put
                in evaluation mode whenever it is used.
            detector: Anything with OpenCV's `detect(image, mask)`; SIFT if None.
            magnification: Side of the patch in keypoint sizes.

        Raises:
            ModuleNotFoundError: If OpenCV is not installed.
            ValueError: If the model does not take such patches or the magnification is not positive.
        """
        if not 0 < magnification < np.inf:
            raise ValueError(f'magnification is {magnification}, but it must be a number above 0')
        self.detector = detector or create_sift()
        self.magnification = magnification
        self._model = InChunks(model)
        try:
            self._size = self._describe(np.zeros((1, PATCH_SIZE, PATCH_SIZE), np.uint8)).shape[1]
        except RuntimeError as error:
            raise ValueError(
                f'{type(model).__name__} does not take grey patches of shape (N, 1, 32, 32), as l2net_hardnet_csa '
                f'does: {error}'
            ) from error

    def detect(self, image: np.ndarray, mask: np.ndarray | None = None) -> Sequence[Any]:
        """Keypoints of an image, where the mask is not 0. See `compute` for the image."""
        return self.detector.detect(_as_grey(image), mask)

    def compute(self, image: np.ndarray, keypoints: Sequence[Any]) -> tuple[Sequence[Any], np.ndarray]:
        """Descriptors of given keypoints.

        Args:
            image: (H, W), (H, W, 3) BGR or (H, W, 4) BGRA; uint8, or floating point in [0, 1].
            keypoints: `cv2.KeyPoint`s whose centre is in the image.

        Returns:
            The keypoints, none dropped, and their descriptors: (N, D) float32, also if N is 0.

        Raises:
            ValueError: If the image is none of these, or a keypoint has no size or is not in it.
        """
        grey = _as_grey(image)
        if not len(keypoints):
            return keypoints, np.empty((0, self._size), np.float32)
        table = np.array([(*k.pt, k.size, k.angle) for k in keypoints], np.float64)
        _check_keypoints(table, grey.shape)
        angle = np.radians(np.where(table[:, 3] < 0, 0, table[:, 3]))
        sigma = table[:, 2] * (self.magnification / MAGNIFICATION)
        patches = cut_squares(grey, Keypoints(table[:, :2], sigma, angle), PATCH_SIZE)
        return keypoints, self._describe(patches)

    def detectAndCompute(self, image: np.ndarray, mask: np.ndarray | None = None) -> tuple[Sequence[Any], np.ndarray]:
        """Keypoints and their descriptors; see `detect` and `compute`."""
        return self.compute(image, self.detect(image, mask))

    def descriptorSize(self) -> int:
        """Numbers in a descriptor."""
        return self._size

    def descriptorType(self) -> int:
        """`cv2.CV_32F`."""
        return opencv().CV_32F

    def defaultNorm(self) -> int:
        """`cv2.NORM_L2`, for a matcher."""
        return opencv().NORM_L2

    @torch.inference_mode()
    def _describe(self, patches: np.ndarray) -> np.ndarray:
        weight = next(chain(self._model.parameters(), self._model.buffers()), torch.empty(0))
        batch = torch.from_numpy(patches)[:, None].to(weight.device, weight.dtype) / 255
        return self._model.eval()(batch).float().cpu().numpy()  # its owner may be training it


def root_sift(image: np.ndarray, keypoints: Sequence[Any]) -> np.ndarray:
    """RootSIFT of SIFT's keypoints in an image, to compare with (Arandjelović & Zisserman, CVPR 2012).

    Args:
        image: As in `PatchDescriptor.compute`.
        keypoints: From `create_sift`'s `detect`.

    Returns:
        (N, 128) float32 of unit length.
    """
    if not len(keypoints):
        return np.empty((0, 128), np.float32)
    _, descriptors = create_sift().compute(_as_grey(image), keypoints)
    return hellinger(descriptors)


class ImageMatches(NamedTuple):
    """Matches between two images: (M, 2) points (x, y) in each, and which agree with one geometry, (M,) bool."""

    points0: np.ndarray
    points1: np.ndarray
    is_inlier: np.ndarray


def match_features(
    keypoints0: Sequence[Any],
    descriptors0: np.ndarray,
    keypoints1: Sequence[Any],
    descriptors1: np.ndarray,
    geometry: Geometry = 'homography',
    threshold: float = 3.0,
) -> ImageMatches:
    """Mutual nearest neighbours, and those of them that OpenCV's MAGSAC++ finds to follow one geometry.

    Args:
        keypoints0: `cv2.KeyPoint`s of the first image.
        descriptors0: Theirs, (K, D) float32.
        keypoints1: Of the second.
        descriptors1: (L, D) float32.
        geometry: A `homography` for a plane or a camera that only turns, a `fundamental` matrix for anything else.
        threshold: Largest distance of an inlier from where it should be, in pixels.

    Returns:
        All matches, the nearest first. None is an inlier if they are too few, or no geometry was found.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        ValueError: If `geometry` is neither, an image has another number of descriptors than of keypoints, or a
            descriptor is not finite.
    """
    cv2 = opencv()
    if geometry not in ('homography', 'fundamental'):
        raise ValueError(f"geometry must be 'homography' or 'fundamental', not {geometry!r}")
    for keypoints, descriptors in ((keypoints0, descriptors0), (keypoints1, descriptors1)):
        if len(keypoints) != len(descriptors):
            raise ValueError(f'{len(keypoints)} keypoints and {len(descriptors)} descriptors of one image')
        if not np.isfinite(descriptors).all():
            raise ValueError('a descriptor holds NaN or infinity: check the weights of the model')
    if not len(keypoints0) or not len(keypoints1):
        return ImageMatches(np.empty((0, 2)), np.empty((0, 2)), np.empty(0, bool))
    matches = cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(descriptors0, descriptors1)
    matches = sorted(matches, key=lambda match: match.distance)  # MAGSAC++ tries the likely ones first
    points0 = np.array([keypoints0[match.queryIdx].pt for match in matches])
    points1 = np.array([keypoints1[match.trainIdx].pt for match in matches])
    find, fewest = (cv2.findHomography, 4) if geometry == 'homography' else (cv2.findFundamentalMat, 8)
    inliers = None
    if len(matches) >= fewest:
        settings = {'maxIters': 10_000, 'confidence': 0.9999}
        _, inliers = find(points0, points1, cv2.USAC_MAGSAC, threshold, **settings)
    return ImageMatches(points0, points1, np.zeros(len(matches), bool) if inliers is None else inliers.ravel() > 0)


def _as_grey(image: np.ndarray) -> np.ndarray:
    """(H, W) uint8 of an image as OpenCV has it."""
    if image is None:
        raise ValueError('the image is None, as cv2.imread returns for a file that it cannot read')
    shape = np.shape(image)
    if len(shape) not in (2, 3) or 0 in shape or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        raise ValueError(f'an image must be of shape (H, W), (H, W, 3) or (H, W, 4), not {shape}')
    if np.issubdtype(image.dtype, np.floating):
        if not (image.min() >= 0 and image.max() <= 1):  # false for NaN too
            raise ValueError(f'a floating-point image must be in [0, 1], not [{image.min():g}, {image.max():g}]')
        image = (255 * image).round().astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f'an image must be uint8, or floating point in [0, 1], not {image.dtype}')
    image = np.ascontiguousarray(image)
    if len(shape) == 2 or shape[2] == 1:
        return image.reshape(shape[:2])
    cv2 = opencv()
    return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY if shape[2] == 3 else cv2.COLOR_BGRA2GRAY)


def _check_keypoints(table: np.ndarray, shape: tuple[int, int]) -> None:
    """Refuse rows (x, y, size, angle) that have no patch in an image."""
    inside = ((table[:, :2] >= -0.5) & (table[:, :2] <= np.array(shape[::-1]) - 0.5)).all(1)
    right = inside & (table[:, 2] > 0) & np.isfinite(table).all(1)
    if not right.all():
        first = int(np.argmin(right))
        x, y, size, angle = table[first].tolist()
        raise ValueError(
            f'keypoint {first} at ({x:g}, {y:g}), size {size:g}, angle {angle:g}: its centre must be in the image, '
            f'which is {shape[1]}x{shape[0]}, and its size above 0'
        )
