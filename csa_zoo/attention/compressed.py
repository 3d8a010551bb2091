"""Compressed self-attention (CSA), the module of `Compressed Self-Attention for Deep Metric Learning` (AAAI 2020).

Bracketed numbers are the paper's equations. The paper projects the values and then pools them; here they are pooled
first, which is the same function, because the projection is linear and each base attention map sums to one.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from timm.layers import register_notrace_module, use_fused_attn
from torch import nn

from .fused import can_fuse, fused_csa


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """View (B, C, H, W) as (B, G, C/G, H·W), in either memory layout."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height * width)


def _attend(x: torch.Tensor, maps: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The module, for compilers and exporters, as a function of maps (G, D, C/G), value (G, C/G, C/G) and α."""
    inputs = _by_group(x, maps.shape[0])
    contexts = []
    for g in range(maps.shape[0]):
        scores = inputs[:, g].mT @ maps[g].mT  # (B, N, D)
        weights = scores.softmax(2)
        elementary = alpha * (value[g] @ (inputs[:, g] @ scores.softmax(1)))  # α scales D vectors, not N positions
        context = elementary @ weights.mT if x.is_contiguous() else (weights @ elementary.mT).mT
        contexts.append(context.unflatten(2, x.shape[2:]))
    return x + torch.cat(contexts, 1)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast would lower the precision of the residual, too; not every device (meta) has it."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _images_at_a_time(x: torch.Tensor) -> int:
    """As many images as keep scores and maps in a CPU core's cache (1 MB of float32 input), or all on other devices."""
    return max(1, torch.get_num_threads() * 2**18 // x.shape[1:].numel()) if x.is_cpu else max(1, len(x))


class _Attend(torch.autograd.Function):
    """`_attend`, eager: contexts are added in place, and the backward pass starts from the inputs alone.

    In channels_last the channels of a group are a strided matrix, which the matrix products take as it is, one group at
    a time; as one batch they would have to be copied. The backward pass recomputes the scores: two products more than
    autograd would need, instead of keeping 2·groups·num_maps values per position. It can be differentiated again.
    """

    @staticmethod
    def forward(x: torch.Tensor, maps: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        output = x.clone()
        with _without_autocast(x.device):
            for part, out in zip(x.split(_images_at_a_time(x)), output.split(_images_at_a_time(x)), strict=True):
                inputs, outputs = (_by_group(tensor, len(maps)) for tensor in (part, out))
                for g in range(len(maps)):
                    x_g, y_g = inputs[:, g], outputs[:, g]
                    scores = x_g.mT @ maps[g].mT
                    elementary = alpha * (value[g] @ (x_g @ scores.softmax(1)))
                    weights = scores.softmax(2)
                    # y_g += elementary @ weightsᵀ, by rows of the output as it lies in memory; `baddbmm_` would do the
                    # same, but FLOP counters do not know it
                    terms = (y_g, elementary, weights.mT) if x.is_contiguous() else (y_g.mT, weights, elementary.mT)
                    torch.baddbmm(*terms, out=terms[0])
        return output

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def vmap(info, in_dims: tuple, *inputs) -> tuple[torch.Tensor, int]:
        return torch.vmap(_attend, in_dims)(*inputs), 0

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        x, maps, value, alpha = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
        d_x = grad.clone()
        inputs, d_outputs, d_inputs = (_by_group(tensor, len(maps)) for tensor in (x, grad, d_x))
        d_parameters = []
        with _without_autocast(x.device):
            for g in range(len(maps)):
                x_g, d_y, v, w = inputs[:, g], d_outputs[:, g], maps[g], value[g]
                scores = x_g.mT @ v.mT
                base, weights = scores.softmax(1), scores.softmax(2)
                pooled = x_g @ base
                elementary = w @ pooled  # without α
                d_elementary = d_y @ weights  # with respect to α · elementary
                d_pooled = w.mT @ (alpha * d_elementary)
                d_scores = torch._softmax_backward_data(x_g.mT @ d_pooled, base, 1, x.dtype)
                d_scores += torch._softmax_backward_data(d_y.mT @ (alpha * elementary), weights, 2, x.dtype)
                d_inputs[:, g].baddbmm_(d_pooled, base.mT).baddbmm_(v.mT.expand(len(x), -1, -1), d_scores.mT)
                d_maps = (x_g @ d_scores).sum(0).mT
                d_value = torch.einsum('bid,bjd->ij', alpha * d_elementary, pooled)
                d_parameters.append((d_maps, d_value, (d_elementary * elementary).sum()))
        d_maps, d_value, d_alpha = zip(*d_parameters, strict=True)
        return d_x, torch.stack(d_maps), torch.stack(d_value), sum(d_alpha)


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
        fused_attn: Use the kernels of `csa_zoo.attention.fused` where they run; the rest of this file otherwise.
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
        self.fused_attn = bool(use_fused_attn())  # timm's switch: TIMM_FUSED_ATTN, set_fused_attn
        self.maps = nn.Conv2d(dim, groups * num_maps, 1, groups=groups, bias=False, **dd)
        self.value = nn.Conv2d(dim, dim, 1, groups=groups, bias=False, **dd)
        scale = torch.tensor(float(alpha), **dd)
        if learnable_alpha:
            self.alpha = nn.Parameter(scale)
        else:
            self.register_buffer('alpha', scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add context to every position: (B, C, H, W) to (B, C, H, W), computed in the input's dtype.

        Raises:
            RuntimeError: If the input does not have `dim` channels, or its height or width is zero.
        """
        if not x.is_contiguous():
            x = x.contiguous(memory_format=torch.channels_last)
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out no branch of a longer condition)
            if self.fused_attn and not torch.jit.is_tracing() and can_fuse(x, self.num_maps):
                return fused_csa(x, self.maps.weight, self.value.weight, self.alpha, self.groups)
        channels = self.dim // self.groups
        maps = self.maps.weight.view(self.groups, self.num_maps, channels).to(x.dtype)
        value = self.value.weight.view(self.groups, channels, channels).to(x.dtype)
        alpha = self.alpha.to(x.dtype)
        if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return _attend(x, maps, value, alpha)
        if x.shape[1] != self.dim:
            raise RuntimeError(f'expected the input to have {self.dim} channels, but got {x.shape[1]} channels')
        if x.shape[2:].numel() == 0:
            raise RuntimeError(f'expected the input to have positions to attend to, but its size is {tuple(x.shape)}')
        return _Attend.apply(x, maps, value, alpha)

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

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        return f'dim={self.dim}, num_maps={self.num_maps}, groups={self.groups}'
