"""People: what stays the same about somebody between cameras, and their clothes, drawn unrolled."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .chance import choose, clipped_normal, generator
from .colours import (
    ACCENT_COLOURS,
    BAG_COLOURS,
    HAIRS,
    LOWER_COLOURS,
    SHOE_COLOURS,
    SKINS,
    UPPER_COLOURS,
    Colour,
    dye,
    scaled,
)

_PATTERNS: dict[str, int] = {
    'plain': 40,
    'stripes': 13,
    'pinstripes': 5,
    'checks': 9,
    'band': 10,
    'yoke': 8,
    'halves': 6,
    'quarters': 5,
    'dots': 5,
    'print': 13,
}


@dataclass(frozen=True)
class Person:
    """All that stays the same about a person between cameras. Lengths are in units of the stature."""

    stature: float
    girth: float
    shoulders: float
    waist: float
    hip_height: float
    skin: Colour
    hair: Colour
    hair_style: str
    hat: str
    hat_colour: Colour
    upper_colours: tuple[Colour, Colour, Colour]
    pattern: str
    pattern_size: float
    open_front: bool
    back_print: bool
    sleeve_length: float
    sleeve_colour: Colour
    hem: float
    flare: float
    lower: str
    lower_colours: tuple[Colour, Colour]
    lower_length: float
    lower_width: float
    side_stripe: bool
    shoes: Colour
    sole: Colour
    boots: bool
    bag: str
    bag_colour: Colour
    bag_side: int
    motif_seed: int

    @cached_property
    def upper_texture(self) -> np.ndarray:
        """The upper garment unrolled, uint8 (DOWN, AROUND, 3)."""
        return _draw_upper(self)

    @cached_property
    def lower_texture(self) -> np.ndarray:
        """A skirt unrolled, or the seat of trousers; uint8 (DOWN, AROUND, 3)."""
        return _draw_lower(self)


@lru_cache(maxsize=64)
def random_person(seed: int, stream: str, *key: int) -> Person:
    """The person, or stranger, that belongs to a key of that stream of random numbers."""
    rng = generator(seed, stream, *key)
    upper = dye(rng, UPPER_COLOURS)
    accents = (dye(rng, ACCENT_COLOURS), dye(rng, ACCENT_COLOURS))
    lower_kind = choose(rng, {'trousers': 62, 'shorts': 18, 'skirt': 12, 'dress': 8})
    lower_length = {
        'trousers': rng.choice([0.8, 0.98, 0.98, 0.98]),
        'shorts': rng.uniform(0.3, 0.58),
        'skirt': rng.uniform(0.3, 0.75),
        'dress': 0.1,
    }[lower_kind]
    is_dress = lower_kind == 'dress'
    return Person(
        stature=clipped_normal(rng, 1, 0.05, 0.88, 1.1),
        girth=clipped_normal(rng, 1, 0.14, 0.75, 1.4),
        shoulders=clipped_normal(rng, 1, 0.09, 0.8, 1.2),
        waist=clipped_normal(rng, 0.9, 0.1, 0.7, 1.2),
        hip_height=clipped_normal(rng, 0.5, 0.015, 0.46, 0.54),
        skin=dye(rng, SKINS),
        hair=dye(rng, HAIRS, 6),
        hair_style=choose(rng, {'short': 40, 'bald': 6, 'long': 20, 'bob': 10, 'bun': 8, 'tail': 10, 'curly': 6}),
        hat=choose(rng, {'none': 84, 'cap': 8, 'beanie': 4, 'hood': 4}),
        hat_colour=dye(rng, ACCENT_COLOURS),
        upper_colours=(upper, *accents),
        pattern=choose(rng, _PATTERNS),
        pattern_size=float(rng.random()),
        open_front=bool(rng.random() < 0.2) and not is_dress,
        back_print=bool(rng.random() < 0.15),
        sleeve_length=choose(rng, {0.0: 6, 0.33: 20, 0.42: 20, 0.7: 8, 0.97: 46}),
        sleeve_colour=accents[0] if rng.random() < 0.18 else upper,
        hem=rng.uniform(0.22, 0.36) if is_dress else choose(rng, {0.5: 20, 0.47: 30, 0.44: 28, 0.4: 14, 0.3: 8}),
        flare=float(rng.uniform(1.1, 1.6) if is_dress else rng.uniform(0.98, 1.15)),
        lower=lower_kind,
        lower_colours=(dye(rng, LOWER_COLOURS), dye(rng, ACCENT_COLOURS)),
        lower_length=float(lower_length),
        lower_width=float(rng.uniform(0.85, 1.4)),
        side_stripe=bool(rng.random() < 0.14),
        shoes=dye(rng, SHOE_COLOURS),
        sole=dye(rng, SHOE_COLOURS),
        boots=bool(rng.random() < 0.12),
        bag=choose(rng, {'none': 44, 'backpack': 26, 'shoulder bag': 18, 'handbag': 12}),
        bag_colour=dye(rng, BAG_COLOURS),
        bag_side=1 if rng.random() < 0.5 else -1,
        motif_seed=int(rng.integers(2**31)),
    )


# Garments are drawn unrolled: a column for each direction around the body, from the back over the person's right side,
# the front (the middle) and the left side to the back again; the first row is the collar, the last the hem.
AROUND, DOWN = 128, 64
_FRONT, _BACK = AROUND // 2, 0


def _draw_upper(person: Person) -> np.ndarray:
    rng = np.random.default_rng(person.motif_seed)
    base, accent, other = person.upper_colours
    image = Image.new('RGB', (AROUND, DOWN), base)
    draw = ImageDraw.Draw(image)
    _draw_pattern(draw, person, rng)
    if person.back_print:
        _draw_motif(draw, rng, _BACK + 2, 24, rng.uniform(6, 11), accent)
        _draw_motif(draw, rng, AROUND - 2, 24, rng.uniform(4, 8), accent)
    if person.open_front:
        gap = rng.integers(5, 12)
        draw.rectangle((_FRONT - gap, 0, _FRONT + gap, DOWN), fill=other)
        if rng.random() < 0.4:
            _draw_motif(draw, rng, _FRONT, 26, gap * 0.8, accent)
    elif rng.random() < 0.25:
        draw.line((_FRONT, 0, _FRONT, DOWN), fill=scaled(base, 0.55), width=2)
    if rng.random() < 0.35:
        draw.rectangle((0, DOWN - 4, AROUND, DOWN), fill=accent if rng.random() < 0.5 else scaled(base, 0.6))
    neckline = rng.integers(3, 11)
    draw.ellipse((_FRONT - 9, -neckline, _FRONT + 9, neckline), fill=person.skin if rng.random() < 0.7 else accent)
    _draw_straps(draw, person)
    return np.asarray(image)


def _draw_pattern(draw: ImageDraw.ImageDraw, person: Person, rng: np.random.Generator) -> None:
    base, accent, other = person.upper_colours
    size = person.pattern_size
    if person.pattern in ('stripes', 'checks'):
        period = 6 + 9 * size
        for row in np.arange(rng.uniform(0, period), DOWN, period):
            draw.rectangle((0, row, AROUND, row + period * 0.42), fill=accent)
    if person.pattern in ('pinstripes', 'checks'):
        colour = accent if person.pattern == 'pinstripes' else other if rng.random() < 0.4 else scaled(base, 0.6)
        period = AROUND / round(12 + 10 * (1 - size))
        for column in np.arange(0, AROUND, period):
            draw.rectangle((column, 0, column + period * 0.35, DOWN), fill=colour)
    if person.pattern == 'band':
        top = 14 + 22 * size
        height = rng.uniform(6, 16)
        draw.rectangle((0, top, AROUND, top + height), fill=accent)
        if rng.random() < 0.5:
            draw.rectangle((0, top + height * 0.35, AROUND, top + height * 0.6), fill=other)
    if person.pattern == 'yoke':
        draw.rectangle((0, 0, AROUND, 13 + 10 * size), fill=accent)
    if person.pattern == 'halves':
        draw.rectangle((0, 30 + 8 * size, AROUND, DOWN), fill=accent)
    if person.pattern == 'quarters':
        draw.rectangle((_FRONT, 0, AROUND, DOWN), fill=accent)
    if person.pattern == 'dots':
        radius = 1.6 + 2.2 * size
        for row, top in enumerate(np.arange(4, DOWN, 3.6 * radius)):
            for left in np.arange(row % 2 * 1.8 * radius, AROUND, 3.6 * radius):
                draw.ellipse((left - radius, top - radius, left + radius, top + radius), fill=accent)
    if person.pattern == 'print':
        if size < 0.3:
            _draw_motif(draw, rng, _FRONT + 11 * person.bag_side, 17, 4.5, accent)
        else:
            _draw_motif(draw, rng, _FRONT, rng.uniform(22, 32), 9 + 8 * size, accent)
            _draw_motif(draw, rng, _FRONT, rng.uniform(22, 32), 5, other)


def _draw_motif(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, column: float, row: float, radius: float, colour: Colour
) -> None:
    """A printed sign: a disc, ring, bar, square, triangle, diamond, cross or lines of lettering."""
    shape = rng.integers(8)
    box = (column - radius, row - radius, column + radius, row + radius)
    if shape == 0:
        draw.ellipse(box, fill=colour)
    elif shape == 1:
        draw.ellipse(box, outline=colour, width=max(2, int(radius * 0.4)))
    elif shape == 2:
        draw.rectangle((column - radius, row - radius * 0.35, column + radius, row + radius * 0.35), fill=colour)
    elif shape == 3:
        draw.rectangle(box, fill=colour)
    elif shape == 4:
        corners = rng.permutation([(-1, -1), (1, -1), (0, 1), (-1, 1)])[:3]
        draw.polygon([(column + radius * x, row + radius * y) for x, y in corners], fill=colour)
    elif shape == 5:
        draw.polygon(
            [(column + radius * x, row + radius * y) for x, y in ((0, -1), (1, 0), (0, 1), (-1, 0))], fill=colour
        )
    elif shape == 6:
        draw.rectangle((column - radius, row - radius * 0.3, column + radius, row + radius * 0.3), fill=colour)
        draw.rectangle((column - radius * 0.3, row - radius, column + radius * 0.3, row + radius), fill=colour)
    else:
        for line in (-0.7, 0.0, 0.7):
            left, right = rng.uniform(0.5, 1, 2) * radius
            draw.line((column - left, row + line * radius, column + right, row + line * radius), fill=colour, width=2)


def _draw_straps(draw: ImageDraw.ImageDraw, person: Person) -> None:
    if person.bag == 'backpack':
        for side in (-1, 1):
            column = _FRONT + 12 * side
            draw.line((column, 0, column + 4 * side, DOWN * 0.62), fill=person.bag_colour, width=5)
    elif person.bag == 'shoulder bag':
        near, far = 12 * person.bag_side, -14 * person.bag_side
        draw.line((_FRONT + far, 0, _FRONT + 2 * near, DOWN), fill=person.bag_colour, width=3)
        for back in (0, AROUND):
            draw.line((back - far, 0, back - 2 * near, DOWN), fill=person.bag_colour, width=3)


def _draw_lower(person: Person) -> np.ndarray:
    rng = np.random.default_rng(person.motif_seed + 1)
    base, accent = person.lower_colours
    image = Image.new('RGB', (AROUND, DOWN), base)
    draw = ImageDraw.Draw(image)
    if person.lower == 'skirt':
        kind = rng.integers(5)
        if kind == 0:
            draw.rectangle((0, DOWN - rng.integers(8, 20), AROUND, DOWN), fill=accent)
        elif kind == 1:
            for column in range(0, AROUND, 8):
                draw.rectangle((column, 0, column + 2, DOWN), fill=scaled(base, 0.6))
        elif kind == 2:
            for row in range(4, DOWN, 12):
                draw.rectangle((0, row, AROUND, row + 4), fill=accent)
    if rng.random() < 0.4:
        draw.rectangle((0, 0, AROUND, 5), fill=scaled(base, 0.45))
    return np.asarray(image)
