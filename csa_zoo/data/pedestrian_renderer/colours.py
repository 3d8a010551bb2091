"""Colours: the palettes of clothes, skin, hair and bags, and shades of their colours."""

import numpy as np

from .chance import choose

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

# Colours people wear, by how often one meets them: mostly dark, grey, blue and white.
UPPER_COLOURS: dict[Colour, int] = {
    (28, 28, 32): 26,
    (62, 64, 70): 12,
    (128, 130, 134): 11,
    (226, 226, 222): 21,
    (34, 42, 78): 14,
    (60, 94, 160): 7,
    (150, 182, 216): 5,
    (168, 38, 44): 6,
    (196, 176, 142): 4,
    (58, 88, 62): 4,
    (206, 178, 62): 2,
    (212, 138, 156): 3,
    (92, 60, 110): 2,
    (98, 70, 52): 4,
    (214, 112, 52): 2,
}
LOWER_COLOURS: dict[Colour, int] = {
    (26, 27, 31): 28,
    (40, 52, 88): 22,
    (82, 108, 150): 11,
    (70, 72, 78): 12,
    (140, 138, 134): 6,
    (176, 156, 120): 8,
    (222, 220, 214): 4,
    (84, 62, 48): 4,
    (76, 82, 60): 3,
    (136, 44, 50): 2,
}
ACCENT_COLOURS: dict[Colour, int] = {
    (236, 236, 232): 28,
    (30, 30, 34): 20,
    (184, 40, 46): 12,
    (44, 80, 160): 11,
    (226, 190, 60): 8,
    (150, 152, 156): 8,
    (66, 130, 84): 5,
    (230, 126, 60): 4,
    (216, 132, 166): 4,
}
SKINS: dict[Colour, int] = {
    (238, 200, 174): 5,
    (222, 176, 142): 5,
    (196, 144, 106): 3,
    (142, 96, 68): 2,
    (88, 60, 46): 2,
}
HAIRS: dict[Colour, int] = {
    (26, 22, 22): 9,
    (58, 40, 30): 6,
    (112, 78, 48): 3,
    (190, 156, 102): 2,
    (150, 146, 142): 2,
    (128, 56, 32): 1,
}
BAG_COLOURS: dict[Colour, int] = {
    (30, 30, 34): 10,
    (40, 50, 86): 4,
    (104, 72, 48): 4,
    (160, 44, 48): 3,
    (120, 122, 126): 3,
    (70, 90, 66): 2,
    (206, 120, 60): 1,
    (204, 192, 168): 2,
}
SHOE_COLOURS: dict[Colour, int] = {
    (26, 26, 28): 9,
    (228, 228, 226): 7,
    (92, 64, 44): 3,
    (110, 112, 118): 3,
    (172, 46, 48): 1,
    (48, 76, 140): 1,
}


def dye(rng: np.random.Generator, weights: dict[Colour, int], spread: float = 5.0) -> Colour:
    """A colour of a palette, a little off, as no two garments are the same."""
    shade = np.asarray(choose(rng, weights)) + spread * rng.standard_normal() + 0.5 * spread * rng.standard_normal(3)
    return tuple(int(value) for value in shade.clip(8, 247))


def faded(colour: Colour) -> Colour:
    """A colour half way to its grey."""
    grey = sum(colour) // 3
    return tuple((value + grey) // 2 for value in colour)


def scaled(colour: Colour, factor: float) -> Colour:
    """A colour made darker (factor below 1) or lighter."""
    return tuple(min(255, int(value * factor)) for value in colour)
