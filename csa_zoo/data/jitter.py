"""Augmentation of patches by batched tensor code: flips that a pair shares, and jitter of each patch on its own.

The flips of 'hardnet' are those of Mishchuk et al., "Working hard to know your neighbor's margins" (NeurIPS 2017).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Literal['hardnet', 'dihedral']


def flip_coins(count: int, aug: Augmentation, generator: torch.Generator) -> Tensor:
    """Coins that decide each pair's flips, for `flip_patches`.

    Args:
        count: Number of pairs.
        aug: 'hardnet' transposes, then mirrors left to right (four of the eight symmetries of a square, as HardNet
            was trained); 'dihedral' also mirrors top to bottom: all eight, equally often.
        generator: Source of the coins; they are drawn on its device.

    Returns:
        (count, 2) or (count, 3) bool.

    Raises:
        ValueError: If `aug` is neither.
    """
    number = {'hardnet': 2, 'dihedral': 3}.get(aug)
    if number is None:
        raise ValueError(f"aug must be 'hardnet' or 'dihedral', not {aug!r}")
    return torch.rand(count, number, generator=generator, device=generator.device) < 0.5


def flip_patches(patches: Tensor, coins: Tensor) -> Tensor:
    """Transpose and mirror each row's patches as its coins say.

    Args:
        patches: (B, ..., S, S) of any type; all patches of a row (a pair) are treated alike.
        coins: (B, 2) or (B, 3) bool: transpose, mirror left to right, mirror top to bottom, applied in this order.

    Returns:
        A tensor like `patches`.
    """
    operations = (lambda x: x.mT, lambda x: x.flip(-1), lambda x: x.flip(-2))
    for operation, coin in zip(operations, coins.T, strict=False):
        patches = torch.where(coin.view(-1, *[1] * (patches.ndim - 1)), operation(patches), patches)
    return patches


@dataclass(frozen=True)
class Jitter:
    """Largest changes of a patch, as another look at the same point would show; each is drawn uniformly from ± it.

    Attributes:
        rotation: Degrees.
        scale: Octaves of size.
        shift: Fraction of the side, in x and in y.
        stretch: Octaves of length along a random direction, width across it kept.
        brightness: Added grey level, of 1.
        contrast: Octaves of contrast about the patch's mean.
        gamma: Octaves of exponent.
        blur: Standard deviation of a three-tap blur in pixels, from 0 to this; at most 0.7.
        noise: Standard deviation of Gaussian noise in grey levels of 1, from 0 to this.

    Raises:
        ValueError: If a value is out of its range.
    """

    rotation: float = 8.0
    scale: float = 0.15
    shift: float = 0.03
    stretch: float = 0.25
    brightness: float = 0.1
    contrast: float = 0.4
    gamma: float = 0.4
    blur: float = 0.6
    noise: float = 0.02

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf or (name == 'blur' and value > 0.7):
                allowed = '0 to 0.7' if name == 'blur' else 'a finite number from 0'
                raise ValueError(f'Jitter {name} is {value}, but it must be {allowed}')


class JitterDraw(NamedTuple):
    """What `draw_jitter` drew for B rows of P patches.

    Attributes:
        affine: (B, P, 2, 3), output to input in `affine_grid`'s coordinates.
        light: (B, P, 5): brightness, contrast, gamma, blur and noise, ready to use.
        noise: (B, P, S, S) of the standard normal distribution.
    """

    affine: Tensor
    light: Tensor
    noise: Tensor


def draw_jitter(jitter: Jitter, shape: tuple[int, int, int], generator: torch.Generator) -> JitterDraw:
    """Draw changes for `shape` = (B, P, S): B rows of P patches of side S, each patch on its own."""
    rows, number, side = shape
    device = generator.device
    u = torch.rand(10, rows, number, generator=generator, device=device).mul_(2).sub_(1)
    light = torch.stack(
        [
            u[0] * jitter.brightness,
            (u[1] * jitter.contrast).exp2(),
            (u[2] * jitter.gamma).exp2(),
            u[3].abs() * jitter.blur,
            u[4].abs() * jitter.noise,
        ],
        -1,
    )
    turn = _rotation(u[5] * math.radians(jitter.rotation))
    along = _rotation(u[6] * math.pi)
    stretch = torch.diag_embed(torch.stack([(u[7] * jitter.stretch).exp2(), torch.ones_like(u[7])], -1))
    linear = turn @ along @ stretch @ along.mT * (u[8] * jitter.scale).exp2()[..., None, None]
    shift = torch.rand(rows, number, 2, 1, generator=generator, device=device).mul_(4).sub_(2) * jitter.shift
    noise = torch.randn(rows, number, side, side, generator=generator, device=device)
    return JitterDraw(torch.cat([linear, shift], -1), light, noise)


def _rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def jitter_patches(patches: Tensor, draw: JitterDraw) -> Tensor:
    """Apply drawn changes: geometry, then light, blur and noise, clamped to [0, 1].

    Args:
        patches: (B, P, S, S) float in [0, 1].
        draw: Of the same B, P and S.

    Returns:
        A new tensor like `patches`. What comes from outside a patch is mirrored at its border.
    """
    shape, side = patches.shape, patches.shape[-1]
    x = patches.reshape(-1, 1, side, side)
    grid = F.affine_grid(draw.affine.flatten(0, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode='bilinear', padding_mode='reflection', align_corners=False)
    brightness, contrast, gamma, blur, noise = draw.light.reshape(-1, 5, 1, 1, 1).unbind(1)
    mean = x.mean((2, 3), keepdim=True)
    x = torch.addcmul(mean + brightness, x - mean, contrast).clamp_(0, 1).pow_(gamma)
    edge = blur.square() / 2  # taps (e, 1 - 2e, e) have variance 2e
    for axis in (2, 3):
        x = x * (1 - 2 * edge) + edge * _neighbours(x, axis)
    return x.addcmul_(draw.noise.reshape(-1, 1, side, side), noise).clamp_(0, 1).view(shape)


def _neighbours(x: Tensor, axis: int) -> Tensor:
    """Sum of both neighbours along an axis, the border repeated."""
    last = x.shape[axis] - 1
    before = torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, last)], axis)
    return before.add_(torch.cat([x.narrow(axis, 1, last), x.narrow(axis, last, 1)], axis))
