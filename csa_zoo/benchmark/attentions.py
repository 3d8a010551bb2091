"""The attentions that a user could pick instead of CSA, by name: written out here, from timm, or from anywhere.

Each is a module (B, C, H, W) -> (B, C, H, W) with a residual or a gate, as it is put between the stages of a network.
Those written out here exist to be measured: they share the weights and the residual of the library's own modules, so
that only the way of computing differs.
"""

import importlib
import re
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from timm.layers import create_attn
from torch import nn

from ..attention import CompressedSelfAttention, SelfAttention

MakeAttention = Callable[[int], nn.Module]

NO_ATTENTION = 'none'
DEFAULT_ATTENTIONS = (
    NO_ATTENTION,
    'sa-naive',
    'sa',
    'csa-literal-g2',
    *(f'csa-g{groups}' for groups in (1, 2, 4, 8)),
    'efficient',
    'nystrom',
    'nl',
    'gc',
    'se',
)


class NaiveSelfAttention(SelfAttention):
    """SA with its N×N attention map written to memory, as in the released code of SAGAN and of most papers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add context to every position: (B, C, H, W) to (B, C, H, W)."""
        query, key, value = _projections(self, x)
        return _add(self, x, (query @ key.transpose(1, 2)).softmax(dim=2) @ value)


class PaddedSelfAttention(SelfAttention):
    """SA whose queries and keys are filled with zeros to the length of the values.

    CPU kernels of `scaled_dot_product_attention` want one length for all three and form the N×N map otherwise. More
    multiplications, less memory.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add context to every position: (B, C, H, W) to (B, C, H, W)."""
        query, key, value = _projections(self, x)
        padding = (0, value.shape[2] - query.shape[2])
        query, key, value = (t.unsqueeze(1) for t in (F.pad(query, padding), F.pad(key, padding), value))
        return _add(self, x, F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1))


class EfficientAttention(SelfAttention):
    """Linear attention of Shen et al., `Efficient Attention: Attention with Linear Complexities` (WACV 2021), one head.

    Queries are normalised over channels and keys over positions, so that keys and values can be multiplied first.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add context to every position: (B, C, H, W) to (B, C, H, W)."""
        query, key, value = _projections(self, x)
        return _add(self, x, query.softmax(dim=2) @ (key.softmax(dim=1).transpose(1, 2) @ value))


class NystromAttention(SelfAttention):
    """SA approximated from landmarks: Xiong et al., `Nyströmformer` (AAAI 2021), without its convolution, one head.

    Landmarks are the means of `landmarks` segments of the queries and keys in raster order. The pseudo-inverse is
    iterated six times, as in the paper. With as many landmarks as positions it is SA.
    """

    def __init__(self, dim: int, landmarks: int = 64, iterations: int = 6, **kwargs):
        """Create the module; `kwargs` are those of SA."""
        super().__init__(dim, **kwargs)
        self.landmarks = landmarks
        self.iterations = iterations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add context to every position: (B, C, H, W) to (B, C, H, W)."""
        query, key, value = _projections(self, x)
        few_queries, few_keys = (self._segment_means(t) for t in (query, key))
        from_landmarks = (query @ few_keys.transpose(1, 2)).softmax(dim=2)  # (B, N, m)
        among_landmarks = (few_queries @ few_keys.transpose(1, 2)).softmax(dim=2)  # (B, m, m)
        to_landmarks = (few_queries @ key.transpose(1, 2)).softmax(dim=2)  # (B, m, N)
        return _add(self, x, from_landmarks @ (self._pseudo_inverse(among_landmarks) @ (to_landmarks @ value)))

    def _segment_means(self, x: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool1d(x.transpose(1, 2), min(self.landmarks, x.shape[1])).transpose(1, 2)

    def _pseudo_inverse(self, a: torch.Tensor) -> torch.Tensor:
        eye = torch.eye(a.shape[2], device=a.device, dtype=a.dtype)
        # rows of a softmax sum to one, so only the columns decide the scale that makes the iteration converge
        z = a.transpose(1, 2) / a.sum(dim=1).amax(dim=1)[:, None, None]
        for _ in range(self.iterations):
            az = a @ z
            z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
        return z


class LiteralCompressedSelfAttention(CompressedSelfAttention):
    """CSA in the order of the paper's equations: values of every position are projected, and then pooled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add context to every position: (B, C, H, W) to (B, C, H, W)."""
        batch, _, height, width = x.shape
        positions = height * width
        scores = self.maps(x).reshape(batch, self.groups, self.num_maps, positions)
        base = scores.softmax(dim=3)  # [3]
        weights = scores.softmax(dim=2)  # [4]
        value = self.value(x).reshape(batch, self.groups, self.dim // self.groups, positions)
        elementary = value @ base.transpose(2, 3)  # [6]
        return x + self.alpha * (elementary @ weights).reshape(x.shape)  # [7]


class Residual(nn.Module):
    """x + layer(x), for layers that replace a convolution inside a residual block."""

    def __init__(self, layer: nn.Module):
        """Wrap the layer."""
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the layer's output to its input."""
        return x + self.layer(x)


# at their initial scale of 0 the residual modules would be the identity, which a compiler may make use of
_ALPHA = 1.0

_SIDE_MULTIPLES = {'bat': 8, 'halo': 8}  # blocks that tile the map; 8 divides all that the paper's networks have

_ATTENTIONS: dict[str, MakeAttention] = {
    NO_ATTENTION: lambda dim: nn.Identity(),
    'sa': lambda dim: SelfAttention(dim, alpha=_ALPHA),
    'sa-naive': lambda dim: NaiveSelfAttention(dim, alpha=_ALPHA),
    'sa-padded': lambda dim: PaddedSelfAttention(dim, alpha=_ALPHA),
    'efficient': lambda dim: EfficientAttention(dim, alpha=_ALPHA),
    'nystrom': lambda dim: NystromAttention(dim, alpha=_ALPHA),
    **{
        name: lambda dim, name=name: create_attn(name, dim)  # those of timm that keep the shape and need no size
        for name in ('se', 'eca', 'cbam', 'coord', 'gc', 'nl')
    },
    'bat': lambda dim: create_attn('bat', dim, block_size=_SIDE_MULTIPLES['bat']),
    'halo': lambda dim: Residual(create_attn('halo', dim, block_size=_SIDE_MULTIPLES['halo'])),
    'lambda': lambda dim: Residual(create_attn('lambda', dim)),
}


def attention_named(name: str, num_maps: int = 32) -> MakeAttention:
    """What makes an attention from a number of channels.

    Args:
        name: `csa-gG` for CSA with G groups and `csa-literal-gG` for the order of the paper's equations; `sa`,
            `sa-naive` (the N×N map in memory), `sa-padded`; `efficient`, `nystrom`; of timm's layers `se`, `eca`,
            `cbam`, `coord`, `gc`, `nl`, and `bat`, `halo` (sides in multiples of 8), `lambda`; or `package.module:Name`
            for any callable dim -> nn.Module.
        num_maps: Base attention maps of CSA.

    Raises:
        ValueError: If there is no such attention.
    """
    csa = re.fullmatch(r'csa-(literal-)?g(\d+)', name)
    if csa:
        make = LiteralCompressedSelfAttention if csa[1] else CompressedSelfAttention
        return lambda dim: make(dim, num_maps=num_maps, groups=int(csa[2]), alpha=_ALPHA)
    if ':' in name:
        return _imported(name)
    if name not in _ATTENTIONS:
        names = ', '.join(['csa-g2', 'csa-literal-g2', *_ATTENTIONS])
        raise ValueError(f'unknown attention {name!r}: choose from {names}, or give package.module:Name')
    return _ATTENTIONS[name]


def csa_groups(name: str) -> int | None:
    """Groups of a CSA's name, None for the name of another attention."""
    match = re.fullmatch(r'csa-(?:literal-)?g(\d+)', name)
    return int(match[1]) if match else None


def misfit(name: str, shapes: Iterable[tuple[int, int, int]]) -> str | None:
    """Why an attention cannot be put where the shapes (C, H, W) are, None if it can."""
    groups = csa_groups(name) or 1
    multiple = _SIDE_MULTIPLES.get(name, 1)
    for channels, height, width in shapes:
        if channels % groups:
            return f'cannot divide {channels} channels into {groups} groups'
        if height % multiple or width % multiple:
            return f'needs heights and widths in multiples of {multiple}, not {height}×{width}'
    return None


def _imported(name: str) -> MakeAttention:
    module, _, attribute = name.partition(':')
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f'attention {name!r} cannot be imported: {error}') from error


def _projections(attention: SelfAttention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of every position, each (B, N, channels)."""
    layers = (attention.query, attention.key, attention.value)
    query, key, value = (layer(x).flatten(2).transpose(1, 2) for layer in layers)
    return query, key, value


def _add(attention: SelfAttention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """The residual: context (B, N, C) added to x (B, C, H, W)."""
    return x + attention.alpha * context.transpose(1, 2).reshape(x.shape)
