"""Compressed self-attention (CSA), the module of `Compressed Self-Attention for Deep Metric Learning` (AAAI 2020).

Bracketed numbers are the paper's equations. The paper projects the values and then pools them; here they are pooled
first, which is the same function, because the projection is linear and each base attention map sums to one.
"""

import torch
from timm.layers import register_notrace_module
from torch import nn


@register_notrace_module  # one node for fx, as timm does for its own attention layers
class CompressedSelfAttention(nn.Module):
    """Long-range context from a few base attention maps instead of one map per position.

    Within each of `groups` channel groups, `num_maps` learned base vectors score every position. A softmax of the
    scores over positions gives the base attention maps [3], which pool the input into `num_maps` elementary outputs
    [6]; a softmax over the base vectors gives each position's adaptive weights [4], which mix those outputs back into
    every position [5], [7]. Multiplications per position: 3·C·num_maps, whatever the number of positions.

    At its initial `alpha` of 0 the module is the identity, so it can be put into a pretrained network. The input may be
    contiguous or channels_last; the output has the same layout.

    Shape:
        - input: (B, C, H, W), C = `dim`
        - output: (B, C, H, W)

    Attributes:
        maps: 1×1 convolution without bias, its weight (groups·num_maps, C/groups, 1, 1) holds the base vectors.
        value: 1×1 convolution without bias, its weight (C, C/groups, 1, 1) is the value projection W_g.
        alpha: Scalar that scales the attention's contribution to the output.
    """

    def __init__(
        self,
        dim: int,
        num_maps: int = 32,
        groups: int = 2,
        alpha: float = 0.0,
        learnable_alpha: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Create the module.

        Args:
            dim: Channels C of the input.
            num_maps: Base attention maps D per group.
            groups: Channel groups G, each with its own base vectors and value projection.
            alpha: Initial scale of the attention's contribution.
            learnable_alpha: Learn `alpha`; otherwise it stays as given (the paper allows both).
            device: Where to create the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If `dim`, `num_maps` or `groups` is less than one, or `groups` does not divide `dim`.
        """
        super().__init__()
        for name, value in (('dim', dim), ('num_maps', num_maps), ('groups', groups)):
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        if dim % groups:
            raise ValueError(f'groups must divide the {dim} channels, got groups={groups}')
        dd = {'device': device, 'dtype': dtype}
        self.dim = dim
        self.num_maps = num_maps
        self.groups = groups
        self.maps = nn.Conv2d(dim, groups * num_maps, 1, groups=groups, bias=False, **dd)
        self.value = nn.Conv2d(dim, dim, 1, groups=groups, bias=False, **dd)
        scale = torch.tensor(float(alpha), **dd)
        if learnable_alpha:
            self.alpha = nn.Parameter(scale)
        else:
            self.register_buffer('alpha', scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add context to every position: (B, C, H, W) to (B, C, H, W)."""
        scores = self._by_group(self.maps(x), self.groups * self.num_maps)  # (B, G, N, D)
        positions = self._by_group(x, self.dim)  # (B, G, N, C/G)
        base = scores.softmax(dim=2)
        weights = scores.softmax(dim=3)
        pooled = base.transpose(2, 3) @ positions  # (B, G, D, C/G)
        value = self.value.weight.view(self.groups, self.dim // self.groups, self.dim // self.groups)
        elementary = pooled @ value.transpose(1, 2)
        # alpha scales D vectors here instead of N positions later
        context = weights @ (self.alpha * elementary)  # (B, G, N, C/G)
        if x.is_contiguous():
            return x + context.transpose(2, 3).reshape(x.shape)
        batch, _, height, width = x.shape
        return x + context.transpose(1, 2).reshape(batch, height, width, self.dim).permute(0, 3, 1, 2)

    @torch.jit.ignore
    def attention_maps(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Base attention maps and adaptive weights of an input, to look at.

        The full attention map of position i is the sum over d of `weights[..., d, i]` times `base[:, :, d]` [4].

        Args:
            x: Input (B, C, H, W).

        Returns:
            The base maps, which sum to one over (H, W), and the weights, which sum to one over the maps; both
            (B, groups, num_maps, H, W), in [0, 1].
        """
        batch, _, height, width = x.shape
        scores = self.maps(x).reshape(batch, self.groups, self.num_maps, height * width)
        shape = (batch, self.groups, self.num_maps, height, width)
        return scores.softmax(dim=3).view(shape), scores.softmax(dim=2).view(shape)

    def _by_group(self, x: torch.Tensor, channels: int) -> torch.Tensor:
        """View (B, channels, H, W) as (B, G, H·W, channels/G), without a copy in either memory layout."""
        batch, _, height, width = x.shape
        if x.is_contiguous():
            return x.view(batch, self.groups, channels // self.groups, height * width).transpose(2, 3)
        rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, self.groups, channels // self.groups)
        return rows.transpose(1, 2)

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        return f'dim={self.dim}, num_maps={self.num_maps}, groups={self.groups}'
