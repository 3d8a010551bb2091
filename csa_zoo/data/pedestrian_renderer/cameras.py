"""Cameras: where each stands, the scene before it, its light and its sensor."""

from dataclasses import dataclass
from functools import lru_cache
from math import pi

import numpy as np
from PIL import Image, ImageDraw

from .chance import choose, generator
from .colours import ACCENT_COLOURS, Colour, dye, faded, scaled

_SCENE_SIZE = (960, 420)


@dataclass(frozen=True)
class Camera:
    """A place and a sensor: what its images have in common."""

    scene: Image.Image
    horizon: int  # row of the scene where the ground begins
    paths: tuple[float, float]  # yaws of the two ways along which people walk
    pitch: float  # how far the camera looks down, in radians
    light: float  # -1 from the left, 1 from the right
    sun: float  # 0 overcast to 1 hard shadows
    gains: tuple[float, float, float]  # of red, green and blue
    gamma: float
    haze: float  # level of black, of 1
    saturation: float
    resolution: float  # share of the image's rows and columns that it resolves
    blur: float  # standard deviation in pixels of an image 128 pixels high
    noise: float  # standard deviation in grey levels of 255
    quality: int  # of JPEG
    obstacle: str  # 'pole', 'bicycle', 'railing' or 'bush'


@lru_cache(maxsize=16)
def random_camera(seed: int, camera: int) -> Camera:
    """The camera that belongs to a seed and a number."""
    rng = generator(seed, 'camera', camera)
    horizon = int(rng.integers(170, 225))
    path = rng.uniform(0, 2 * pi)
    warmth, tint = rng.normal(0, 0.05), rng.normal(0, 0.02)
    exposure = rng.normal(0.05, 0.08)
    return Camera(
        scene=_draw_scene(rng, horizon),
        horizon=horizon,
        paths=(path, path + pi + rng.normal(0, 0.5)),
        pitch=float(rng.uniform(0.03, 0.32)),
        light=float(rng.uniform(-1, 1)),
        sun=float(rng.uniform(0, 1)),
        gains=tuple(float(np.exp(exposure + shift)) for shift in (warmth, tint, -warmth)),
        gamma=float(np.exp(rng.normal(-0.08, 0.09))),
        haze=float(rng.uniform(0, 0.07)),
        saturation=float(rng.uniform(0.8, 1.2)),
        resolution=float(rng.uniform(0.4, 0.9)),
        blur=float(rng.uniform(0.2, 0.9)),
        noise=float(rng.uniform(1, 6)),
        quality=int(rng.integers(55, 92)),
        obstacle=choose(rng, {'pole': 1, 'bicycle': 1, 'railing': 1, 'bush': 1}),
    )


def _draw_scene(rng: np.random.Generator, horizon: int) -> Image.Image:
    """A wide backdrop: a facade, hedge, wall or fence down to the horizon, ground below it, and things left about."""
    width, height = _SCENE_SIZE
    wall, ground = (
        dye(rng, {(150, 146, 138): 3, (168, 162, 150): 2, (134, 116, 104): 2, (116, 120, 124): 2}, 10) for _ in range(2)
    )
    image = Image.new('RGB', _SCENE_SIZE, wall)
    draw = ImageDraw.Draw(image)
    backdrop = choose(rng, {'bricks': 2, 'windows': 3, 'hedge': 2, 'fence': 2, 'shops': 2})
    _draw_backdrop(draw, rng, backdrop, wall, horizon)
    floor = choose(rng, {'tiles': 3, 'asphalt': 2, 'grass': 2})
    if floor == 'grass':
        ground = dye(rng, {(112, 122, 96): 1, (130, 132, 104): 1}, 10)
    draw.rectangle((0, horizon, width, height), fill=ground)
    _draw_floor(draw, rng, floor, ground, horizon)
    draw.rectangle((0, horizon - 3, width, horizon + 7), fill=scaled(ground, 1.18))
    for _ in range(rng.integers(4, 9)):
        _draw_thing(draw, rng, horizon)
    grain = (
        _cloud(rng, (height, width), 4) * 10
        + _cloud(rng, (height, width), 40) * 16
        + rng.standard_normal((height, width)) * 5
    )
    return Image.fromarray((np.asarray(image) + grain[..., None]).clip(0, 255).astype(np.uint8))


def _draw_backdrop(draw: ImageDraw.ImageDraw, rng: np.random.Generator, kind: str, wall: Colour, horizon: int) -> None:
    width = _SCENE_SIZE[0]
    if kind == 'bricks':
        for row, top in enumerate(range(0, horizon, 14)):
            draw.line((0, top, width, top), fill=scaled(wall, 0.78), width=2)
            for left in range(row % 2 * 16, width, 32):
                draw.line((left, top, left, top + 14), fill=scaled(wall, 0.78), width=2)
    elif kind in ('windows', 'shops'):
        step = int(rng.integers(60, 130))
        top = horizon - (110 if kind == 'windows' else 190)
        for left in range(int(rng.integers(step)), width, step):
            glass = dye(rng, {(74, 80, 88): 3, (104, 114, 122): 2, (148, 154, 156): 1, (130, 108, 88): 1}, 14)
            draw.rectangle((left, top, left + 0.62 * step, horizon - (40 if kind == 'windows' else 8)), fill=glass)
            draw.line((left + 0.31 * step, top, left + 0.31 * step, horizon - 30), fill=scaled(wall, 1.15), width=4)
    elif kind == 'hedge':
        for _ in range(900):
            x, y, radius = rng.uniform(0, width), rng.uniform(0, horizon), rng.uniform(4, 18)
            green = dye(rng, {(78, 92, 70): 2, (94, 106, 82): 2, (62, 74, 60): 1, (118, 124, 96): 1}, 8)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=green)
    else:
        rail = dye(rng, {(60, 62, 66): 2, (196, 196, 190): 1, (70, 92, 80): 1})
        for left in range(0, width, int(rng.integers(14, 30))):
            draw.rectangle((left, horizon - 120, left + 4, horizon), fill=rail)
        for top in (horizon - 118, horizon - 16):
            draw.rectangle((0, top, width, top + 6), fill=rail)


def _draw_floor(draw: ImageDraw.ImageDraw, rng: np.random.Generator, kind: str, ground: Colour, horizon: int) -> None:
    """Joints between tiles, or markings on asphalt; grass has none."""
    width, height = _SCENE_SIZE
    if kind == 'tiles':
        vanishing = rng.uniform(0, width)
        for column in range(-2 * width, 3 * width, 110):
            draw.line(
                (vanishing + (column - vanishing) * 0.3, horizon, column, height), fill=scaled(ground, 0.82), width=2
            )
        for row in horizon + (height - horizon) * np.linspace(0.05, 1, 9) ** 1.6:
            draw.line((0, row, width, row), fill=scaled(ground, 0.82), width=2)
    elif kind == 'asphalt':
        for column in range(int(rng.integers(200)), width, 260):
            draw.polygon(
                (
                    (column, height - 60),
                    (column + 90, height - 60),
                    (column + 70, height - 44),
                    (column - 25, height - 44),
                ),
                fill=(216, 214, 206),
            )


def _draw_thing(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int) -> None:
    """Something that stands about: a bin, a parked car, a lamp post or a sign."""
    x, base = rng.uniform(0, _SCENE_SIZE[0]), horizon + rng.uniform(0, 90)
    colour = faded(dye(rng, ACCENT_COLOURS, 14))
    kind = rng.integers(4)
    if kind == 0:
        draw.rectangle((x, base - 50, x + 30, base), fill=colour)
        draw.rectangle((x - 2, base - 56, x + 32, base - 48), fill=scaled(colour, 0.6))
    elif kind == 1:
        draw.rounded_rectangle((x, base - 48, x + 170, base - 8), 12, fill=colour)
        draw.rounded_rectangle((x + 34, base - 78, x + 136, base - 40), 14, fill=scaled(colour, 0.5))
        for wheel in (x + 36, x + 132):
            draw.ellipse((wheel - 15, base - 26, wheel + 15, base + 4), fill=(24, 24, 26))
    elif kind == 2:
        draw.rectangle((x, base - 190, x + 7, base), fill=(84, 86, 90))
    else:
        draw.rectangle((x + 10, base - 120, x + 14, base), fill=(110, 112, 114))
        draw.rectangle((x - 8, base - 150, x + 32, base - 112), fill=colour)


def _cloud(rng: np.random.Generator, shape: tuple[int, int], grain: int) -> np.ndarray:
    """Smooth noise of unit strength whose blots are about `grain` pixels wide."""
    height, width = shape
    coarse = rng.standard_normal((height // grain + 2, width // grain + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
