"""Simulated cameras: a photograph, taken as a plane, seen again from elsewhere, in other light.

The construction follows the simulated views of Lepetit & Fua, "Keypoint recognition using randomized trees" (TPAMI
2006), and HPatches' detection noise (Balntas et al., CVPR 2017).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .keypoints import Keypoints, inside, opencv, square_corners


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


class View(NamedTuple):
    """One look at a photograph: its homography (None for the photograph itself) and the keypoints in it."""

    homography: np.ndarray | None
    shape: tuple[int, int]
    keypoints: Keypoints
    usable: np.ndarray  # (K,) bool


def look_again(shape: tuple[int, int], keypoints: Keypoints, change: ViewChange, rng: np.random.Generator) -> View:
    """A simulated view and where a detector would report the keypoints in it."""
    homography, canvas = draw_homography(shape, change, rng)
    jacobian = jacobian_at(homography, keypoints.xy)
    determinant = np.linalg.det(jacobian)
    # SIFT's orientation is that of a gradient, which transforms as a normal does: by the inverse transpose.
    gradient = np.stack([np.cos(keypoints.angle), np.sin(keypoints.angle)], -1)[..., None]
    gradient = (np.linalg.inv(jacobian).swapaxes(-1, -2) @ gradient)[..., 0]

    noise = rng.standard_normal((4, len(keypoints.sigma))).clip(-2, 2)
    sigma = keypoints.sigma * np.sqrt(determinant)
    seen = Keypoints(
        map_points(homography, keypoints.xy) + change.position_noise * (sigma * noise[:2]).T,
        sigma * 2 ** (change.scale_noise * noise[2]),
        np.arctan2(gradient[:, 1], gradient[:, 0]) + np.radians(change.angle_noise) * noise[3],
    )
    # Where the square's corners come from inside the photograph, all of it does.
    usable = inside(map_points(np.linalg.inv(homography), square_corners(seen)), shape)
    return View(homography, canvas, seen, usable)


def draw_homography(
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
    seen = map_points(homography, border)
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


def map_points(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    mapped = points @ homography[:, :2].T + homography[:, 2]
    return mapped[..., :2] / mapped[..., 2:]


def jacobian_at(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(K, 2, 2) derivative of the homography at (K, 2) points."""
    depth = points @ homography[2, :2] + homography[2, 2]
    mapped = map_points(homography, points)
    return (homography[:2, :2] - mapped[..., None] * homography[2, :2]) / depth[:, None, None]


def render_view(image: np.ndarray, view: View, change: ViewChange, rng: np.random.Generator) -> np.ndarray:
    """What a camera would deliver of a view: geometry, light, blur, noise and JPEG, (H, W) uint8."""
    cv2 = opencv()
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


def _warp(image: np.ndarray, view: View) -> np.ndarray:
    """The view, sampled finely enough that no pixel of the photograph is skipped, then averaged down."""
    cv2 = opencv()
    height, width = image.shape
    border = np.array([(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)], float)
    shrink = np.linalg.svd(jacobian_at(view.homography, border), compute_uv=False).min()
    fine = math.ceil(1 / shrink)
    centre = (fine - 1) / 2  # a pixel's centre among the fine samples that are averaged into it
    homography = np.array([(fine, 0, centre), (0, fine, centre), (0, 0, 1)]) @ view.homography
    rows, columns = view.shape
    seen = cv2.warpPerspective(
        image, homography, (fine * columns, fine * rows), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return seen if fine == 1 else cv2.resize(seen, (columns, rows), interpolation=cv2.INTER_AREA)
