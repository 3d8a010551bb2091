"""Figures: a person in a pose before a camera, painted part by part from the farthest to the nearest."""

from collections.abc import Sequence
from functools import partial
from math import ceil, cos, hypot, pi, sin
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .colours import Colour, scaled
from .people import AROUND, DOWN, Person

Point = tuple[float, float]
"""Column and row of a pixel."""


class View(NamedTuple):
    """How a figure stands before the camera."""

    yaw: float  # 0 faces the camera, pi turns the back to it; at pi/2 the person walks to the image's right
    phase: float  # of the walking cycle, in radians
    stride: float  # amplitude of the legs' swing, in radians
    pitch: float  # how far the camera looks down, in radians
    light: float  # -1 from the left, 1 from the right
    scale: float  # pixels per stature
    left: float  # pixel column of the body's axis
    ground: float  # pixel row of the feet

    def project(self, lateral: float, height: float, forward: float) -> Point:
        """Pixel of a body point; `lateral` grows to the person's left, `forward` to where the chest points."""
        depth = self.depth(lateral, forward)
        column = self.left + self.scale * (lateral * cos(self.yaw) + forward * sin(self.yaw))
        return column, self.ground - self.scale * (height * cos(self.pitch) - depth * sin(self.pitch))

    def depth(self, lateral: float, forward: float) -> float:
        """How much nearer to the camera than the body's axis a point lies."""
        return forward * cos(self.yaw) - lateral * sin(self.yaw)


class Canvas:
    """A colour layer and a layer of light that multiplies it, drawn on in step."""

    def __init__(self, image: Image.Image):
        self.colour = image
        self.shade = Image.new('L', image.size, 235)
        self.draw_colour = ImageDraw.Draw(self.colour)
        self.draw_shade = ImageDraw.Draw(self.shade)

    def ellipse(self, centre: Point, across: float, down: float, colour: Colour, light: float = 0) -> None:
        x, y = centre
        self.draw_colour.ellipse((x - across, y - down, x + across, y + down), fill=colour)
        self.draw_shade.ellipse((x - across, y - down, x + across, y + down), fill=165)
        x += 0.3 * light * across
        y -= 0.2 * down
        self.draw_shade.ellipse((x - 0.7 * across, y - 0.7 * down, x + 0.7 * across, y + 0.7 * down), fill=230)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.draw_colour.polygon(points, fill=colour)
        self.draw_shade.polygon(points, fill=205)

    def limb(self, start: Point, end: Point, radius: float, end_radius: float, colour: Colour, light: float) -> None:
        """A tapered capsule from pixel to pixel, lit from one side."""
        _capsule(self.draw_colour, start, end, radius, end_radius, colour)
        _capsule(self.draw_shade, start, end, radius, end_radius, 160)
        shift = 0.4 * light
        lit_start = (start[0] + shift * radius, start[1])
        lit_end = (end[0] + shift * end_radius, end[1])
        _capsule(self.draw_shade, lit_start, lit_end, 0.6 * radius, 0.6 * end_radius, 232)


def _capsule(
    draw: ImageDraw.ImageDraw, start: Point, end: Point, radius: float, end_radius: float, fill: Colour | int
) -> None:
    (x0, y0), (x1, y1) = start, end
    length = hypot(x1 - x0, y1 - y0)
    if length > 0.5:
        across, down = (y1 - y0) / length, (x0 - x1) / length
        draw.polygon(
            (
                (x0 + across * radius, y0 + down * radius),
                (x1 + across * end_radius, y1 + down * end_radius),
                (x1 - across * end_radius, y1 - down * end_radius),
                (x0 - across * radius, y0 - down * radius),
            ),
            fill=fill,
        )
    draw.ellipse((x0 - radius, y0 - radius, x0 + radius, y0 + radius), fill=fill)
    draw.ellipse((x1 - end_radius, y1 - end_radius, x1 + end_radius, y1 + end_radius), fill=fill)


def paint_person(canvas: Canvas, person: Person, view: View, rng: np.random.Generator) -> None:
    """Draws the parts of a figure from the farthest to the nearest."""
    facing = cos(view.yaw)
    parts = [
        (0.0, partial(_paint_trunk, canvas, person, view, rng)),
        (0.01 + 0.02 * facing, partial(_paint_head, canvas, person, view)),
    ]
    for side in (-1, 1):
        swing = view.stride * sin(view.phase) * side
        # Legs hang below the trunk's garment: they go behind it, the farther one first.
        parts.append(
            (view.depth(0.06 * side, 0.1 * swing) - 0.2, partial(_paint_leg, canvas, person, view, side, swing))
        )
        parts.append((view.depth(0.15 * side, -0.1 * swing), partial(_paint_arm, canvas, person, view, side, swing)))
    if person.bag == 'backpack':
        parts.append((-0.13 * facing, partial(_paint_backpack, canvas, person, view)))
    elif person.bag == 'shoulder bag':
        depth = view.depth(0.19 * person.bag_side, 0)
        parts.append((depth, partial(_paint_bag, canvas, person, view, 0.15, 0.46, 0.065)))
    for _, paint in sorted(parts, key=lambda part: part[0]):
        paint()


def _paint_leg(canvas: Canvas, person: Person, view: View, side: int, swing: float) -> None:
    thigh = 0.47 * person.hip_height
    shank = 0.45 * person.hip_height
    bend = 0.15 + 0.9 * view.stride * max(0.0, -side * cos(view.phase))
    lateral = 0.045 * person.girth * side
    knee_forward = thigh * sin(swing)
    knee_height = person.hip_height - thigh * cos(swing)
    ankle_forward = knee_forward + shank * sin(swing - bend)
    ankle_height = knee_height - shank * cos(swing - bend)
    hip = view.project(lateral, person.hip_height, 0)
    knee = view.project(lateral, knee_height, knee_forward)
    ankle = view.project(lateral, ankle_height, ankle_forward)
    toe = view.project(lateral * 1.3, ankle_height - 0.025, ankle_forward + 0.095)
    heel = view.project(lateral, ankle_height - 0.02, ankle_forward)

    size, light = view.scale * person.girth**0.5, view.light
    colour = person.lower_colours[0]
    canvas.limb(knee, ankle, 0.034 * size, 0.022 * size, person.skin, light)
    canvas.limb(heel, toe, 0.027 * size, 0.022 * size, person.shoes, light)
    canvas.draw_colour.line(
        (heel[0], heel[1] + 0.018 * size, toe[0], toe[1] + 0.016 * size), person.sole, max(1, int(0.014 * size))
    )
    if person.boots:
        canvas.limb(_between(knee, ankle, 0.35), ankle, 0.034 * size, 0.03 * size, person.shoes, light)
    thigh_radius, knee_radius = 0.056 * size, 0.036 * size * person.lower_width
    if person.lower_length <= 0.5 or person.lower in ('skirt', 'dress'):
        canvas.limb(hip, knee, 0.048 * size, 0.034 * size, person.skin, light)
        if person.lower not in ('skirt', 'dress'):
            canvas.limb(
                hip, _between(hip, knee, 2 * person.lower_length), thigh_radius, knee_radius * 1.15, colour, light
            )
    else:
        cuff = _between(knee, ankle, 2 * person.lower_length - 1)
        canvas.limb(hip, knee, thigh_radius, knee_radius, colour, light)
        canvas.limb(knee, cuff, knee_radius, 0.027 * size * person.lower_width, colour, light)
        if person.side_stripe and view.depth(side, 0) > -0.5:
            shift = 0.03 * size * side * cos(view.yaw)
            line = [(x + shift, y) for x, y in (hip, knee, cuff)]
            canvas.draw_colour.line(line, person.lower_colours[1], max(2, int(0.016 * size)))


def _between(start: Point, end: Point, fraction: float) -> Point:
    return start[0] + fraction * (end[0] - start[0]), start[1] + fraction * (end[1] - start[1])


def _paint_arm(canvas: Canvas, person: Person, view: View, side: int, swing: float) -> None:
    upper_arm, forearm = 0.165, 0.15
    lateral = 0.104 * person.shoulders * (0.6 + 0.4 * person.girth) * side
    swing = -0.8 * swing
    bend = 0.25 + 0.5 * max(0.0, swing)
    elbow_at = (lateral * 1.16, 0.8 - upper_arm * cos(swing), upper_arm * sin(swing))
    wrist_at = (lateral * 1.2, elbow_at[1] - forearm * cos(swing + bend), elbow_at[2] + forearm * sin(swing + bend))
    shoulder, elbow, wrist = view.project(lateral, 0.8, 0), view.project(*elbow_at), view.project(*wrist_at)
    size, light = view.scale * person.girth**0.5, view.light
    length = person.sleeve_length
    canvas.ellipse(wrist, 0.024 * size, 0.03 * size, person.skin, light)
    canvas.limb(elbow, wrist, 0.025 * size, 0.019 * size, person.skin, light)
    if length <= 0.5:
        canvas.limb(shoulder, elbow, 0.033 * size, 0.026 * size, person.skin, light)
        if length > 0:
            canvas.limb(
                shoulder, _between(shoulder, elbow, 2 * length), 0.041 * size, 0.036 * size, person.sleeve_colour, light
            )
    else:
        cuff = _between(elbow, wrist, 2 * length - 1)
        canvas.limb(shoulder, elbow, 0.041 * size, 0.034 * size, person.sleeve_colour, light)
        canvas.limb(elbow, cuff, 0.034 * size, 0.028 * size, person.sleeve_colour, light)
    if person.bag == 'handbag' and side == person.bag_side:
        _paint_bag(canvas, person, view, abs(wrist_at[0]), wrist_at[1] - 0.1, 0.06, wrist_at[2])


def _paint_bag(
    canvas: Canvas, person: Person, view: View, lateral: float, height: float, radius: float, forward: float = 0.0
) -> None:
    """A bag at the side that it hangs from: broad from the side, narrow from the front."""
    x, y = view.project(lateral * person.bag_side, height, forward)
    across = view.scale * (radius * abs(sin(view.yaw)) + 0.4 * radius * abs(cos(view.yaw)) + 0.012)
    down = view.scale * radius * 0.85
    canvas.polygon(
        ((x - across, y - down), (x + across, y - down), (x + across, y + down), (x - across, y + down)),
        person.bag_colour,
    )
    canvas.draw_colour.line(
        (x - across * 0.6, y - down, x, y - 1.9 * down, x + across * 0.6, y - down), person.bag_colour, 2
    )
    canvas.draw_colour.line((x - across, y - down * 0.3, x + across, y - down * 0.3), scaled(person.bag_colour, 0.6), 2)


def _paint_backpack(canvas: Canvas, person: Person, view: View) -> None:
    x, y = view.project(0, 0.7, -0.125)
    across = view.scale * (0.085 * abs(cos(view.yaw)) + 0.06 * abs(sin(view.yaw)))
    down = view.scale * (0.1 + 0.02 * person.pattern_size)
    box = (x - across, y - down, x + across, y + down)
    canvas.draw_colour.rounded_rectangle(box, 0.4 * across, fill=person.bag_colour)
    canvas.draw_shade.rounded_rectangle(box, 0.4 * across, fill=170)
    lit = 0.25 * view.light * across
    canvas.draw_shade.rounded_rectangle(
        (x + lit - 0.7 * across, y - 0.85 * down, x + lit + 0.7 * across, y + 0.7 * down), 0.4 * across, fill=228
    )
    pocket = person.upper_colours[2] if person.motif_seed % 3 == 0 else scaled(person.bag_colour, 0.7)
    shift = 0.3 * across * sin(view.yaw)
    canvas.draw_colour.rectangle(
        (x - 0.65 * across - shift, y + 0.1 * down, x + 0.65 * across - shift, y + 0.75 * down), fill=pocket
    )


def _paint_trunk(canvas: Canvas, person: Person, view: View, rng: np.random.Generator) -> None:
    girth, shoulders = person.girth, person.shoulders
    hips = 0.088 * (0.5 + 0.5 * girth)
    waist = 0.088 * person.waist * girth
    top = person.hip_height + 0.09
    if person.lower in ('skirt', 'dress'):
        bottom = person.hip_height * (1 - person.lower_length)
        lower = (
            (top, waist, 0.75 * waist),
            (person.hip_height, hips * 1.08, hips * 0.9),
            (bottom, hips * 1.35, hips * 1.2),
        )
    else:
        lower = ((top, waist, 0.75 * waist), (person.hip_height - 0.04, hips * 1.05, hips * 0.85))
    _paint_cloth(canvas, view, person.lower_texture, lower, rng)
    hem = min(person.hem, person.hip_height)
    upper = (
        (0.865, 0.036, 0.035),
        (0.845, 0.07 * shoulders, 0.05),
        (0.825, 0.1 * shoulders, 0.056),
        (0.79, 0.118 * shoulders * (0.6 + 0.4 * girth), 0.062 * girth),
        (0.73, 0.108 * shoulders * (0.5 + 0.5 * girth), 0.075 * girth),
        (0.6, max(waist, 0.08), 0.07 * girth),
        (hem, hips * 1.08 * person.flare, hips * 0.9 * person.flare),
    )
    _paint_cloth(canvas, view, person.upper_texture, upper, rng)


def _paint_cloth(
    canvas: Canvas,
    view: View,
    texture: np.ndarray,
    profile: Sequence[tuple[float, float, float]],
    rng: np.random.Generator,
) -> None:
    """Wraps an unrolled garment around a body whose cross-sections are ellipses.

    `profile` lists (height, half the breadth, half the depth) from the top down. A direction t on the garment
    (0 in front) lies at column A sin(t) cos(yaw) + B cos(t) sin(yaw) = R sin(t + delta), which is solved for t.
    """
    heights, breadths, depths = np.asarray(profile).T
    rise = view.scale * cos(view.pitch)
    first, last = (int(view.ground - rise * height) for height in (heights[0], heights[-1]))
    rows = np.arange(first, max(last, first + 1))
    height = (view.ground - rows) / rise
    breadth = np.interp(-height, -heights, breadths) * cos(view.yaw)
    depth = np.interp(-height, -heights, depths) * sin(view.yaw)
    radius = np.hypot(breadth, depth) * view.scale
    left, right = int(view.left - radius.max()), ceil(view.left + radius.max())
    across = (np.arange(left, right + 1) - view.left)[None] / radius[:, None]
    inside = np.abs(across) <= 1
    across = across.clip(-1, 1)
    direction = np.arcsin(across) - np.arctan2(depth, breadth)[:, None]
    columns = ((direction / (2 * pi) + 0.5) * AROUND).astype(int) % AROUND
    down = np.linspace(0, 1, len(rows), endpoint=False)
    patch = texture[(down * DOWN).astype(int)[:, None], columns]

    waves, slant, shift = rng.uniform(1, 3), rng.uniform(-2, 2), rng.uniform(0, 2 * pi)
    folds = 12 * np.sin(2 * pi * (waves * down[:, None] + slant * across) + shift)
    shade = (222 + 38 * view.light * across - 48 * across**2 + folds).clip(0, 255)
    mask = Image.fromarray(inside.astype(np.uint8) * 255)
    canvas.colour.paste(Image.fromarray(patch), (left, first), mask)
    canvas.shade.paste(Image.fromarray(shade.astype(np.uint8)), (left, first), mask)


def _paint_head(canvas: Canvas, person: Person, view: View) -> None:
    size, light = view.scale, view.light
    facing, turned = cos(view.yaw), sin(view.yaw)
    neck, head = view.project(0, 0.86, 0), view.project(0, 0.93, 0.012)
    across, down = 0.05 * size * (0.9 + 0.1 * person.girth), 0.066 * size
    style = person.hair_style
    if style in ('long', 'bob'):
        drop = 0.17 if style == 'long' else 0.09
        fall = view.project(0, 0.93 - drop, -0.03)
        canvas.limb(head, fall, across * 1.12, across * (0.95 if style == 'long' else 1.1), person.hair, light)
    canvas.limb(neck, head, 0.026 * size, 0.03 * size, person.skin, light)
    if style == 'bald':
        canvas.ellipse(head, across, down, person.skin, light)
    else:
        bulk = 1.3 if style == 'curly' else 1.08
        canvas.ellipse(
            (head[0] - 0.1 * across * turned, head[1] - 0.06 * down), across * bulk, down * bulk, person.hair, light
        )
        if facing > -0.45:
            width = across * (0.85 if facing > 0.3 else 0.62)
            canvas.ellipse(
                (head[0] + 0.42 * across * turned, head[1] + 0.22 * down), width, down * 0.76, person.skin, light
            )
    if style == 'long' and facing < -0.2:
        canvas.limb(head, view.project(0, 0.77, -0.07), across, across * 0.9, person.hair, light)
    if style == 'bun':
        canvas.ellipse(view.project(0, 0.985, -0.045), 0.03 * size, 0.028 * size, person.hair, light)
    if style == 'tail' and (facing < 0.5 or abs(turned) > 0.5):
        canvas.limb(
            view.project(0, 0.95, -0.06), view.project(0, 0.82, -0.085), 0.02 * size, 0.014 * size, person.hair, light
        )
    _paint_hat(canvas, person, view, head, across, down)


def _paint_hat(canvas: Canvas, person: Person, view: View, head: Point, across: float, down: float) -> None:
    x, y = head
    if person.hat == 'none':
        return
    if person.hat == 'hood':
        canvas.ellipse((x, y), across * 1.25, down * 1.15, person.upper_colours[0], view.light)
        if cos(view.yaw) > -0.3:
            canvas.ellipse(
                (x + 0.35 * across * sin(view.yaw), y + 0.1 * down), across * 0.75, down * 0.8, person.skin, view.light
            )
        return
    top = y - 1.1 * down if person.hat == 'cap' else y - 1.3 * down
    for draw, fill in ((canvas.draw_colour, person.hat_colour), (canvas.draw_shade, 215)):
        draw.chord((x - 1.12 * across, top, x + 1.12 * across, y + 0.75 * down), 180, 360, fill=fill)
    if person.hat == 'cap' and cos(view.yaw) > -0.5:
        brim = x + 1.2 * across * sin(view.yaw)
        canvas.ellipse((brim, y - 0.18 * down), across * 0.85, down * 0.14, scaled(person.hat_colour, 0.8), view.light)
