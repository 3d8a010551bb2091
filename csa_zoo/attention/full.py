"""Full self-attention (SA), the paper's baseline for CSA: equations [1] and [2] as a residual module.

Same form as the attention of SAGAN (Zhang et al., 2018): 1×1 query, key and value projections, a softmax over all
positions without scaling, and a residual with a learned weight. It runs through `scaled_dot_product_attention`, so that
CSA is compared with the best implementation of SA at hand.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import nn


@register_notrace_module
class SelfAttention(nn.Module):
    """Every position attends to every position: (H·W)² attention values per image.

    At its initial `alpha` of 0 the module is the identity.

    Shape:
        - input: (B, C, H, W), C = `dim`
        - output: (B, C, H, W)

    Attributes:
        query: 1×1 convolution without bias to `embed_dim` channels.
        key: 1×1 convolution without bias to `embed_dim` channels.
        value: 1×1 convolution without bias to C channels.
        alpha: Scalar that scales the attention's contribution to the output.
    """

    def __init__(
        self,
        dim: int,
        embed_dim: int | None = None,
        alpha: float = 0.0,
        learnable_alpha: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Create the module.

        Args:
            dim: Channels C of the input.
            embed_dim: Channels of query and key, C/8 if not given.
            alpha: Initial scale of the attention's contribution.
            learnable_alpha: Learn `alpha`; otherwise it stays as given.
            device: Where to create the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If `dim` or `embed_dim` is less than one.
        """
        super().__init__()
        if dim < 1:
            raise ValueError(f'dim must be at least 1, got {dim}')
        if embed_dim is None:
            embed_dim = max(dim // 8, 1)
        if embed_dim < 1:
            raise ValueError(f'embed_dim must be at least 1, got {embed_dim}')
        dd = {'device': device, 'dtype': dtype}
        self.query = nn.Conv2d(dim, embed_dim, 1, bias=False, **dd)
        self.key = nn.Conv2d(dim, embed_dim, 1, bias=False, **dd)
        self.value = nn.Conv2d(dim, dim, 1, bias=False, **dd)
        scale = torch.tensor(float(alpha), **dd)
        if learnable_alpha:
            self.alpha = nn.Parameter(scale)
        else:
            self.register_buffer('alpha', scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add context to every position: (B, C, H, W) to (B, C, H, W)."""
        query, key, value = (
            projection.flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, N, channels): one head
            for projection in (self.query(x), self.key(x), self.value(x))
        )
        context = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.alpha * context.squeeze(1).transpose(1, 2).reshape(x.shape)
