"""Shots: whoever and whatever stands before a camera, and the JPEG file that the camera makes of it."""

from io import BytesIO
from math import pi

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

from .cameras import Camera, random_camera
from .chance import generator
from .colours import ACCENT_COLOURS, dye
from .figures import Canvas, View, paint_person
from .people import random_person
from .plan import Settings, Shot


def render_shot(settings: Settings, shot: Shot) -> bytes:
    """Renders one image and returns its JPEG file."""
    rng = generator(settings.seed, f'{shot.kind} image', shot.identity, shot.camera, shot.index)
    camera = random_camera(settings.seed, shot.camera)
    canvas = _compose(settings, shot, camera, rng)
    image, quality = _expose(canvas, camera, settings.size, rng)
    buffer = BytesIO()
    image.save(buffer, 'JPEG', quality=quality)
    return buffer.getvalue()


def _compose(settings: Settings, shot: Shot, camera: Camera, rng: np.random.Generator) -> Canvas:
    """What stands before the camera, at twice the height of the image and in natural proportions."""
    height = 2 * settings.size[0]
    width = height // 2
    person = random_person(settings.seed, 'person', shot.identity)
    if shot.kind == 'distractor':
        person = random_person(settings.seed, 'stranger', shot.identity, shot.camera, shot.index)
    # People walk past a camera once: the images of one pass share way, place and pace.
    track = generator(settings.seed, 'track', shot.identity, shot.camera)
    yaw = camera.paths[track.integers(2)] + track.normal(0, 0.45) + rng.normal(0, 0.2)
    near, across = track.uniform(0.1, 0.9), track.uniform(0.12, 0.88)
    near = float(np.clip(near + rng.normal(0, 0.08), 0, 1))
    view = View(
        yaw=yaw,
        phase=rng.uniform(0, 2 * pi),
        stride=track.uniform(0.2, 0.55) if track.random() < 0.85 else 0.05,
        pitch=camera.pitch * (0.7 + 0.6 * near),
        light=camera.light * (0.4 + 0.6 * camera.sun),
        scale=height * 0.94 * person.stature**0.5 * rng.normal(1, 0.05),
        left=width * (0.5 + rng.normal(0, 0.06)),
        ground=height * (0.955 + rng.normal(0, 0.025)),
    )
    if shot.kind == 'junk':
        view = _misplace(view, height, width, rng)
    canvas = Canvas(_crop_scene(camera, view, near, across + rng.normal(0, 0.03), (width, height)))
    if rng.random() < 0.2:
        _paint_passer_by(canvas, settings, camera, view, width, rng, behind=True)
    if shot.kind != 'distractor' or rng.random() < 0.7:
        _paint_shadow(canvas, camera, view)
        paint_person(canvas, person, view, rng)
    if rng.random() < 0.1:
        _paint_passer_by(canvas, settings, camera, view, width, rng, behind=False)
    if rng.random() < 0.2:
        _paint_obstacle(canvas, camera.obstacle, view, width, rng)
    return canvas


def _misplace(view: View, height: int, width: int, rng: np.random.Generator) -> View:
    """A box that a detector cut badly: half of a body, a figure at the rim, or one that is far too small."""
    kind = rng.integers(3)
    if kind == 0:
        scale = view.scale * rng.uniform(1.7, 2.4)
        return view._replace(scale=scale, ground=height * rng.choice([1.0, 1.85]))
    if kind == 1:
        return view._replace(left=view.left + width * rng.choice([-0.45, 0.45]))
    return view._replace(scale=view.scale * rng.uniform(0.4, 0.55), left=width * rng.uniform(0.2, 0.8))


def _crop_scene(camera: Camera, view: View, near: float, across: float, size: tuple[int, int]) -> Image.Image:
    """The part of the scene behind a figure: far ones stand near the horizon and are small in it."""
    width, height = size
    scene_width, scene_height = camera.scene.size
    feet = camera.horizon + 30 + near * (scene_height - camera.horizon - 42)
    zoom = (120 + 110 * near) / view.scale
    box_width, box_height = min(width * zoom, scene_width), min(height * zoom, scene_height)
    left = min(max(across * scene_width - view.left * zoom, 0), scene_width - box_width)
    top = min(max(feet - view.ground * zoom, 0), scene_height - box_height)
    return camera.scene.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + box_width, top + box_height))


def _paint_shadow(canvas: Canvas, camera: Camera, view: View) -> None:
    size = view.scale
    x, y = view.left, view.ground
    canvas.draw_shade.ellipse((x - 0.14 * size, y - 0.025 * size, x + 0.14 * size, y + 0.025 * size), fill=150)
    if camera.sun > 0.35:
        reach, rise = -0.6 * camera.light * size, -0.12 * size
        dark = int(215 - 95 * camera.sun)
        points = (
            (x - 0.07 * size, y),
            (x + 0.07 * size, y),
            (x + reach + 0.06 * size, y + rise),
            (x + reach - 0.06 * size, y + rise),
        )
        canvas.draw_shade.polygon(points, fill=dark)


def _paint_passer_by(
    canvas: Canvas,
    settings: Settings,
    camera: Camera,
    view: View,
    width: int,
    rng: np.random.Generator,
    *,
    behind: bool,
) -> None:
    """A stranger in part of the image: smaller and anywhere when behind, at the rim when in front."""
    stranger = random_person(settings.seed, 'stranger', *rng.integers(2**20, size=3).tolist())
    side = rng.choice([-1, 1])
    size = view.scale * (rng.uniform(0.55, 0.9) if behind else rng.uniform(0.98, 1.12))
    shift = width * side * (rng.uniform(0.2, 0.5) if behind else rng.uniform(0.42, 0.55))
    ground = view.ground - (view.scale - size) * 0.35
    other = view._replace(
        yaw=camera.paths[rng.integers(2)] + rng.normal(0, 0.5),
        phase=rng.uniform(0, 2 * pi),
        scale=size,
        left=view.left + shift,
        ground=ground,
    )
    paint_person(canvas, stranger, other, rng)


def _paint_obstacle(canvas: Canvas, kind: str, view: View, width: int, rng: np.random.Generator) -> None:
    """Something between the camera and the person."""
    size, x, y = view.scale, width * rng.uniform(0.1, 0.9), view.ground
    grey = dye(rng, {(70, 72, 76): 3, (150, 150, 148): 2, (60, 84, 70): 1}, 10)
    if kind == 'pole':
        thick = size * rng.uniform(0.02, 0.05)
        canvas.polygon(((x - thick, 0), (x + thick, 0), (x + thick, y + size), (x - thick, y + size)), grey)
    elif kind == 'railing':
        top = y - size * rng.uniform(0.3, 0.45)
        for row in (top, top + 0.14 * size, top + 0.28 * size):
            canvas.polygon(((0, row), (width, row), (width, row + 0.025 * size), (0, row + 0.025 * size)), grey)
    elif kind == 'bicycle':
        hub, radius = y - 0.15 * size, 0.16 * size
        for wheel in (x - 0.25 * size, x + 0.25 * size):
            canvas.draw_colour.ellipse(
                (wheel - radius, hub - radius, wheel + radius, hub + radius), outline=(30, 30, 32), width=4
            )
        frame = [
            (x - 0.25 * size, hub),
            (x - 0.1 * size, hub - 0.2 * size),
            (x + 0.18 * size, hub - 0.2 * size),
            (x, hub),
            (x - 0.1 * size, hub - 0.24 * size),
        ]
        canvas.draw_colour.line(frame, fill=dye(rng, ACCENT_COLOURS), width=4)
        canvas.draw_colour.line(((x + 0.25 * size, hub), (x + 0.17 * size, hub - 0.3 * size)), fill=grey, width=4)
    else:
        for _ in range(40):
            radius = size * rng.uniform(0.015, 0.05)
            centre = (x + size * rng.normal(0, 0.12), y - size * abs(rng.normal(0, 0.1)))
            canvas.ellipse(centre, radius, radius, dye(rng, {(52, 78, 44): 2, (84, 108, 62): 1}, 8))


def _expose(canvas: Canvas, camera: Camera, size: tuple[int, int], rng: np.random.Generator) -> tuple[Image.Image, int]:
    """Light, lens, sensor and compression: what a camera makes of what stands before it."""
    shade = np.asarray(canvas.shade.filter(ImageFilter.BoxBlur(canvas.shade.height / 150)), dtype=np.float32)
    slope, fall = rng.normal(0, 0.08) + 0.1 * camera.light * camera.sun, rng.normal(0, 0.08)
    field = 1 + slope * np.linspace(-1, 1, shade.shape[1]) + fall * np.linspace(-1, 1, shade.shape[0])[:, None]
    if rng.random() < 0.15 * camera.sun:
        edge = rng.uniform(0.2, 0.8)
        field[int(edge * shade.shape[0]) :] *= 0.65
    light = Image.fromarray((shade * field).clip(0, 255).astype(np.uint8))
    image = ImageChops.multiply(canvas.colour, Image.merge('RGB', (light, light, light)))

    height, width = size
    sharpness = camera.resolution * rng.uniform(0.75, 1)
    image = image.resize((max(8, round(width * sharpness)), max(16, round(height * sharpness))), Image.Resampling.BOX)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    image = image.filter(ImageFilter.GaussianBlur(camera.blur * height / 128 * rng.uniform(0.7, 1.3)))
    image = ImageEnhance.Color(image).enhance(camera.saturation * rng.uniform(0.9, 1.1))

    exposure = np.exp(rng.normal(0.1, 0.08) + rng.normal(0, 0.02, 3))
    levels = np.linspace(0, 1, 256)[:, None] * np.asarray(camera.gains) * exposure
    levels = camera.haze + (1 - camera.haze) * levels.clip(0, 1) ** camera.gamma
    image = image.point((255 * levels.T).round().astype(int).ravel().tolist())
    noise = camera.noise * rng.uniform(0.7, 1.3) * rng.standard_normal((height, width, 3), dtype=np.float32)
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image, camera.quality + int(rng.integers(-8, 9))
